"""What else could be done: every alternative, typed as it is shown, fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from planned import asked, changed, nobody_to_ask


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with nobody_to_ask():
        yield


def check(*argv: str) -> tuple[int, dict[str, Any]]:
    code, answer = asked("check-gpu", *argv)
    data = answer["data"]
    assert isinstance(data, dict)
    return code, data


def flags(data: dict[str, Any], kind: str) -> list[str]:
    return [one["flags"] for one in data["alternatives"] if one["kind"] == kind]


CASES = {
    "too large": "--model google/gemma-3-27b-it --for-gpu l4",
    "too large for two": "--model google/gemma-4-31B-it --for-gpu l4x2 --tensor-parallel-size 2",
    "a base model": "--model google/gemma-3-27b-pt --for-gpu rtx4090",
    "a fixed context": "--model google/gemma-7b-it --for-gpu rtx4090 --max-model-len 8192 "
    "--max-num-seqs 256 --max-num-batched-tokens 2048",
    "a short one": "--model google/gemma-2-27b-it --for-gpu a10 --max-model-len 1024",
    "longer than the model": "--model google/gemma-2-2b-it --for-gpu h100 --max-model-len 99999",
    "a split": "--model google/gemma-3-12b-it --for-gpu l4x4 --tensor-parallel-size 3",
    "too few GPUs": "--model google/gemma-3-12b-it --for-gpu l4x2 --tensor-parallel-size 4",
    "a large cache": "--model google/gemma-7b-it --for-gpu h200 --kv-cache-memory-bytes 200G",
    "a small cache": "--model google/gemma-7b-it --for-gpu h200 --kv-cache-memory-bytes 100M",
    "a small share": "--model google/gemma-3-12b-it --for-gpu h100 --gpu-memory-utilization 0.2",
    "bfloat16": "--model google/gemma-3-1b-it --for-gpu t4 --dtype bfloat16",
    "float16": "--model google/gemma-2-2b-it --for-gpu a10 --dtype float16",
    "float32": "--model google/gemma-2-9b-it --for-gpu a10 --dtype float32",
    "a quantization": "--model google/gemma-3-27b-it --for-gpu h100 --quantization fp8",
    "quantized on an old card": "--model google/gemma-3-1b-it --for-gpu t4 "
    "--quantization fp8_per_tensor",
    "a KV dtype": "--model google/gemma-3-1b-it --for-gpu l4 --kv-cache-dtype turboquant_4bit_nc",
    "a small batch": "--model google/gemma-4-31B-it --for-gpu h200 --max-num-batched-tokens 64",
    "a batch of too many": "--model google/gemma-2-2b-it --for-gpu h100 --max-num-seqs 5000 "
    "--max-num-batched-tokens 1000",
    "two things": "--model google/gemma-7b-it --for-gpu h200x4 --max-model-len 9000 "
    "--tensor-parallel-size 3",
    "an old card": "--model google/gemma-3-12b-it --for-gpu v100-32",
    "an old engine": "--model google/vaultgemma-1b --for-gpu l4 --engine-version 0.26.0",
}


@pytest.mark.parametrize("line", CASES.values(), ids=CASES.keys())
def test_every_way_out_was_shown_to_fit(line: str) -> None:
    code, data = check(*line.split())
    assert (code, data["fit"]) == (1, "does_not_fit")
    for one in data["alternatives"]:
        again, changed_data = check(*changed(line.split(), one["flags"]))
        assert (one["flags"], again, changed_data["fit"]) == (one["flags"], 0, "fits")
        plan, kind = changed_data["plan"], one["kind"]
        cache = plan["kv_cache"]
        if kind != "gpu":
            assert one["tensor_parallel_size"] == plan["tensor_parallel_size"]
            assert one["max_model_len"] == plan["max_model_len"]
            assert one["tokens"] == cache["tokens"]
            assert one["max_concurrency"] == cache["max_concurrency"]
        for name, value in one["settings"].items():
            if value is not None and name in plan:
                assert plan[name] == value


@pytest.mark.parametrize(
    "line",
    [
        "--model google/gemma-3-27b-it --for-gpu h200",
        "--model google/gemma-4-31B-it --for-gpu l40sx4",
        "--model google/gemma-2b-it --for-gpu t4 --max-model-len 2048",
        "--model google/gemma-3-12b-it --for-gpu l4x4",
        "--model google/gemma-3-27b-it --for-gpu h200 --kv-cache-memory-bytes 8G",
    ],
)
def test_what_is_said_to_hold_more_does(line: str) -> None:
    code, data = check(*line.split())
    assert (code, data["fit"]) == (0, "fits")
    assert data["alternatives"]
    for one in data["alternatives"]:
        again, more = check(*changed(line.split(), one["flags"]))
        assert (one["flags"], again) == (one["flags"], 0)
        assert more["plan"]["kv_cache"]["tokens"] == one["tokens"]
        assert one["tokens"] > data["plan"]["kv_cache"]["tokens"]
        assert more["plan"]["tensor_parallel_size"] == data["plan"]["tensor_parallel_size"]


def test_a_model_that_is_too_large() -> None:
    _, data = check(*CASES["too large"].split())
    assert flags(data, "setting") == []
    assert flags(data, "model") == [
        "--model RedHatAI/gemma-3-27b-it-quantized.w4a16",
        "--model RedHatAI/gemma-3-12b-it-FP8-dynamic",
        "--model RedHatAI/gemma-3-12b-it-quantized.w4a16",
    ]
    gpus = flags(data, "gpu")
    assert len(gpus) == 4
    assert [flag.endswith("x2") for flag in gpus] == [False, False, False, True]


def test_the_gpus_are_as_many_as_were_fixed() -> None:
    _, data = check(*CASES["too large for two"].split())
    assert flags(data, "gpu")
    assert all(flag.endswith("x2") for flag in flags(data, "gpu"))


def test_for_a_base_model_base_models_are_named() -> None:
    _, data = check(*CASES["a base model"].split())
    assert flags(data, "model")[0] == "--model google/gemma-3-4b-pt"


def test_what_costs_answers_is_marked_and_comes_last() -> None:
    _, data = check(*["--model", "google/gemma-3-27b-it", "--for-gpu", "h200"])
    assert [(one["flags"], one["changes_answers"]) for one in data["alternatives"]] == [
        ("--gpu-memory-utilization 0.95", False),
        ("--language-model-only", False),
        ("--enforce-eager", False),
        ("--kv-cache-dtype fp8", True),
        ("--quantization fp8_per_tensor", True),
        ("--quantization fp8_per_tensor --kv-cache-dtype fp8", True),
    ]


def test_an_engine_that_does_not_know_the_model_is_not_helped_by_settings() -> None:
    _, data = check(*CASES["an old engine"].split())
    assert data["alternatives"] == []


def test_a_cache_of_a_fixed_size_is_offered_another_size() -> None:
    _, data = check(*CASES["a large cache"].split())
    [flag] = flags(data, "setting")
    name, size = flag.split()
    assert name == "--kv-cache-memory-bytes"
    assert size.endswith("G")
    assert 100 < int(size[:-1]) < 139
