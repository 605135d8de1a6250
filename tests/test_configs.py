"""The example configurations fit the cards that they are made for."""

import json
from pathlib import Path

import pytest

from gemma_serve.cli import main

CONFIGS = Path(__file__).parent.parent / "configs"
MADE_FOR = [
    ("demo-cpu", "--device", "cpu"),
    ("gemma-2-2b-t4", "--for-gpu", "t4"),
    ("gemma-2b-one-8gb-gpu", "--for-gpu", "8GiB"),
    ("gemma-3-27b-two-gpus", "--for-gpu", "l40sx2"),
    ("gemma-3-27b-two-gpus", "--for-gpu", "a6000x2"),
    ("gemma-3-4b-one-16gb-gpu", "--for-gpu", "rtx4060ti-16"),
    ("gemma-7b-one-24gb-gpu", "--for-gpu", "l4"),
    ("gemma-7b-one-24gb-gpu", "--for-gpu", "a10"),
    ("gemma-7b-one-24gb-gpu", "--for-gpu", "rtx3090"),
    ("gemma-7b-one-24gb-gpu", "--for-gpu", "rtx4090"),
    ("gemma-7b-one-80gb-gpu", "--for-gpu", "a100-80"),
    ("gemma-7b-one-80gb-gpu", "--for-gpu", "h100"),
    ("shared-server", "--for-gpu", "h100"),
]


@pytest.mark.parametrize("made_for", MADE_FOR, ids=lambda made_for: "-".join(made_for))
def test_a_configuration_fits_its_card(made_for, capsys):
    name, *where = made_for
    assert main(["check-gpu", "--config", str(CONFIGS / f"{name}.yaml"), *where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["fit"] == "fits"


def test_every_configuration_was_tried():
    assert {name for name, *_ in MADE_FOR} == {path.stem for path in CONFIGS.glob("*.yaml")}
