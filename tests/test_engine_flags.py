"""What vLLM's own flags, given with --engine-arg, mean for the plan."""

from __future__ import annotations

from typing import Any

import pytest

from gemma_serve.planning.memory.engine_flags import EngineFlags, read_engine_flags
from planned import judged


@pytest.mark.parametrize(
    ("args", "flags"),
    [
        ({}, EngineFlags()),
        ({"seed": "7"}, EngineFlags()),
        ({"block-size": "32"}, EngineFlags(block_size=32)),
        ({"block-size": 64}, EngineFlags(block_size=64)),
        ({"attention-backend": "flashinfer"}, EngineFlags(attention_backend="FLASHINFER")),
        ({"async-scheduling": True}, EngineFlags(async_scheduling=True)),
        ({"no-async-scheduling": True}, EngineFlags(async_scheduling=False)),
        ({"async-scheduling": "false"}, EngineFlags(async_scheduling=False)),
        ({"enable-chunked-prefill": False}, EngineFlags(chunked_prefill=False)),
        ({"no-enable-chunked-prefill": True}, EngineFlags(chunked_prefill=False)),
        ({"disable-hybrid-kv-cache-manager": True}, EngineFlags(hybrid_kv_cache_manager=False)),
        ({"no-disable-hybrid-kv-cache-manager": True}, EngineFlags()),
        ({"num-gpu-blocks-override": "500"}, EngineFlags(num_gpu_blocks_override=500)),
        ({"performance-mode": "throughput"}, EngineFlags(throughput_mode=True)),
        ({"performance-mode": "balanced"}, EngineFlags()),
    ],
)
def test_flags_that_are_planned(args: dict[str, Any], flags: EngineFlags) -> None:
    assert read_engine_flags(args) == flags


@pytest.mark.parametrize(
    "args",
    [
        {"block-size": "large"},
        {"block-size": "0"},
        {"block-size": [16]},
        {"attention-backend": 3},
        {"num-gpu-blocks-override": "-1"},
        {"limit-mm-per-prompt": "{image"},
        {"limit-mm-per-prompt": "[]"},
    ],
)
def test_what_makes_no_sense_is_left_to_vllm(args: dict[str, Any]) -> None:
    assert read_engine_flags(args, ["image"]) == EngineFlags()


@pytest.mark.parametrize(
    ("args", "method", "names"),
    [
        ({"spec-method": "ngram", "spec-tokens": 3}, "ngram", ("spec-method", "spec-tokens")),
        (
            {"speculative-config": '{"method": "medusa", "num_speculative_tokens": 2}'},
            "medusa",
            ("speculative-config",),
        ),
        ({"speculative-config": {"model": "a/b"}}, None, ("speculative-config",)),
        ({"speculative-config.method": "suffix"}, "suffix", ("speculative-config",)),
    ],
)
def test_drafts(args: dict[str, Any], method: str | None, names: tuple[str, ...]) -> None:
    assert read_engine_flags(args) == EngineFlags(speculative_method=method, not_planned=names)


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ({"enable-lora": True, "cpu-offload-gb": "4"}, ("cpu-offload-gb", "enable-lora")),
        ({"enable-lora": "false"}, ()),
        ({"no-enable-lora": True}, ()),
        ({"compilation-config": {"mode": 0}}, ("compilation-config",)),
        ({"compilation-config.cudagraph_mode": "NONE"}, ("compilation-config",)),
        ({"hf-overrides.text_config": {}, "hf-overrides": "{}"}, ("hf-overrides",)),
        ({"mm-processor-kwargs": {"max_soft_tokens": 1120}}, ("mm-processor-kwargs",)),
        ({"pipeline-parallel-size": 2}, ("pipeline-parallel-size",)),
    ],
)
def test_flags_whose_memory_is_not_planned(args: dict[str, Any], names: tuple[str, ...]) -> None:
    assert read_engine_flags(args).not_planned == names


@pytest.mark.parametrize(
    ("limits", "modalities", "text_only"),
    [
        ('{"image": 0}', ["image"], True),
        ({"image": {"count": 0}}, ["image"], True),
        ({"image": "0"}, ["image"], True),
        ({"image": 1}, ["image"], False),
        ({"video": 0}, ["image"], False),
        # Towers that may still be given something stay.
        ({"image": 0}, ["image", "video"], False),
        ({"image": 0, "video": 0}, ["image", "video"], True),
        ({"image": 0}, [], False),
    ],
)
def test_a_limit_of_none_leaves_the_towers_out(
    limits: Any, modalities: list[str], text_only: bool
) -> None:
    args = {"limit-mm-per-prompt": limits}
    assert read_engine_flags(args, modalities) == EngineFlags(text_only=text_only)


def test_a_limit_given_part_by_part() -> None:
    args = {"limit-mm-per-prompt.image": "0", "limit-mm-per-prompt.video": 0}
    assert read_engine_flags(args, ["image", "video"]).text_only


@pytest.mark.parametrize(
    ("model", "limits", "towers"),
    [
        ("google/gemma-3-4b-it", {"image": 0}, False),
        ("google/gemma-4-31B-it", {"image": 0}, True),
        ("google/gemma-4-31B-it", {"image": 0, "video": 0}, False),
    ],
)
def test_the_towers_are_counted_while_anything_may_be_sent_to_them(
    model: str, limits: dict[str, int], towers: bool
) -> None:
    report = judged(model, "h200", engine_args={"limit-mm-per-prompt": limits})
    assert report.decision is not None
    assert report.decision.fit is not None
    assert (report.decision.fit.weights.towers_bytes > 0) is towers
    plain = judged(model, "h200", language_model_only=not towers)
    assert plain.decision is not None
    assert plain.decision.fit is not None
    assert plain.decision.fit.memory == report.decision.fit.memory
