"""On a GPU machine: what vLLM takes of the GPU beside weights and KV cache, to the byte.

    python scripts/gpu/measure_memory.py --out FOLDER [--minutes 9] [--cases NAME,NAME]
    python scripts/gpu/measure_memory.py --list
    python scripts/gpu/measure_memory.py --parse LOG [LOG ...]

Needs vLLM importable and no weights: each case is a Gemma's config.json and `--load-format dummy`.
vLLM is imported once; every case is a fork of that process, which builds the engine, measures
inside it and is killed with all that it started. FOLDER/memory.json is whole after each case,
FOLDER/memory.log holds what the engines printed. `--device cpu --small` rehearses it without a GPU.
"""

from __future__ import annotations

import argparse
import json
import linecache
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

MIB = 1 << 20
TRACE_EVENTS = 200_000


# --- The cases -----------------------------------------------------------------------------------


def _alternating(count: int, sliding: int) -> list[str]:
    kinds = ["sliding_attention"] * sliding + ["full_attention"]
    layers = (kinds * count)[:count]
    return [*layers[:-1], "full_attention"] if sliding > 1 else layers


def _gemma(**sizes: Any) -> dict[str, Any]:
    return {
        "model_type": "gemma",
        "architectures": ["GemmaForCausalLM"],
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        **sizes,
    }


def _gemma2(**sizes: Any) -> dict[str, Any]:
    return {
        **_gemma(),
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        **sizes,
    }


def _gemma3(**sizes: Any) -> dict[str, Any]:
    return {
        **_gemma(),
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": 262144,
        "max_position_embeddings": 131072,
        "sliding_window": 1024,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        **sizes,
    }


def _gemma4(**sizes: Any) -> dict[str, Any]:
    return {
        "model_type": "gemma4_text",
        "architectures": ["Gemma4ForCausalLM"],
        "vocab_size": 262144,
        "max_position_embeddings": 131072,
        "head_dim": 256,
        "global_head_dim": 512,
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 0,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
            },
        },
        **sizes,
    }


def _shape(layers: int, hidden: int, mlp: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


MODELS: dict[str, dict[str, Any]] = {
    "gemma-2b": _gemma(**_shape(18, 2048, 16384, 8, 1)),
    "gemma-7b": _gemma(**_shape(28, 3072, 24576, 16, 16)),
    "gemma-2-2b": _gemma2(**_shape(26, 2304, 9216, 8, 4)),
    "gemma-2-9b": _gemma2(**_shape(42, 3584, 14336, 16, 8)),
    "gemma-3-270m": _gemma3(
        **_shape(18, 640, 2048, 4, 1), sliding_window=512, layer_types=_alternating(18, 5)
    ),
    "gemma-3-1b": _gemma3(
        **_shape(26, 1152, 6912, 4, 1), sliding_window=512, layer_types=_alternating(26, 5)
    ),
    "gemma-3-27b": _gemma3(
        **_shape(62, 5376, 21504, 32, 16), head_dim=128, layer_types=_alternating(62, 5)
    ),
    "gemma-4-E4B": _gemma4(
        **_shape(42, 2560, 10240, 8, 2),
        hidden_size_per_layer_input=256,
        vocab_size_per_layer_input=262144,
        num_kv_shared_layers=18,
        sliding_window=512,
        layer_types=_alternating(42, 5),
    ),
    "gemma-4-26B-A4B": _gemma4(
        **_shape(30, 2816, 2112, 16, 8),
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
        sliding_window=1024,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
        layer_types=_alternating(30, 5),
    ),
    "gemma-4-31B": _gemma4(
        **_shape(60, 5376, 21504, 32, 16),
        num_global_key_value_heads=4,
        attention_k_eq_v=True,
        sliding_window=1024,
        layer_types=_alternating(60, 5),
    ),
}

MODELS["gemma-3-4b"] = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "mm_tokens_per_image": 256,
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "image_token_index": 262144,
    "text_config": _gemma3(
        **_shape(34, 2560, 10240, 8, 4), vocab_size=262208, layer_types=_alternating(34, 5)
    ),
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    },
}


@dataclass(frozen=True)
class Case:
    """One engine to build, and how far: until the KV cache has its size, or vLLM has captured its
    CUDA graphs, or is ready.
    """

    name: str
    model: str
    eager: bool
    until: Literal["sized", "captured", "ready"] = "sized"
    sequences: int = 1024
    tokens: int = 8192
    length: int = 8192
    flags: Mapping[str, Any] = field(default_factory=dict)


FP8 = {"quantization": "fp8"}
TEXT_ONLY = {"language_model_only": True}
TRITON = {"attention_backend": "TRITON_ATTN"}

# In the order of their worth: the time limit cuts from the end. A model's second compiled case
# finds what the first one compiled, so it measures a later start.
CASES = (
    Case("gemma-7b-eager", "gemma-7b", True),
    Case("gemma-7b-compiled-cold", "gemma-7b", False, "captured"),
    Case("gemma-7b-compiled-warm", "gemma-7b", False, "ready"),
    Case("gemma-2-9b-eager", "gemma-2-9b", True),
    Case("gemma-4-E4B-eager", "gemma-4-E4B", True),
    Case("gemma-3-27b-eager", "gemma-3-27b", True),
    Case("gemma-2-9b-compiled", "gemma-2-9b", False, "captured"),
    Case("gemma-4-E4B-compiled", "gemma-4-E4B", False, "captured"),
    Case("gemma-4-31B-eager", "gemma-4-31B", True, length=4096),
    Case("gemma-4-26B-A4B-eager", "gemma-4-26B-A4B", True),
    Case("gemma-7b-fp8-compiled", "gemma-7b", False, "captured", flags=FP8),
    Case("gemma-3-27b-compiled", "gemma-3-27b", False, "captured"),
    Case("gemma-7b-2048-256-compiled", "gemma-7b", False, "captured", sequences=256, tokens=2048),
    Case("gemma-3-4b-text-only-compiled", "gemma-3-4b", False, "captured", flags=TEXT_ONLY),
    Case("gemma-3-1b-compiled", "gemma-3-1b", False, "captured"),
    Case("gemma-4-26B-A4B-compiled", "gemma-4-26B-A4B", False, "captured"),
    Case("gemma-4-26B-A4B-triton-compiled", "gemma-4-26B-A4B", False, "captured", flags=TRITON),
    Case("gemma-2b-eager", "gemma-2b", True),
    Case("gemma-7b-fp8-fp8kv-eager", "gemma-7b", True, flags=FP8 | {"kv_cache_dtype": "fp8"}),
    Case("gemma-2b-compiled", "gemma-2b", False, "captured"),
    Case("gemma-4-31B-compiled", "gemma-4-31B", False, "captured", length=4096),
)  # fmt: skip

# Small enough for two cores: the same architectures, few layers.
REHEARSAL = (
    Case("gemma-3-270m-eager", "gemma-3-270m", True, sequences=8, tokens=512, length=512),
    Case("gemma-3-270m-compiled", "gemma-3-270m", False, "ready", 8, tokens=512, length=512),
    Case("gemma-2-2b-eager", "gemma-2-2b", True, sequences=8, tokens=512, length=512),
)


def small(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same architecture at a size that any machine holds."""
    if "text_config" in config:
        text = {**small(config["text_config"]), "vocab_size": 262208}
        vision = {**config["vision_config"], "num_hidden_layers": 2}
        return {**config, "text_config": text, "vision_config": vision}
    layers = 12
    shrunk = {
        **config,
        **_shape(layers, 128, 256, 4, 1),
        "vocab_size": 4096,
        "head_dim": 64,
        "max_position_embeddings": 2048,
    }
    if "layer_types" in config:
        shrunk["layer_types"] = _alternating(layers, 5)
    fewer = {"num_kv_shared_layers": 4, "num_global_key_value_heads": 1}
    shrunk |= {name: count for name, count in fewer.items() if name in config}
    if "num_experts" in config:
        shrunk |= {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
    return shrunk


# --- Reading vLLM's log --------------------------------------------------------------------------

_GIB = r"(-?[\d.]+)"
LOG_PATTERNS: dict[str, str] = {
    "attention_backend": r"Using (\w+) attention backend",
    "runner": r"Using (V2) Model Runner",
    "model_gib": rf"Model loading took {_GIB} GiB",
    "available_kv_gib": rf"Available KV cache memory: {_GIB} GiB",
    "kv_tokens": r"KV cache size: ([\d,]+) tokens",
    "concurrency": r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x",
    "block_size": r"Setting kv cache block size to (\d+)",
    "graphs_gib": rf"Graph capturing finished in \d+ secs, took {_GIB} GiB",
    "graphs_estimated_gib": rf"{_GIB} GiB \(estimated\)",
    "free_gib": rf"Free memory on device \({_GIB}/",
    "total_gib": rf"Free memory on device \([\d.]+/{_GIB} GiB\)",
    "requested_gib": rf"Desired GPU memory utilization is \([\d.]+, {_GIB} GiB\)",
    "weights_used_gib": rf"Actual usage is {_GIB} GiB for weight",
    "consumed_used_gib": rf"Actual usage is {_GIB} GiB for consumed",
    "peak_activation_gib": rf"{_GIB} GiB for peak activation",
    "non_torch_gib": rf"{_GIB} GiB for non-torch memory",
    "suggested_bytes": r"--kv-cache-memory=(\d+)` [^`]*fit into requested",
    "suggested_full_bytes": r"--kv-cache-memory=(\d+)` [^`]*fully utilize",
    "compile_s": r"torch\.compile took ([\d.]+) s in total",
    "init_s": r"init engine .* took ([\d.]+) s",
}


def parse_log(text: str) -> dict[str, str | int | float]:
    """The memory figures of one engine's log, by name; of repeated lines the last."""
    figures: dict[str, str | int | float] = {}
    for name, pattern in LOG_PATTERNS.items():
        found = re.findall(pattern, text)
        if found:
            figures[name] = _number(found[-1])
    return figures


def _number(text: str) -> str | int | float:
    plain = text.replace(",", "")
    for kind in (int, float):
        with suppress(ValueError):
            return kind(plain)
    return text


# --- Inside the engine (a forked child) ----------------------------------------------------------


class Probe:
    """Measures at the steps of vLLM's worker, one file per process that has a worker."""

    def __init__(self, case: Case, folder: Path) -> None:
        self._case = case
        self._folder = folder
        self._figures: dict[str, Any] = {}

    def install(self) -> None:
        """Wrap the steps of the worker classes; what is missing in a version is left out."""
        import torch
        from vllm.v1.worker.gpu_worker import Worker

        classes: list[type] = [Worker]
        # To import it is to have it replace torch's memory functions by the CPU's.
        if not torch.cuda.is_available():
            with suppress(Exception):
                from vllm.v1.worker.cpu_worker import CPUWorker

                classes.append(CPUWorker)
        for owner in classes:
            for step in ("init_device", "load_model", "initialize_from_config"):
                self._wrap(owner, step, None)
            self._wrap(owner, "determine_available_memory", self._after_profiling)
            self._wrap(owner, "compile_or_warm_up_model", None)
            if self._case.until == "sized" and "compile_or_warm_up_model" in vars(owner):
                owner.compile_or_warm_up_model = self._stop  # type: ignore[attr-defined]
        if torch.cuda.is_available():
            self._watch_graphs()

    def _watch_graphs(self) -> None:
        """Follow the memory through the capture of CUDA graphs, of both runners."""
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondRunner
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner as FirstRunner

        for owner in (FirstRunner, SecondRunner):
            for step in ("profile_cudagraph_memory", "capture_model"):
                self._wrap_capture(owner, step)

    def _wrap_capture(self, owner: type, step: str) -> None:
        original = vars(owner).get(step)
        if original is None:
            return

        def wrapped(runner: Any, *args: Any, **kwargs: Any) -> Any:
            before = memory()
            with _after_each_graph() as steps:
                result = original(runner, *args, **kwargs)
            after = memory()
            figures = {"before": before, "after": after, "result": result, "steps": steps}
            self._keep(step, figures)
            self._guard(f"{step}_pools", lambda: self._keep(f"{step}_pools", _pools()))
            if step == "capture_model" and self._case.until == "captured":
                self._stop()
            return result

        setattr(owner, step, wrapped)

    def _wrap(self, owner: type, step: str, then: Callable[[Any, Any], None] | None) -> None:
        original = vars(owner).get(step)
        if original is None:
            return

        def wrapped(worker: Any, *args: Any, **kwargs: Any) -> Any:
            if step == "init_device":
                self._record_allocations()
            begun = time.monotonic()
            result = original(worker, *args, **kwargs)
            self._keep(step, {**memory(), "seconds": round(time.monotonic() - begun, 2)})
            if step == "load_model":
                self._guard("history", _restart_trace)
            if step == "initialize_from_config":
                self._keep("kv_cache", _kv_cache(args))
            if then is not None:
                self._guard(step, lambda: then(worker, result))
            return result

        setattr(owner, step, wrapped)

    def _stop(self, *_: Any) -> None:
        time.sleep(0.5)  # the other ranks of a tensor-parallel engine write theirs
        os._exit(0)

    def _keep(self, name: str, value: Any) -> None:
        self._figures[name] = value
        path = self._folder / f"{os.getpid()}.json"
        path.with_suffix(".part").write_text(json.dumps(self._figures, default=str))
        path.with_suffix(".part").replace(path)

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        """A figure that can't be had must not cost the others."""
        try:
            action()
        except Exception:
            self._keep(f"{name}_error", traceback.format_exc()[-2000:])

    def _record_allocations(self) -> None:
        import torch

        if torch.cuda.is_available():
            self._guard("history", _restart_trace)

    def _after_profiling(self, worker: Any, available: Any) -> None:
        runner = worker.model_runner
        names = (
            "requested_memory", "non_torch_memory", "peak_activation_memory", "total_consumed",
            "cudagraph_memory_estimate", "available_kv_cache_memory_bytes",
        )  # fmt: skip
        budget = {name: getattr(worker, name, None) for name in names}
        snapshot = getattr(worker, "init_snapshot", None)
        for name in ("free_memory", "total_memory", "torch_memory", "non_torch_memory"):
            budget[f"init_{name}"] = getattr(snapshot, name, None)
        budget["model_memory_usage"] = getattr(runner, "model_memory_usage", None)
        budget["returned"] = available
        self._keep("budget", budget)
        config = worker.vllm_config
        self._keep("engine", _engine(config, runner))
        import torch

        if torch.cuda.is_available():
            self._guard("peak", lambda: self._keep("peak_of_profiling", _live_at_peak()))
            self._guard("persistent", lambda: self._keep("persistent", _persistent()))
            self._guard("sweep", lambda: self._sweep(runner))
            torch.cuda.empty_cache()
            self._keep("after_sweep", memory())

    def _sweep(self, runner: Any) -> None:
        """The peak of forwards of fewer tokens, and of the sampler on fewer rows."""
        from torch import inference_mode

        flags = {"is_profile": True}
        if type(runner).__module__.startswith("vllm.v1.worker.gpu.model_runner"):
            flags["skip_attn"] = True
        forward: dict[int, Any] = {}
        sampler: dict[int, Any] = {}
        tokens = self._case.tokens
        rows = None
        with inference_mode():
            for count in (tokens, tokens // 2, tokens // 4, tokens // 8, tokens // 32):
                with _peak(forward, count):
                    rows = runner._dummy_run(count, **flags)[1]
                if count == tokens:
                    self._keep("forward_live", _live_at_peak())
                    sampled = rows
            assert sampled is not None
            rows = None
            _restart_trace()
            for count in (sampled.shape[0], sampled.shape[0] // 2, sampled.shape[0] // 4):
                with _peak(sampler, count):
                    runner._dummy_sampler_run(sampled[:count])
                if count == sampled.shape[0]:
                    self._keep("sampler_live", _live_at_peak())
        self._keep("forward_peak_by_tokens", forward)
        self._keep("sampler_peak_by_rows", sampler)


def memory() -> dict[str, int]:
    """The GPU's memory as the driver and as torch's allocator see it, in bytes."""
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {"rss": pages * os.sysconf("SC_PAGE_SIZE")}
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    return {
        "free": free,
        "total": total,
        "torch_reserved": reserved,
        "torch_allocated": torch.cuda.memory_allocated(),
        "torch_peak": torch.cuda.max_memory_allocated(),
        "non_torch": total - free - reserved,
    }


@contextmanager
def _peak(into: dict[int, Any], key: int) -> Iterator[None]:
    """Allocated bytes at the peak of the block, above those before it."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    torch.cuda.synchronize()
    into[key] = {
        "peak": torch.cuda.max_memory_allocated() - before,
        "kept": torch.cuda.memory_allocated() - before,
    }


@contextmanager
def _after_each_graph() -> Iterator[list[tuple[int, int, int]]]:
    """The graphs captured so far, free and reserved bytes, whenever a graph has changed them."""
    import torch

    steps: list[tuple[int, int, int]] = []
    original = torch.cuda.CUDAGraph.capture_end
    count = 0

    def capture_end(graph: Any) -> None:
        nonlocal count
        original(graph)
        count += 1
        now = (torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved())
        if not steps or steps[-1][1:] != now:
            steps.append((count, *now))

    torch.cuda.CUDAGraph.capture_end = capture_end
    try:
        yield steps
        steps.append((count, torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()))
    finally:
        torch.cuda.CUDAGraph.capture_end = original


def _pools(top: int = 12) -> list[dict[str, Any]]:
    """What each of torch's memory pools holds, the default one and those of CUDA graphs."""
    import torch

    pools: dict[str, dict[str, Any]] = {}
    for segment in torch.cuda.memory._snapshot()["segments"]:
        name = str(segment.get("segment_pool_id"))
        pool = pools.setdefault(name, {"pool": name, "reserved": 0, "allocated": 0, "lines": {}})
        pool["reserved"] += segment["total_size"]
        pool["allocated"] += segment["allocated_size"]
        for block in segment["blocks"]:
            # A graph's tensors are free to the allocator once it is captured.
            line = f"{block['state']} {_frame(block.get('frames', ()))}"
            pool["lines"][line] = pool["lines"].get(line, 0) + block["size"]
    for pool in pools.values():
        lines = sorted(((size, line) for line, size in pool["lines"].items()), reverse=True)
        pool["lines"] = lines[:top]
    return list(pools.values())


def _frame(frames: Sequence[Mapping[str, Any]]) -> str:
    """Where an allocation was made: the innermost lines outside torch, with their text."""
    shown = []
    for frame in frames:
        path = str(frame.get("filename", ""))
        if "site-packages/torch/" in path or not path.endswith(".py"):
            continue
        line = int(frame.get("line", 0))
        text = linecache.getline(path, line).strip()[:120]
        shown.append(f"{'/'.join(path.split('/')[-2:])}:{line} {text}")
        if len(shown) == 2:
            break
    return " < ".join(shown)


def _restart_trace() -> None:
    """Record allocations from here on, with the Python lines that made them."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.memory._record_memory_history(
            enabled="all",
            context="alloc",
            stacks="python",
            max_entries=TRACE_EVENTS,
            clear_history=True,
        )


def _live_at_peak(least: int = 256 * 1024, top: int = 40) -> dict[str, Any]:
    """The tensors that live at the highest point of the recorded trace, largest first.

    What was allocated before the trace was restarted (weights) is not in it. It restarts here.
    """
    import torch

    traces = torch.cuda.memory._snapshot()["device_traces"]
    events = traces[0] if traces else []
    total = highest = at = 0
    known: dict[int, int] = {}
    for index, event in enumerate(events):
        if event["action"] == "alloc":
            known[event["addr"]] = event["size"]
            total += event["size"]
        elif event["action"] == "free_completed":
            total -= known.pop(event["addr"], 0)
        if total > highest:
            highest, at = total, index
    live: dict[int, tuple[int, str]] = {}
    for event in events[: at + 1]:
        if event["action"] == "alloc":
            live[event["addr"]] = (event["size"], _frame(event.get("frames", ())))
        elif event["action"] == "free_completed":
            live.pop(event["addr"], None)
    largest = sorted(live.values(), reverse=True)
    _restart_trace()
    return {
        "events": len(events),
        "bytes": highest,
        "tensors": [entry for entry in largest if entry[0] >= least][:top],
        "small_bytes": sum(size for size, _ in largest if size < least),
    }


def _persistent(top: int = 40) -> list[tuple[int, int, str]]:
    """What torch holds after profiling, by the line that allocated it: bytes, count, line."""
    import torch

    sums: dict[str, tuple[int, int]] = {}
    for segment in torch.cuda.memory._snapshot()["segments"]:
        for block in segment["blocks"]:
            if block["state"] != "active_allocated":
                continue
            line = _frame(block.get("frames", ()))
            held, count = sums.get(line, (0, 0))
            sums[line] = (held + block.get("requested_size", block["size"]), count + 1)
    rows = [(held, count, line) for line, (held, count) in sums.items()]
    return sorted(rows, reverse=True)[:top]


def _engine(config: Any, runner: Any) -> dict[str, Any]:
    compilation = config.compilation_config
    return {
        "runner": f"{type(runner).__module__}.{type(runner).__name__}",
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "max_model_len": config.model_config.max_model_len,
        "dtype": str(config.model_config.dtype),
        "cudagraph_mode": str(compilation.cudagraph_mode),
        "capture_sizes": list(compilation.cudagraph_capture_sizes or ()),
        "attention_backends": sorted(
            {
                layer.get_attn_backend().get_name()
                for layer in compilation.static_forward_context.values()
                if hasattr(layer, "get_attn_backend")
            }
        ),
    }


def _kv_cache(args: Sequence[Any]) -> dict[str, Any]:
    with suppress(Exception):
        config = args[0][0] if isinstance(args[0], list) else args[0]
        return {
            "num_blocks": config.num_blocks,
            "bytes": sum(tensor.size for tensor in config.kv_cache_tensors),
            "groups": [
                (len(group.layer_names), str(group.kv_cache_spec)[:300])
                for group in config.kv_cache_groups
            ],
        }
    return {}


def build_engine(case: Case, model: Path, folder: Path, options: argparse.Namespace) -> None:
    """Build the case's engine in this process; the probe leaves its figures in the folder."""
    _inspect_models_here()
    Probe(case, folder).install()
    from vllm import LLM

    flags: dict[str, Any] = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": case.length,
        "max_num_seqs": case.sequences,
        "max_num_batched_tokens": case.tokens,
        "enforce_eager": case.eager,
        "tensor_parallel_size": options.tensor_parallel_size,
        **case.flags,
    }
    if options.device == "cpu":
        flags["kv_cache_memory_bytes"] = 256 * MIB
    else:
        flags["gpu_memory_utilization"] = options.gpu_memory_utilization
    LLM(**flags)


def _inspect_models_here() -> None:
    """vLLM inspects each model class in a process of its own, to keep CUDA out; not needed here."""
    with suppress(Exception):
        from vllm.model_executor.models import registry

        registry._LazyRegisteredModel.inspect_model_cls = lambda model: (
            registry._ModelInfo.from_model_cls(model.load_model_cls())
        )


# --- The parent ----------------------------------------------------------------------------------


class Results:
    """The figures of all cases and what the engines printed."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "memory.json"
        self._log = (folder / "memory.log").open("w")
        self.data: dict[str, Any] = {"versions": {}, "cases": {}}

    def keep(self) -> None:
        """Write all that is known; the file is whole at every moment."""
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1))
        part.replace(self._path)

    def append_log(self, name: str, text: str) -> None:
        """Add what one engine printed."""
        self._log.write(f"===== {name}\n{text}\n")
        self._log.flush()


def nvidia_smi(query: str) -> str | None:
    """One field of the first GPU, or None without a GPU."""
    argv = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    return None


def run_case(case: Case, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """Fork, build the engine there, wait for its figures, end all that it started."""
    config = MODELS[case.model]
    folder = Path(tempfile.mkdtemp(prefix="memory-"))
    model = _model_folder(case, options)
    shape = small(config) if options.small else config
    model.joinpath("config.json").write_text(json.dumps({"torch_dtype": "bfloat16", **shape}))
    before = nvidia_smi("memory.used")
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(case, folder, options)
    status = _wait(child, begun + seconds)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    log = (folder / "log").read_text(errors="replace") if (folder / "log").exists() else ""
    workers = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    figures: dict[str, Any] = {
        "case": {**vars(case), "flags": dict(case.flags)},
        "config": shape,
        "exit_status": status,
        "seconds": round(time.monotonic() - begun, 1),
        "nvml_used_before_mib": before,
        "nvml_used_after_mib": _settled(before),
        "log": parse_log(log),
        "workers": workers,
    }
    if not any("budget" in worker for worker in workers):
        figures["log_tail"] = log[-3000:]
    shutil.rmtree(folder, ignore_errors=True)
    return {"figures": figures, "log": log}


def _model_folder(case: Case, options: argparse.Namespace) -> Path:
    """The same for all cases of a model: vLLM's compilation cache goes by its path."""
    name = f"{case.model}-small" if options.small else case.model
    folder = Path(tempfile.gettempdir()) / "memory-models" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _child(case: Case, folder: Path, options: argparse.Namespace) -> None:
    os.setsid()
    if options.fresh:
        argv = [sys.executable, *sys.argv, "--cases", case.name, "--inside", str(folder)]
        os.execv(sys.executable, argv)
    build_in(folder, case, options)


def build_in(folder: Path, case: Case, options: argparse.Namespace) -> None:
    """Build the engine with its output in the folder's log; the process ends here."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        build_engine(case, _model_folder(case, options), folder, options)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, until: float) -> int | None:
    """The exit status of the child, or None if the time ran out."""
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    return None


def _settled(before: str | None) -> str | None:
    """Memory in use on the GPU once it is back to what it was, or after five seconds."""
    used = nvidia_smi("memory.used")
    for _ in range(10):
        if used is None or before is None or int(used) <= int(before) + 100:
            break
        time.sleep(0.5)
        used = nvidia_smi("memory.used")
    return used


def versions() -> dict[str, str | None]:
    """What the figures hold for."""
    import torch
    import transformers
    import vllm

    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "gpu": nvidia_smi("name"),
        "driver": nvidia_smi("driver_version"),
        "memory_total_mib": nvidia_smi("memory.total"),
    }


def import_engine() -> bool:
    """Import what every case needs, once; whether CUDA is still untouched, so that forks may."""
    modules = (
        "vllm.entrypoints.llm",
        "vllm.v1.engine.core",
        "vllm.v1.executor.uniproc_executor",
        "vllm.v1.worker.gpu_worker",
        "vllm.v1.worker.gpu.model_runner",
    )
    for name in modules:
        with suppress(Exception):
            __import__(name)
    import torch

    return not torch.cuda.is_initialized()


def environment(options: argparse.Namespace) -> None:
    """The settings that make one process hold the engine, and its log complete."""
    os.environ.update(
        {
            "VLLM_LOGGING_LEVEL": "DEBUG",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_WORKER_MULTIPROC_METHOD": "fork",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
    )
    if options.device == "cpu":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="vLLM's GPU memory beside weights and KV cache.")
    parser.add_argument("--out", type=Path, default=Path("memory"))
    parser.add_argument("--minutes", type=float, default=9.0, help="no case starts or runs beyond")
    parser.add_argument("--case-seconds", type=float, default=120.0, help="longest single case")
    parser.add_argument("--cases", default="", help="names, comma-separated; default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="few layers, for a rehearsal")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    parser.add_argument("--fresh", action="store_true", help="import anew for each case, no fork")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--parse", type=Path, nargs="+", help="read logs instead of measuring")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[Case]:
    """The cases to run, in their order."""
    cases = REHEARSAL if options.device == "cpu" else CASES
    names = [name for name in options.cases.split(",") if name]
    known = {case.name: case for case in (*CASES, *REHEARSAL)}
    picked = [known[name] for name in names] if names else list(cases)
    if options.small:
        return [replace(case, sequences=8, tokens=512, length=512) for case in picked]
    return picked


def main() -> int:
    options = arguments()
    if options.parse:
        print(
            json.dumps({path.name: parse_log(path.read_text()) for path in options.parse}, indent=1)
        )
        return 0
    cases = chosen(options)
    if options.list:
        print("\n".join(f"{case.name}: {case}" for case in cases))
        return 0
    begun = time.monotonic()
    environment(options)
    if options.inside:
        build_in(options.inside, cases[0], options)
    options.fresh = not import_engine() or options.fresh
    results = Results(options.out)
    results.data["versions"] = versions()
    results.data["import_s"] = round(time.monotonic() - begun, 1)
    results.data["not_run"] = [case.name for case in cases]
    results.keep()
    end = begun + options.minutes * 60
    for case in cases:
        left = end - time.monotonic()
        if left < 15:
            break
        done = run_case(case, min(options.case_seconds, left), options)
        results.data["cases"][case.name] = done["figures"]
        results.data["not_run"].remove(case.name)
        results.append_log(case.name, done["log"])
        results.keep()
        shown = {**done["figures"]["log"], "exit": done["figures"]["exit_status"]}
        print(f"{case.name}: {done['figures']['seconds']} s {json.dumps(shown)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
