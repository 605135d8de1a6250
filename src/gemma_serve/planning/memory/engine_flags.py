"""What the flags of vLLM that are no settings here (`--engine-arg`) mean for its memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Flags that change the memory in ways that are not planned: with them a verdict is a guess.
_NOT_PLANNED = (
    "attention-config",
    "convert",
    "compilation-config",
    "cpu-offload-gb",
    "cudagraph-capture-sizes",
    "data-parallel-size",
    "decode-context-parallel-size",
    "diffusion-config",
    "disable-sliding-window",
    "enable-cumem-allocator",
    "enable-dbo",
    "enable-eplb",
    "enable-expert-parallel",
    "enable-lora",
    "enable-mm-embeds",
    "enable-prompt-embeds",
    "enable-sleep-mode",
    "hf-config-path",
    "hf-overrides",
    "kernel-config",
    "kv-cache-dtype-skip-layers",
    "kv-offloading-backend",
    "kv-offloading-size",
    "kv-sharing-fast-prefill",
    "kv-transfer-config",
    "linear-backend",
    "load-format",
    "max-cudagraph-capture-size",
    "mm-encoder-attn-backend",
    "mm-encoder-only",
    "mm-encoder-tp-mode",
    "mm-ipc-gpu-memory-gb",
    "mm-processor-kwargs",
    "model-impl",
    "moe-backend",
    "offload-backend",
    "optimization-level",
    "pipeline-parallel-size",
    "prefill-context-parallel-size",
    "quantization-config",
    "runner",
    "skip-mm-profiling",
    "ubatch-size",
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


def read_engine_flags(args: Mapping[str, Any], modalities: Iterable[str] = ()) -> EngineFlags:
    """Read `engine_args`, by vLLM's long names; a value of the wrong kind is left to vLLM.

    `modalities` are what the model takes beside text, all of which must be limited to none for it
    to be served without its towers.
    """
    # `compilation-config.mode` sets a part of `compilation-config`.
    given = {name.partition(".")[0] for name, value in args.items() if not _is_off(value)}
    return EngineFlags(
        block_size=_number(args.get("block-size")),
        attention_backend=_word(args.get("attention-backend")),
        async_scheduling=_switch(args, "async-scheduling"),
        chunked_prefill=_switch(args, "enable-chunked-prefill"),
        hybrid_kv_cache_manager=not _switch(args, "disable-hybrid-kv-cache-manager"),
        num_gpu_blocks_override=_number(args.get("num-gpu-blocks-override")),
        speculative_method=_speculative_method(args),
        throughput_mode=args.get("performance-mode") == "throughput",
        text_only=_takes_none(_parts(args, "limit-mm-per-prompt"), modalities),
        not_planned=tuple(sorted(given.intersection((*_NOT_PLANNED, *_SPECULATIVE)))),
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
            return on is not _is_off(args[spelled])
    return None


def _is_off(value: Any) -> bool:
    return str(value).lower() in ("false", "0")


def _speculative_method(args: Mapping[str, Any]) -> str | None:
    given = args.get("spec-method")
    method = given if isinstance(given, str) else _parts(args, "speculative-config").get("method")
    return method if isinstance(method, str) else None


def _takes_none(limits: Mapping[str, Any], modalities: Iterable[str]) -> bool:
    """Whether every modality is limited to none, for which vLLM leaves the towers out."""
    wanted = tuple(modalities)
    counts = [limits.get(modality) for modality in wanted]
    counts = [count.get("count") if isinstance(count, dict) else count for count in counts]
    return bool(wanted) and all(str(count) == "0" for count in counts)


def _parts(args: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What an object holds, given whole as JSON or part by part (`name.key`)."""
    value = args.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    parts = dict(value) if isinstance(value, dict) else {}
    start = f"{name}."
    parts |= {key.removeprefix(start): v for key, v in args.items() if key.startswith(start)}
    return parts
