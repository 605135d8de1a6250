"""`gemma-serve models`: the public Gemmas, and which of them fit."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest

from gemma_serve.adapters import host
from gemma_serve.adapters.package_data import load_catalogue
from gemma_serve.cli import main
from planned import GIB, asked, nobody_to_ask

KEYS = {"id", "family", "variant", "chat", "modalities", "parameters", "license", "gated",
        "quantization", "min_vllm", "fit", "reason", "plan"}  # fmt: skip
PLAN = {"tensor_parallel_size", "dtype", "max_model_len", "weights_bytes", "kv_cache_bytes"}
# No shape is known of these, so what they take is not known either.
UNKNOWN = {"google/embeddinggemma-2", "google/diffusiongemma-26B-A4B-it"}


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    with nobody_to_ask():
        yield


def listed(*argv: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The answer's data, and the models by name."""
    code, answer = asked("models", *argv)
    assert (code, answer["ok"], answer["command"]) == (0, True, "models")
    data = answer["data"]
    return data, {model["id"]: model for model in data["models"]}


def fitting(models: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, model in models.items() if model["fit"] == "fits"}


def test_for_a_card() -> None:
    data, models = listed("--for-gpu", "h200")
    assert {name: data[name] for name in ("device", "engine_version", "gpus")} == {
        "device": "cuda",
        "engine_version": "0.32.0",
        "gpus": [{"index": 0, "name": "NVIDIA H200", "total_bytes": 143_156 * 2**20}],
    }
    assert list(models) == [entry.id for entry in load_catalogue() if entry.served]
    assert fitting(models) == set(models) - UNKNOWN
    assert all(set(model) == KEYS for model in models.values())
    for name, model in models.items():
        if name in UNKNOWN:
            assert (model["fit"], model["plan"]) == (None, None)
        else:
            assert set(model["plan"]) == PLAN | {"tokens", "max_concurrency"}


def test_one_model_in_full() -> None:
    _, models = listed("--for-gpu", "h200", "--family", "google/gemma-7b-it")
    [model] = models.values()
    plan = model["plan"]
    tokens = plan["kv_cache_bytes"] // (16 * 458_752) * 16
    assert model == {
        "id": "google/gemma-7b-it",
        "family": "Gemma 1",
        "variant": "it",
        "chat": True,
        "modalities": ["text"],
        "parameters": 8_537_680_896,
        "license": "gemma",
        "gated": True,
        "quantization": None,
        "min_vllm": "0.3.2",
        "fit": "fits",
        "reason": None,
        "plan": {
            "tensor_parallel_size": 1,
            "dtype": "bfloat16",
            "max_model_len": 8192,
            "weights_bytes": 17_079_556_546,
            "kv_cache_bytes": plan["kv_cache_bytes"],
            "tokens": tokens,
            "max_concurrency": tokens / 8192,
        },
    }


def test_every_model_is_judged_as_check_gpu_judges_it() -> None:
    _, models = listed("--for-gpu", "l4", "--family", "Gemma 3")
    assert 0 < len(fitting(models)) < len(models)
    for name in ("google/gemma-3-1b-it", "google/gemma-3-12b-it", "google/gemma-3-27b-it",
                 "RedHatAI/gemma-3-27b-it-quantized.w4a16"):  # fmt: skip
        _, answer = asked("check-gpu", "--model", name, "--for-gpu", "l4")
        data, listed_plan = answer["data"], models[name]["plan"]
        assert models[name]["fit"] == data["fit"]
        shown = {**data["plan"], **data["plan"]["memory"], **data["plan"]["kv_cache"]}
        assert listed_plan == {key: shown[key] for key in listed_plan}


def test_what_does_not_fit_has_a_plan_without_tokens() -> None:
    _, models = listed("--for-gpu", "l4")
    large = models["google/gemma-3-27b-it"]
    assert (large["fit"], set(large["plan"])) == ("does_not_fit", PLAN)
    assert large["plan"]["weights_bytes"] > 50 * GIB


def test_more_gpus_hold_more() -> None:
    one, four = (fitting(listed("--for-gpu", gpus)[1]) for gpus in ("l4", "l4x4"))
    assert one < four
    assert "google/gemma-3-27b-it" in four - one


def test_settings_count() -> None:
    short = fitting(listed("--for-gpu", "l4", "--max-model-len", "1024")[1])
    long = fitting(listed("--for-gpu", "l4", "--max-model-len", "32768")[1])
    assert long < short
    # Made for 8192 tokens.
    assert "google/gemma-2-2b-it" in short - long


def test_a_split_wants_as_many_cards() -> None:
    data, models = listed("--for-gpu", "l4", "--tensor-parallel-size", "4")
    assert len(data["gpus"]) == 4
    assert models["google/gemma-3-12b-it"]["plan"]["tensor_parallel_size"] == 4


def test_an_older_vllm_knows_fewer() -> None:
    _, old = listed("--for-gpu", "h200", "--engine-version", "0.26.0")
    _, new = listed("--for-gpu", "h200", "--engine-version", "0.32.0")
    assert fitting(new) - fitting(old) == {"google/vaultgemma-1b"}
    assert old["google/vaultgemma-1b"]["fit"] == "does_not_fit"


def test_an_old_card() -> None:
    _, models = listed("--for-gpu", "t4")
    dtypes = {name: models[name]["plan"]["dtype"] for name in
              ("google/gemma-2b-it", "google/gemma-3-1b-it")}  # fmt: skip
    assert dtypes == {"google/gemma-2b-it": "float16", "google/gemma-3-1b-it": "float32"}
    assert models["RedHatAI/gemma-3-4b-it-FP8-dynamic"]["fit"] == "does_not_fit"


@pytest.mark.parametrize("name", ["Gemma 3n", "gemma 3N", "gemma-3n"])
def test_one_family(name: str) -> None:
    _, models = listed("--for-gpu", "h200", "--family", name)
    assert list(models) == [
        "google/gemma-3n-E2B",
        "google/gemma-3n-E2B-it",
        "google/gemma-3n-E4B",
        "google/gemma-3n-E4B-it",
    ]


def test_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "total_memory_bytes", lambda: 32 * GIB)
    monkeypatch.setattr(host, "available_memory_bytes", lambda: 20 * GIB)
    data, models = listed("--device", "cpu")
    assert (data["device"], data["gpus"]) == ("cpu", [])
    small = models["google/gemma-3-1b-it"]
    assert small["fit"] == "fits"
    # A quarter of what is free, and 4 GiB at most.
    assert small["plan"]["kv_cache_bytes"] == 4 * GIB
    assert models["google/gemma-3-12b-it"]["fit"] == "does_not_fit"


def test_for_people() -> None:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["models", "--for-gpu", "l4x2", "--family", "Gemma 1"])
    assert (code, err.getvalue()) == (0, "")
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines[0] == ["model", "parameters", "weights", "GPUs", "context", "at", "once", "fits"]
    assert lines[1][:6] == ["google/gemma-2b", "2.5", "B", "4.67", "GiB", "1"]
    assert [line[-1] for line in lines[1:5]] == ["yes"] * 4
    assert out.getvalue().splitlines()[-1] == "4 of 4 fit 2 x NVIDIA L4."


def test_a_card_that_nobody_knows_is_wrong_usage() -> None:
    code, answer = asked("models", "--for-gpu", "h9000")
    assert (code, answer["data"]) == (2, {})
    assert [p["code"] for p in answer["problems"]] == ["gpu.card_unknown"]


def test_a_family_that_nobody_knows_is_wrong_usage() -> None:
    code, answer = asked("models", "--for-gpu", "h200", "--family", "Llama")
    assert (code, answer["data"]) == (2, {})
    [problem] = answer["problems"]
    assert problem["code"] == "models.unknown_family"
    assert problem["hint"].startswith("families: Gemma 1, Gemma 1.1, CodeGemma, ")


def test_only_those_that_fit_and_why_none_does() -> None:
    _, every = listed("--for-gpu", "l4")
    _, models = listed("--for-gpu", "l4", "--fits")
    assert set(models) == fitting(every)
    _, refused = listed("--for-gpu", "l4", "--family", "Gemma 3", "--kv-cache-dtype", "fp9")
    assert {model["fit"] for model in refused.values()} == {"does_not_fit"}
    assert all("no KV cache dtype fp9" in model["reason"] for model in refused.values())
