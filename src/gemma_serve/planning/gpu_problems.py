"""What stands between the chosen GPUs and a running engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gemma_serve.errors import Problem
from gemma_serve.planning.checkpoint import REFUSES_FLOAT16
from gemma_serve.planning.gpus import Gpu, GpuProcess, list_gpus, name_gpus

# vLLM measures after its CUDA context exists: on an idle H200 it finds 139.29 of 139.8 GiB.
CONTEXT_BYTES = 600 * 2**20

# Less than this unaccounted for is the driver's and the desktop's own.
_UNSEEN_BYTES = 2**30


def requested_bytes(gpu: Gpu, gpu_memory_utilization: float) -> int:
    """The memory of `gpu` that vLLM will claim, to the byte as vLLM computes it."""
    return math.ceil(gpu.total_bytes * gpu_memory_utilization)


@dataclass(frozen=True)
class WeightsFit:
    """The weights against the memory they must fit into: that of `gpu`, the smallest chosen.

    `share_bytes` is one GPU's part of the `loaded_bytes`; `requested_bytes` is all that vLLM
    will claim there, for the weights and everything else.
    """

    gpu: Gpu
    loaded_bytes: int
    share_bytes: int
    requested_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the weights leave anything at all for the rest."""
        return self.share_bytes < self.requested_bytes


def weights_fit(
    chosen: Sequence[Gpu],
    *,
    gpu_memory_utilization: float,
    weights_bytes: int,
    tensor_parallel_size: int,
) -> WeightsFit:
    """Compare the weights, as loaded, with what vLLM may use of each of `chosen` (at least one)."""
    smallest = min(chosen, key=lambda gpu: (gpu.total_bytes, gpu.index))
    return WeightsFit(
        smallest,
        weights_bytes,
        math.ceil(weights_bytes / tensor_parallel_size),
        requested_bytes(smallest, gpu_memory_utilization),
    )


def gpu_problems(
    chosen: Sequence[Gpu],
    *,
    gpu_memory_utilization: float,
    weights_bytes: int | None,
    tensor_parallel_size: int,
    dtype: str,
    model_type: str | None = None,
) -> tuple[Problem, ...]:
    """Every reason why vLLM won't start on `chosen`, and what is worth knowing before it does.

    Args:
        chosen: at least one GPU.
        weights_bytes: all weights as they are loaded; None if unknown.
        dtype: as configured, "auto" included.
        model_type: of the model's config.json ("gemma3"); None if unknown.
    """
    whole = [gpu for gpu in chosen if not gpu.mig_enabled]
    found = [
        _too_few(chosen, tensor_parallel_size),
        _mixed(chosen),
        *(_mig(gpu) for gpu in chosen if gpu.mig_enabled),
        *_busy_gpus(whole, gpu_memory_utilization, weights_bytes, tensor_parallel_size),
        _too_small(whole, gpu_memory_utilization, weights_bytes, tensor_parallel_size),
        _no_bf16(chosen, dtype, model_type),
        _no_fp16(dtype, model_type),
    ]
    return tuple(problem for problem in found if problem is not None)


def driver_problem(cuda_version: str | None) -> Problem | None:
    """A warning when the driver is older than the CUDA 13 that vLLM's usual wheels need."""
    if cuda_version is None or int(cuda_version.split(".")[0]) >= 13:
        return None
    return Problem(
        "gpu.driver_old",
        f"the NVIDIA driver runs CUDA {cuda_version} at most; "
        "vLLM's wheels on PyPI are built for CUDA 13.0",
        hint="update the driver to 580 or newer, or install a vLLM built for CUDA 12",
        blocking=False,
    )


def _too_few(chosen: Sequence[Gpu], wanted: int) -> Problem | None:
    if len(chosen) >= wanted:
        return None
    return Problem(
        "gpu.too_few",
        f"--tensor-parallel-size {wanted} wants {wanted} GPUs of one kind; "
        f"found {len(chosen)}: {list_gpus(chosen)}",
        hint=f"say `--tensor-parallel-size {_power_of_two_within(len(chosen))}`, or choose a "
        "smaller model",
    )


def _mixed(chosen: Sequence[Gpu]) -> Problem | None:
    if len({(gpu.name, gpu.compute_capability) for gpu in chosen}) < 2:
        return None
    return Problem(
        "gpu.mixed",
        f"GPUs of different kinds are to share one model: {list_gpus(chosen)}; "
        "the slowest and the smallest sets the pace for all",
        hint="choose GPUs of one kind with `--gpus`",
        blocking=False,
    )


def _mig(gpu: Gpu) -> Problem:
    return Problem(
        "gpu.mig",
        f"GPU {gpu.index} ({gpu.name}) has MIG switched on, so vLLM can't have all of it; "
        "a whole GPU is wanted",
        hint=f"run `sudo nvidia-smi -i {gpu.index} -mig 0` when nobody uses it, or choose "
        "another with `--gpus`",
    )


def _busy_gpus(
    gpus: Sequence[Gpu], utilization: float, weights_bytes: int | None, parallel: int
) -> list[Problem | None]:
    works = min((_workable_utilization(gpu) for gpu in gpus), default=0.0)
    share = math.ceil((weights_bytes or 0) / parallel)
    room = min((requested_bytes(gpu, works) for gpu in gpus), default=0)
    advice = works if works > 0 and room > share else None
    return [_busy(gpu, requested_bytes(gpu, utilization), utilization, advice) for gpu in gpus]


def _busy(gpu: Gpu, requested: int, utilization: float, advice: float | None) -> Problem | None:
    wants = (
        f"GPU {gpu.index} has {_gib(gpu.free_bytes)} of {_gib(gpu.total_bytes)} free, and vLLM "
        f"wants {_gib(requested)} of it (--gpu-memory-utilization {utilization:g})"
    )
    if gpu.free_bytes < requested:
        message = f"{wants}; {_holders(gpu)}"
        return Problem("gpu.busy", message, _way_out(gpu, advice))
    if gpu.free_bytes - CONTEXT_BYTES < requested:
        message = (
            f"{wants}, which leaves less than the {_gib(CONTEXT_BYTES)} that "
            "vLLM may need before it measures"
        )
        hint = f"if it doesn't start, say `--gpu-memory-utilization {advice:g}`" if advice else ""
        return Problem("gpu.tight", message, hint, blocking=False)
    return None


def _workable_utilization(gpu: Gpu) -> float:
    """The largest share, to two decimals, for which this much free memory is enough."""
    if gpu.total_bytes <= 0:
        return 0.0
    # In whole percent: 0.29 * 100 is 28.999999999999996.
    percent = 100 * (gpu.free_bytes - CONTEXT_BYTES) // gpu.total_bytes
    return max(percent, 0) / 100


def _holders(gpu: Gpu) -> str:
    held = [
        f"{p.name} (pid {p.pid}, {'size unknown' if p.used_bytes is None else _gib(p.used_bytes)})"
        for p in sorted(gpu.processes, key=lambda p: (-(p.used_bytes or 0), p.pid))
    ]
    unseen = gpu.used_bytes - sum(p.used_bytes or 0 for p in gpu.processes)
    sizes_known = all(p.used_bytes is not None for p in gpu.processes)
    if sizes_known and unseen > _UNSEEN_BYTES:
        held.append(f"processes that can't be seen from here ({_gib(unseen)})")
    return f"it is held by {' and '.join(held)}" if held else "nobody is seen to hold the rest"


def _way_out(gpu: Gpu, advice: float | None) -> str:
    beside = f"or run beside it with `--gpu-memory-utilization {advice:g}`" if advice else ""
    orphans = [p for p in gpu.processes if p.orphan]
    if orphans:
        pids = " ".join(str(p.pid) for p in orphans)
        first = f"a vLLM engine outlived its server and will never let go: run `kill -9 {pids}`"
    elif any(_is_engine(p) for p in gpu.processes):
        first = "stop the vLLM server that runs there, choose another GPU with `--gpus`"
    elif gpu.processes:
        first = "wait for it or stop it, choose another GPU with `--gpus`"
    else:
        first = "look outside this container with `nvidia-smi`, choose another GPU with `--gpus`"
    return ", ".join(part for part in (first, beside) if part)


def _is_engine(process: GpuProcess) -> bool:
    return process.name.startswith("VLLM::")


def _too_small(
    gpus: Sequence[Gpu], utilization: float, weights_bytes: int | None, parallel: int
) -> Problem | None:
    if weights_bytes is None or not gpus:
        return None
    fit = weights_fit(
        gpus,
        gpu_memory_utilization=utilization,
        weights_bytes=weights_bytes,
        tensor_parallel_size=parallel,
    )
    if fit.fits:
        return None
    # 0.9: weights that fill a card leave no room for the KV cache.
    needed = _power_of_two_above(weights_bytes / (0.9 * fit.requested_bytes))
    return Problem(
        "gpu.too_small",
        f"the weights take {_gib(fit.share_bytes)} per GPU, and vLLM may use "
        f"{_gib(fit.requested_bytes)} of GPU {fit.gpu.index} "
        f"(--gpu-memory-utilization {utilization:g} of {_gib(fit.gpu.total_bytes)})",
        hint=f"split the model over {needed} such GPUs with `--tensor-parallel-size {needed}`, "
        "or choose a smaller or a quantized Gemma",
    )


def _no_bf16(chosen: Sequence[Gpu], dtype: str, model_type: str | None) -> Problem | None:
    old = [gpu for gpu in chosen if not gpu.supports_bf16]
    if not old or dtype not in ("auto", "bfloat16"):
        return None
    major, minor = old[0].compute_capability
    return Problem(
        "gpu.no_bf16",
        f"{name_gpus(old)} ({old[0].name}) has compute capability {major}.{minor}; "
        "bfloat16, in which Gemma is published, wants 8.0 or newer",
        hint=_bf16_advice(model_type),
        blocking=dtype == "bfloat16",
    )


def _bf16_advice(model_type: str | None) -> str:
    if model_type is None:
        return (
            "Gemma 1 runs with `--dtype float16`; later ones want `--dtype float32`, "
            "which takes twice the memory"
        )
    if model_type == "gemma":
        return "say `--dtype float16`, in which Gemma 1 can run"
    why = "vLLM refuses float16 for this model"
    if model_type not in REFUSES_FLOAT16:
        why = "with `auto` vLLM takes float16, in which this model may answer with garbage"
    return f"say `--dtype float32` (twice the memory), or use a newer GPU; {why}"


def _no_fp16(dtype: str, model_type: str | None) -> Problem | None:
    if dtype != "float16" or model_type not in REFUSES_FLOAT16:
        return None
    return Problem(
        "model.no_fp16",
        f"--dtype float16 is refused by vLLM for a `{model_type}`, which is numerically unstable "
        "in it; bfloat16 or float32 is wanted",
        hint="say `--dtype bfloat16`, or `--dtype float32` on a GPU older than compute "
        "capability 8.0",
    )


def _power_of_two_above(ratio: float) -> int:
    return 1 << max(0, math.ceil(math.log2(ratio))) if ratio > 0 else 1


def _power_of_two_within(count: int) -> int:
    return 1 << (count.bit_length() - 1) if count > 0 else 1


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
