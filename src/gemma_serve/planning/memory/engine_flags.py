"""What the flags of vLLM that are no settings here (`--engine-arg`) mean for its memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Flags that change the memory in ways that are not planned: with them a verdict is a guess.
_NOT_PLANNED = (
    "attention-config",
    "compilation-config",
    "cpu-offload-gb",
    "cudagraph-capture-sizes",
    "data-parallel-size",
    "decode-context-parallel-size",
    "disable-sliding-window",
    "enable-expert-parallel",
    "enable-lora",
    "enable-sleep-mode",
    "hf-overrides",
    "kv-cache-dtype-skip-layers",
    "kv-offloading-backend",
    "kv-offloading-size",
    "kv-transfer-config",
    "load-format",
    "model-impl",
    "offload-backend",
    "optimization-level",
    "pipeline-parallel-size",
    "prefill-context-parallel-size",
    "runner",
)
_SPECULATIVE = ("speculative-config", "spec-model", "spec-method", "spec-tokens")


@dataclass(frozen=True)
class EngineFlags:
    """The flags that the memory follows; None or the default where they were not given.

    `not_planned` names the others that change it.
    """

    block_size: int | None = None
    attention_backend: str | None = None
    async_scheduling: bool | None = None
    chunked_prefill: bool | None = None
    hybrid_kv_cache_manager: bool = True
    num_gpu_blocks_override: int | None = None
    speculative_method: str | None = None
    throughput_mode: bool = False
    text_only: bool = False
    not_planned: tuple[str, ...] = ()


def read_engine_flags(args: Mapping[str, Any]) -> EngineFlags:
    """Read `engine_args`, by vLLM's long names; a value of the wrong kind is left to vLLM."""
    speculates = [name for name in _SPECULATIVE if name in args]
    return EngineFlags(
        block_size=_number(args.get("block-size")),
        attention_backend=_word(args.get("attention-backend")),
        async_scheduling=_switch(args, "async-scheduling"),
        chunked_prefill=_switch(args, "enable-chunked-prefill"),
        hybrid_kv_cache_manager=not _switch(args, "disable-hybrid-kv-cache-manager"),
        num_gpu_blocks_override=_number(args.get("num-gpu-blocks-override")),
        speculative_method=_speculative_method(args),
        throughput_mode=args.get("performance-mode") == "throughput",
        text_only=_takes_no_items(args.get("limit-mm-per-prompt")),
        not_planned=tuple(sorted([*speculates, *(name for name in _NOT_PLANNED if name in args)])),
    )


def _number(value: Any) -> int | None:
    try:
        number = int(str(value))
    except ValueError:
        return None
    return number if number > 0 else None


def _word(value: Any) -> str | None:
    return value.upper() if isinstance(value, str) else None


def _switch(args: Mapping[str, Any], name: str) -> bool | None:
    """Whether a switch is on; `--no-NAME` is off, and None is "not given"."""
    for spelled, on in ((name, True), (f"no-{name}", False)):
        if spelled in args:
            return on is (str(args[spelled]).lower() not in ("false", "0"))
    return None


def _speculative_method(args: Mapping[str, Any]) -> str | None:
    given = args.get("spec-method")
    config = _mapping(args.get("speculative-config"))
    method = given if isinstance(given, str) else config.get("method")
    return method if isinstance(method, str) else None


def _takes_no_items(limits: Any) -> bool:
    """Whether every modality is limited to none, for which vLLM leaves the towers out."""
    counts = _mapping(limits)
    return bool(counts) and all(count == 0 for count in counts.values()) and "image" in counts


def _mapping(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {}
    return value if isinstance(value, dict) else {}
