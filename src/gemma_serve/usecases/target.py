"""What a plan is for: an engine, and the hardware that it would run on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gemma_serve.adapters import host
from gemma_serve.adapters.gpu import read_gpus
from gemma_serve.adapters.installed_engine import find_engine
from gemma_serve.adapters.package_data import load_gpu_cards
from gemma_serve.errors import GemmaServeError, Problem, UsageError
from gemma_serve.planning.hardware.gpu_cards import ForGpu, parse_for_gpu
from gemma_serve.planning.hardware.gpu_problems import driver_problem
from gemma_serve.planning.hardware.gpus import (
    Gpu,
    GpuInventory,
    VisibleGpus,
    choose_gpus,
    visible_gpus,
)
from gemma_serve.planning.launch import Device, Engine
from gemma_serve.planning.memory.fit import DeviceMemory
from gemma_serve.planning.memory.request import Machine

_VERSION = re.compile(r"v?\d+\.\d+\S*")
_DEMO_KV_CACHE_BYTES = 256 * 2**20
_MOST_CPU_KV_CACHE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class PlanFor:
    """What to plan for, where it isn't the engine and the hardware that are here.

    Raises:
        UsageError: GPUs by name and the CPU were both asked for, or what is no version.
    """

    engine_version: str | None = None
    device: Device | None = None
    for_gpu: str | None = None

    def __post_init__(self) -> None:
        if self.engine_version is not None and not _VERSION.fullmatch(self.engine_version):
            raise UsageError(
                f"--engine-version `{self.engine_version}` is no version of vLLM",
                code="usage",
                hint="give it as vLLM does: `--engine-version 0.32.0`",
            )
        if self.for_gpu is not None and self.device == "cpu":
            raise UsageError(
                f"--for-gpu {self.for_gpu} plans for GPUs, and --device cpu for none",
                code="usage",
                hint="leave one of the two out",
            )

    @property
    def is_elsewhere(self) -> bool:
        """Whether it needn't run here at all."""
        return self.for_gpu is not None or self.device is not None


@dataclass(frozen=True)
class Hardware:
    """What the engine would run on: the GPUs of this machine, others by name, or the CPU.

    `engine_cuda` is the CUDA that the engine is built for, None where that isn't known.
    """

    device: Device
    inventory: GpuInventory = field(default_factory=GpuInventory)
    visible: VisibleGpus = field(default_factory=lambda: VisibleGpus(()))
    for_gpu: ForGpu | None = None
    engine_cuda: str | None = None

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What is wrong with it, whatever is to be run."""
        if self.for_gpu is not None:
            return tuple(_card_note(note) for note in self.for_gpu.notes)
        if self.device == "cpu":
            return ()
        seen = self.inventory
        driver = driver_problem(seen.cuda_version, self.engine_cuda) if seen.gpus else None
        found = (seen.problem, *seen.problems, driver)
        return (*(problem for problem in found if problem is not None), *self.visible.problems)

    def machine(self, wanted: tuple[str, ...] | None) -> Machine | None:
        """What there is to plan with: the `wanted` GPUs, else those of one kind; None for none.

        Raises:
            UsageError: `wanted` doesn't name visible GPUs.
        """
        return _cpu_machine() if self.device == "cpu" else _gpus(self.visible.gpus, wanted)


def find_hardware(
    environ: Mapping[str, str], device: Device, for_gpu: str | None, *, count: int | None = None
) -> Hardware:
    """Look at the GPUs, unless others or the CPU were asked for.

    Cards that are named without a number are as many as are to be used, `count`.

    Raises:
        UsageError: `for_gpu` names no card.
    """
    if for_gpu is not None:
        cards = parse_for_gpu(for_gpu, load_gpu_cards(), count=count or 1)
        return Hardware("cuda", GpuInventory(cards.gpus), VisibleGpus(cards.gpus), cards)
    if device == "cpu":
        return Hardware("cpu")
    inventory = read_gpus()
    visible = visible_gpus(inventory.gpus, environ.get("CUDA_VISIBLE_DEVICES"))
    return Hardware("cuda", inventory, visible)


def find_wanted_engine(
    python: Path | None, environ: Mapping[str, str], plan_for: PlanFor
) -> tuple[Engine, tuple[Problem, ...]]:
    """The engine that is here, or the one that would be wanted and why it is missing.

    Where another is planned for, nothing is missing, and the version is that of the one here
    unless another was asked for.
    """
    missing: tuple[Problem, ...] = ()
    try:
        engine = find_engine(python)
    except GemmaServeError as error:
        here: Device = "cuda" if sees_gpu(environ) else "cpu"
        engine = Engine(python or Path("python"), here, version=None, distribution=None)
        missing = () if plan_for.is_elsewhere else error.problems
    wanted = "cuda" if plan_for.for_gpu is not None else plan_for.device
    if plan_for.engine_version is not None or wanted not in (None, engine.device):
        # Not the one that is installed.
        engine = replace(engine, distribution=None, cuda_version=None, include_dir=None)
    device = wanted or engine.device
    version = plan_for.engine_version or engine.version
    return replace(engine, device=device, version=version), missing


def sees_gpu(environ: Mapping[str, str]) -> bool:
    """Whether CUDA would see any GPU of this machine."""
    gpus = read_gpus().gpus
    return bool(visible_gpus(gpus, environ.get("CUDA_VISIBLE_DEVICES")).gpus)


def cpu_defaults(environ: Mapping[str, str], *, is_demo: bool) -> dict[str, tuple[object, str]]:
    """What to set for an engine on the CPU where nothing was said, each with its reason."""
    defaults: dict[str, tuple[object, str]] = {}
    if "VLLM_CPU_KVCACHE_SPACE" not in environ:
        size = cpu_kv_cache_bytes(host.available_memory_bytes(), is_demo=is_demo)
        defaults["kv_cache_memory_bytes"] = (size, "out of this machine's free memory")
    defaults["enforce_eager"] = (True, "compiling does not pay on a CPU")
    return defaults


def cpu_kv_cache_bytes(available_bytes: int, *, is_demo: bool) -> int:
    """Main memory for the KV cache: a quarter of what is free, 4 GiB at most, in whole 64 MiB.

    vLLM's own default is a share of all memory, and it refuses to start where that isn't free.
    """
    most = _DEMO_KV_CACHE_BYTES if is_demo else _MOST_CPU_KV_CACHE_BYTES
    step = 64 * 2**20
    return max(step, min(most, available_bytes // 4) // step * step)


def _card_note(note: str) -> Problem:
    return Problem("gpu.card_assumed", note.rstrip("."), blocking=False)


def _gpus(visible: Sequence[Gpu], wanted: tuple[str, ...] | None) -> Machine | None:
    if not visible:
        return None
    if wanted is not None:
        named = choose_gpus(visible, wanted=wanted, count=len(wanted)).gpus
        return Machine(len(named), lambda n: _tightest(named[:n]))
    kinds = Counter((gpu.name, gpu.compute_capability) for gpu in visible if not gpu.mig_enabled)
    most = max(kinds.values(), default=1)
    return Machine(most, lambda n: _tightest(choose_gpus(visible, count=n).gpus))


def _cpu_machine() -> Machine:
    memory = DeviceMemory("cpu", "CPU", host.total_memory_bytes(), host.available_memory_bytes())
    return Machine(1, lambda _: memory)


def _tightest(gpus: Sequence[Gpu]) -> DeviceMemory:
    """The smallest of the GPUs, since vLLM takes the same of each."""
    gpu = min(gpus, key=lambda gpu: (gpu.total_bytes, gpu.index))
    oldest = min(gpu.compute_capability for gpu in gpus)
    return DeviceMemory("cuda", gpu.name, gpu.total_bytes, gpu.free_bytes, oldest)
