"""What a GPU is to us, which ones CUDA will see, and which of them to use."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from gemma_serve.errors import Problem, UsageError

_MOST_LISTED = 8
# How CUDA's names for GPUs and their slices begin, where they are no numbers.
_UUIDS = ("GPU-", "MIG-")


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory of a GPU; `used_bytes` is None where the driver won't say.

    `orphan` marks a vLLM engine whose server is gone: nothing will ever end it.
    """

    pid: int
    name: str
    used_bytes: int | None
    orphan: bool = False


@dataclass(frozen=True)
class Gpu:
    """One physical GPU as NVML reports it. `index` counts in PCI order, as `nvidia-smi` does.

    `total_bytes` is what CUDA can give out, so a little less than what `nvidia-smi` prints: the
    driver's own reserve is left out, as vLLM does.
    """

    index: int
    uuid: str
    pci_bus_id: str
    name: str
    total_bytes: int
    used_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]
    mig_enabled: bool = False
    processes: tuple[GpuProcess, ...] = ()

    @property
    def supports_bf16(self) -> bool:
        """Whether vLLM runs bfloat16 on it: compute capability 8.0 or newer."""
        return self.compute_capability >= (8, 0)


@dataclass(frozen=True)
class GpuInventory:
    """Every GPU of the machine, or the `problem` that kept us from seeing any.

    `cuda_version` is the newest CUDA that the driver runs, as "13.0". `problems` tell of single
    GPUs that could not be read while others could.
    """

    gpus: tuple[Gpu, ...] = ()
    driver_version: str | None = None
    cuda_version: str | None = None
    problem: Problem | None = None
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class VisibleGpus:
    """The GPUs that CUDA will see, in its order, and what was odd about the choice."""

    gpus: tuple[Gpu, ...]
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Chosen:
    """The GPUs to use, in rank order, and a sentence that says why these."""

    gpus: tuple[Gpu, ...]
    reason: str


def visible_gpus(gpus: Sequence[Gpu], cuda_visible_devices: str | None) -> VisibleGpus:
    """The GPUs that CUDA will see when `CUDA_VISIBLE_DEVICES` is as given; None is "not set".

    As CUDA does it: numbers or UUIDs (a beginning will do), read up to the first one that names
    no GPU; a GPU named twice hides all of them. Numbers are taken in PCI order.
    """
    if cuda_visible_devices is None or not gpus:
        return VisibleGpus(tuple(gpus))
    entries = [entry.strip() for entry in cuda_visible_devices.split(",")]
    if entries[0] in ("", "-1"):
        return VisibleGpus((), (_hidden(cuda_visible_devices, gpus),))
    by_uuid = entries[0].startswith("GPU-")
    seen: list[Gpu] = []
    for entry in entries:
        found = _named_by(entry, gpus, by_uuid=by_uuid)
        if len(found) != 1:
            problem = _stopped_at(entry, cuda_visible_devices, gpus, seen, found)
            return VisibleGpus(tuple(seen), (problem,))
        if found[0] in seen:
            return VisibleGpus((), (_twice(cuda_visible_devices, found[0]),))
        seen.append(found[0])
    return VisibleGpus(tuple(seen))


def choose_gpus(
    visible: Sequence[Gpu], *, wanted: tuple[str, ...] | None = None, count: int = 1
) -> Chosen:
    """Pick `count` of the `visible` GPUs: the `wanted` ones, else the freest of one kind.

    Args:
        wanted: numbers as `nvidia-smi` shows them, or UUIDs (a beginning will do).
        count: vLLM's tensor_parallel_size. Where there are too few, the result holds fewer.

    Raises:
        UsageError: `wanted` names a GPU that isn't visible, or one twice, or not `count` of them.
    """
    if not visible:
        return Chosen((), "CUDA sees no GPU")
    if wanted is not None:
        return _choose_wanted(visible, wanted, count)
    usable = [gpu for gpu in visible if not gpu.mig_enabled]
    if not usable:
        only = tuple(visible)[:count]
        return Chosen(only, f"{name_gpus(only)} for want of one without MIG")
    kinds: dict[tuple[str, tuple[int, int]], list[Gpu]] = defaultdict(list)
    for gpu in usable:
        kinds[gpu.name, gpu.compute_capability].append(gpu)
    sets = [_freest(kind, count) for kind in kinds.values()]
    # The tightest card of a set decides, since vLLM takes the same share of each.
    best = min(sets, key=lambda s: (-len(s), -s[-1].free_bytes, s[0].index))
    return Chosen(tuple(sorted(best, key=lambda gpu: gpu.index)), _why(best, usable, count))


def cuda_environment(gpus: Sequence[Gpu]) -> dict[str, str]:
    """The variables that show the engine exactly `gpus`, in this order.

    Numbers, since vLLM fails on UUIDs; and PCI order, since CUDA otherwise counts the fastest
    card first.
    """
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(str(gpu.index) for gpu in gpus),
    }


def name_gpus(gpus: Sequence[Gpu]) -> str:
    """Names for a sentence: "GPU 3", "GPUs 0 and 2", "GPUs 0, 1 and 2"."""
    numbers = [str(gpu.index) for gpu in gpus]
    if len(numbers) == 1:
        return f"GPU {numbers[0]}"
    return f"GPUs {', '.join(numbers[:-1])} and {numbers[-1]}"


def list_gpus(gpus: Sequence[Gpu]) -> str:
    """A list for a sentence: "0 (NVIDIA H200), 1 (Tesla T4)"; many of one kind are counted."""
    names = {gpu.name for gpu in gpus}
    if len(gpus) > _MOST_LISTED and len(names) == 1:
        return f"{len(gpus)} x {names.pop()}"
    return ", ".join(f"{gpu.index} ({gpu.name})" for gpu in gpus)


def _named_by(entry: str, gpus: Sequence[Gpu], *, by_uuid: bool) -> list[Gpu]:
    if by_uuid:
        return [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
    # CUDA reads numbers as C's strtoul does: "1gpu" is 1.
    number = re.match(r"[+-]?\d+", entry)
    return [gpu for gpu in gpus if number and gpu.index == int(number[0])]


def _hidden(value: str, gpus: Sequence[Gpu]) -> Problem:
    return Problem(
        "no-gpu-visible",
        f'CUDA_VISIBLE_DEVICES="{value}" hides {name_gpus(gpus)} from CUDA; '
        "at least one visible GPU is wanted",
        hint="run `unset CUDA_VISIBLE_DEVICES`, or name the GPUs to use: "
        f"`export CUDA_VISIBLE_DEVICES={gpus[0].index}`",
    )


def _stopped_at(
    entry: str, value: str, gpus: Sequence[Gpu], seen: Sequence[Gpu], found: Sequence[Gpu]
) -> Problem:
    rest = f"so CUDA sees only {name_gpus(seen)}" if seen else "so CUDA sees no GPU"
    choices = ",".join(str(gpu.index) for gpu in gpus)
    hint = f"give numbers among {choices}: `export CUDA_VISIBLE_DEVICES={gpus[0].index}`"
    code = "gpu.visible_unknown" if seen else "no-gpu-visible"
    what = f'"{entry}" names no GPU of this machine, which has {list_gpus(gpus)}'
    if entry.startswith(_UUIDS):
        # vLLM reads them as numbers, and fails.
        code = "visible-devices"
    if entry.startswith("MIG-"):
        what = f'"{entry}" is a MIG slice, and vLLM takes whole GPUs by number only'
        hint = f"switch MIG off (`sudo nvidia-smi -mig 0`) and {hint}"
    elif found:
        what = f'"{entry}" is the beginning of more than one UUID ({name_gpus(found)})'
    message = f'in CUDA_VISIBLE_DEVICES="{value}", {what}, {rest}'
    return Problem(code, message, hint, blocking=not seen)


def _twice(value: str, gpu: Gpu) -> Problem:
    return Problem(
        "no-gpu-visible",
        f'CUDA_VISIBLE_DEVICES="{value}" names GPU {gpu.index} twice, for which CUDA hides every '
        "GPU; each may be named once",
        hint="name each GPU once, or run `unset CUDA_VISIBLE_DEVICES`",
    )


def _choose_wanted(visible: Sequence[Gpu], wanted: tuple[str, ...], count: int) -> Chosen:
    chosen: list[Gpu] = []
    for name in wanted:
        by_uuid = name.startswith("GPU-")
        exact = by_uuid or name.isdecimal()
        found = _named_by(name, visible, by_uuid=by_uuid) if exact else []
        if len(found) != 1:
            raise UsageError(
                f"--gpus names `{name}`, but the GPUs to choose from are {list_gpus(visible)}",
                code="gpu.not_visible",
                hint=f"give numbers as nvidia-smi shows them: `--gpus {visible[0].index}`; "
                "CUDA_VISIBLE_DEVICES limits the choice",
            )
        if found[0] in chosen:
            raise UsageError(
                f"--gpus {','.join(wanted)} names GPU {found[0].index} twice; "
                "each may be named once",
                code="gpu.named_twice",
                hint="leave one out",
            )
        chosen.append(found[0])
    if len(chosen) != count:
        raise UsageError(
            f"--gpus {','.join(wanted)} names {len(chosen)} "
            f"GPU{'s' if len(chosen) > 1 else ''}, but --tensor-parallel-size wants {count}",
            code="gpu.count",
            hint=f"say `--tensor-parallel-size {len(chosen)}`, or give {count} with --gpus",
        )
    return Chosen(tuple(chosen), f"{name_gpus(chosen)} asked for with --gpus")


def _freest(kind: Sequence[Gpu], count: int) -> list[Gpu]:
    return sorted(kind, key=lambda gpu: (-gpu.free_bytes, gpu.index))[:count]


def _why(best: Sequence[Gpu], usable: Sequence[Gpu], count: int) -> str:
    tightest = best[-1]
    free = f"{tightest.free_bytes / 2**30:.1f} of {tightest.total_bytes / 2**30:.1f} GiB"
    names = name_gpus(sorted(best, key=lambda gpu: gpu.index))
    if len(best) < count:
        return f"{names} is all there is of one kind, of {count} wanted: {free} free"
    if len(usable) == 1:
        return f"{names} is the only one that can be used: {free} free"
    if count == 1:
        return f"{names} has the most free memory: {free}"
    return f"{names} have the most free memory among cards of one kind: {free} or more each"
