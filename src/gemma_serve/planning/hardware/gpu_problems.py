"""What stands between the chosen GPUs and a running engine."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gemma_serve.errors import Problem
from gemma_serve.planning.hardware.gpus import Gpu, GpuProcess, list_gpus, name_gpus
from gemma_serve.planning.sizes import gib

# vLLM measures after its CUDA context exists: on an idle H200 it finds 139.29 of 139.8 GiB.
CONTEXT_BYTES = 600 * 2**20

_OLD_GPU = "Gemma 1 runs in float16 there, later ones in float32, which takes twice the memory"

_USUAL_CUDA = "13.0"
# The first driver that runs each major version of CUDA.
_LEAST_DRIVERS = {12: 525, 13: 580}

# Less than this unaccounted for is the driver's and the desktop's own.
_UNSEEN_BYTES = 2**30


def requested_bytes(gpu: Gpu, gpu_memory_utilization: float) -> int:
    """The memory of `gpu` that vLLM will claim, to the byte as vLLM computes it."""
    return math.ceil(gpu.total_bytes * gpu_memory_utilization)


def gpu_problems(
    chosen: Sequence[Gpu],
    *,
    gpu_memory_utilization: float,
    needed_bytes: int | None,
    tensor_parallel_size: int,
    dtype: str,
    engine_dtype: str | None = None,
) -> tuple[Problem, ...]:
    """Every reason why vLLM won't start on `chosen`, and what is worth knowing before it does.

    Args:
        chosen: at least one GPU.
        needed_bytes: what the engine needs on each GPU beside its KV cache; None if unknown.
        dtype: as configured, "auto" included.
        engine_dtype: what "auto" comes to; None if no model is known.
    """
    whole = [gpu for gpu in chosen if not gpu.mig_enabled]
    found = [
        _too_few(chosen, tensor_parallel_size),
        _mixed(chosen),
        *(_mig(gpu) for gpu in chosen if gpu.mig_enabled),
        *_busy_gpus(whole, gpu_memory_utilization, needed_bytes),
        _no_bf16(chosen, dtype, engine_dtype),
    ]
    return tuple(problem for problem in found if problem is not None)


def driver_problem(cuda_version: str | None, built_for: str | None = None) -> Problem | None:
    """Why the driver can't run an engine that is `built_for` a CUDA, both as "13.0".

    Where that isn't known, it is a warning on the CUDA 13 of vLLM's usual wheels. Within a major
    version every driver will do.
    """
    needed = _major(built_for or _USUAL_CUDA)
    if cuda_version is None or _major(cuda_version) >= needed:
        return None
    what = f"the installed vLLM is built for CUDA {built_for}"
    if built_for is None:
        what = f"vLLM's wheels on PyPI are built for CUDA {_USUAL_CUDA}"
    least = _LEAST_DRIVERS.get(needed)
    newer = f"to {least} or newer" if least else "to the newest"
    return Problem(
        "driver-too-old",
        f"the NVIDIA driver runs CUDA {cuda_version} at most; {what}",
        hint=f"update the driver {newer}, or install a vLLM built for CUDA {_major(cuda_version)}",
        blocking=built_for is not None,
    )


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _too_few(chosen: Sequence[Gpu], wanted: int) -> Problem | None:
    if len(chosen) >= wanted:
        return None
    return Problem(
        "tp-too-big",
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
    gpus: Sequence[Gpu], utilization: float, needed_bytes: int | None
) -> list[Problem | None]:
    works = min((_workable_utilization(gpu) for gpu in gpus), default=0.0)
    room = min((requested_bytes(gpu, works) for gpu in gpus), default=0)
    advice = works if works > 0 and room > (needed_bytes or 0) else None
    return [_busy(gpu, requested_bytes(gpu, utilization), utilization, advice) for gpu in gpus]


def _busy(gpu: Gpu, requested: int, utilization: float, advice: float | None) -> Problem | None:
    wants = (
        f"GPU {gpu.index} has {gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free, and vLLM "
        f"wants {gib(requested)} of it (--gpu-memory-utilization {utilization:g})"
    )
    if gpu.free_bytes < requested:
        message = f"{wants}; {_holders(gpu)}"
        return Problem("gpu-busy", message, _way_out(gpu, advice))
    if gpu.free_bytes - CONTEXT_BYTES < requested:
        message = (
            f"{wants}, which leaves less than the {gib(CONTEXT_BYTES)} that "
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
        f"{p.name} (pid {p.pid}, {'size unknown' if p.used_bytes is None else gib(p.used_bytes)})"
        for p in sorted(gpu.processes, key=lambda p: (-(p.used_bytes or 0), p.pid))
    ]
    unseen = gpu.used_bytes - sum(p.used_bytes or 0 for p in gpu.processes)
    sizes_known = all(p.used_bytes is not None for p in gpu.processes)
    if sizes_known and unseen > _UNSEEN_BYTES:
        held.append(f"processes that can't be seen from here ({gib(unseen)})")
    return f"it is held by {' and '.join(held)}" if held else "nobody is seen to hold the rest"


def _way_out(gpu: Gpu, advice: float | None) -> str:
    beside = f"or run beside it with `--gpu-memory-utilization {advice:g}`" if advice else ""
    orphans = [p for p in gpu.processes if p.orphan]
    if orphans:
        pids = " ".join(str(p.pid) for p in orphans)
        first = (
            "a vLLM engine outlived its server and will never let go: `gemma-serve stop --orphans` "
            f"ends it if it is ours, else `kill -9 {pids}` does"
        )
    elif any(_is_engine(p) for p in gpu.processes):
        first = "stop the vLLM server that runs there, choose another GPU with `--gpus`"
    elif gpu.processes:
        first = "wait for it or stop it, choose another GPU with `--gpus`"
    else:
        first = "look outside this container with `nvidia-smi`, choose another GPU with `--gpus`"
    return ", ".join(part for part in (first, beside) if part)


def _is_engine(process: GpuProcess) -> bool:
    return process.name.startswith("VLLM::")


def _no_bf16(chosen: Sequence[Gpu], dtype: str, engine_dtype: str | None) -> Problem | None:
    old = [gpu for gpu in chosen if not gpu.supports_bf16]
    if not old or dtype not in ("auto", "bfloat16"):
        return None
    major, minor = old[0].compute_capability
    hint = "say `--dtype auto`, which takes what the GPU can do"
    if dtype == "auto":
        hint = {
            "float32": "it will be computed in float32, which takes twice the memory; a newer GPU "
            "needs half",
            "float16": "it will be computed in float16, in which this Gemma can run",
        }.get(engine_dtype or "", _OLD_GPU)
    return Problem(
        "bf16-unsupported",
        f"{name_gpus(old)} ({old[0].name}) {'has' if len(old) == 1 else 'have'} compute capability "
        f"{major}.{minor}; "
        "bfloat16, in which Gemma is published, wants 8.0 or newer",
        hint,
        blocking=dtype == "bfloat16",
    )


def _power_of_two_within(count: int) -> int:
    return 1 << (count.bit_length() - 1) if count > 0 else 1
