"""The machine's GPUs, asked of NVIDIA's own library (NVML); needs neither CUDA nor torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil

from gemma_serve.adapters.vllm_processes import is_orphan
from gemma_serve.errors import Problem
from gemma_serve.planning.hardware.gpus import Gpu, GpuInventory, GpuProcess

UNKNOWN = "unknown"

_NO_GPU_HINT = (
    "without a GPU, plan for the CPU with `--device cpu`, or try `gemma-serve up --model demo`"
)


def read_gpus() -> GpuInventory:
    """Every GPU that NVML reports; whatever goes wrong comes back as problems, never raised.

    A GPU that can't be read doesn't hide the others. Sizes are CUDA's: the driver's own reserve
    is not counted.
    """
    import pynvml

    try:
        with _nvml(pynvml):
            return _read_all(pynvml)
    except pynvml.NVMLError as error:
        return GpuInventory(problem=_explain(pynvml, error))


@contextmanager
def _nvml(pynvml: Any) -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _read_all(pynvml: Any) -> GpuInventory:
    driver = _optional(pynvml, pynvml.nvmlSystemGetDriverVersion)
    cuda = _optional(pynvml, pynvml.nvmlSystemGetCudaDriverVersion_v2)
    gpus: list[Gpu] = []
    broken: list[Problem] = []
    for number in range(pynvml.nvmlDeviceGetCount()):
        try:
            gpus.append(_read_one(pynvml, number))
        except pynvml.NVMLError as error:
            broken.append(_broken(pynvml, number, error))
    problem = None
    if not gpus:
        problem = broken[0] if broken else _none()
    return GpuInventory(
        gpus=_in_pci_order(gpus),
        driver_version=None if driver is None else _text(driver),
        # 13000 is CUDA 13.0, 12080 is 12.8.
        cuda_version=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
        problem=problem,
        problems=tuple(_not_alone(broken)) if gpus else tuple(broken[1:]),
    )


def _read_one(pynvml: Any, number: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(number)
    total, used, free = _memory(pynvml, handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    mig = _optional(pynvml, pynvml.nvmlDeviceGetMigMode, handle)
    return Gpu(
        index=number,
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        pci_bus_id=_text(pynvml.nvmlDeviceGetPciInfo(handle).busId),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        total_bytes=total,
        used_bytes=used,
        free_bytes=free,
        compute_capability=(int(major), int(minor)),
        # [current, pending]: only the current mode says what CUDA will meet.
        mig_enabled=mig is not None and mig[0] == pynvml.NVML_DEVICE_MIG_ENABLE,
        processes=_processes(pynvml, handle),
    )


def _memory(pynvml: Any, handle: Any) -> tuple[int, int, int]:
    """Total, used and free bytes as CUDA counts them."""
    memory = _optional(pynvml, pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
    if memory is not None:
        return int(memory.total - memory.reserved), int(memory.used), int(memory.free)
    memory = _optional(pynvml, pynvml.nvmlDeviceGetMemoryInfo, handle)
    if memory is not None:
        return int(memory.total), int(memory.used), int(memory.free)
    # A GPU that shares the machine's memory has none of its own to report.
    shared = psutil.virtual_memory()
    return int(shared.total), int(shared.total - shared.available), int(shared.available)


def _processes(pynvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    sizes: dict[int, int | None] = {}
    for ask in (
        pynvml.nvmlDeviceGetComputeRunningProcesses,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        for found in _optional(pynvml, ask, handle) or ():
            pid, size = int(found.pid), found.usedGpuMemory
            known = sizes.get(pid)
            # A process that computes and draws is listed twice with the same memory.
            sizes[pid] = known if size is None else max(int(size), known or 0)
    return tuple(_process(pid, size) for pid, size in sorted(sizes.items()))


def _process(pid: int, used_bytes: int | None) -> GpuProcess:
    # In a container the driver may give a pid of the host, which means nothing here.
    try:
        process = psutil.Process(pid)
        name = process.name()
        return GpuProcess(pid, name, used_bytes, orphan=is_orphan(process))
    except psutil.Error:
        return GpuProcess(pid, UNKNOWN, used_bytes)


def _optional(pynvml: Any, ask: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None where this GPU, driver or user can't have one."""
    try:
        return ask(*arguments)
    except pynvml.NVMLError as error:
        if error.value in (
            pynvml.NVML_ERROR_NOT_SUPPORTED,
            pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            pynvml.NVML_ERROR_NO_PERMISSION,
            pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
            pynvml.NVML_ERROR_INVALID_ARGUMENT,
        ):
            return None
        raise


def _in_pci_order(gpus: list[Gpu]) -> tuple[Gpu, ...]:
    """NVML promises no order; `nvidia-smi` and CUDA_DEVICE_ORDER=PCI_BUS_ID count by bus."""
    numbers = sorted(gpu.index for gpu in gpus)
    by_bus = sorted(gpus, key=lambda gpu: gpu.pci_bus_id.upper())
    return tuple(replace(gpu, index=n) for n, gpu in zip(numbers, by_bus, strict=True))


def _explain(pynvml: Any, error: Any) -> Problem:
    """Why NVML as a whole gave nothing."""
    known = {
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: _no_library,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED: _not_loaded,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: _mismatch,
        pynvml.NVML_ERROR_NO_PERMISSION: _no_permission,
    }.get(error.value)
    if known is not None:
        return known()
    return Problem(
        "gpu.nvml",
        f"the NVIDIA driver answers with an error ({error}); a list of GPUs was wanted",
        hint="run `nvidia-smi`, which should show the same error; restarting the machine often "
        "mends it",
    )


def _none() -> Problem:
    return Problem(
        "no-gpu-visible",
        "the NVIDIA driver runs but reports no GPU; at least one is wanted",
        hint=f"in a container, start it with `--gpus all`; {_NO_GPU_HINT}",
    )


def _no_library() -> Problem:
    return Problem(
        "no-gpu-visible",
        "no NVIDIA driver is found (libnvidia-ml.so.1 is missing); vLLM wants one on a GPU",
        hint="install the driver, or start the container with `--gpus all` and NVIDIA's "
        f"container toolkit; {_NO_GPU_HINT}",
    )


def _not_loaded() -> Problem:
    return Problem(
        "no-gpu-visible",
        "the NVIDIA driver is installed but not loaded into the kernel",
        hint="run `sudo modprobe nvidia`; after a kernel update, reinstall the driver and "
        f"reboot; {_NO_GPU_HINT}",
    )


def _mismatch() -> Problem:
    return Problem(
        "gpu.driver_mismatch",
        "the NVIDIA driver was updated while the old one still runs: its library and its kernel "
        "module differ in version and must be the same",
        hint="reboot the machine",
    )


def _no_permission() -> Problem:
    return Problem(
        "gpu.no_permission",
        "this user may not ask the NVIDIA driver; read and write on /dev/nvidia* is wanted",
        hint="run `ls -l /dev/nvidia*` and join the group that owns them (often `video`), or "
        "give the container its devices with `--gpus all`",
    )


def _broken(pynvml: Any, number: int, error: Any) -> Problem:
    if error.value == pynvml.NVML_ERROR_GPU_IS_LOST:
        return Problem(
            "gpu.lost",
            f"GPU {number} has fallen off the bus and can't be used until the machine restarts",
            hint="reboot; if it comes back, look for `Xid` in `sudo dmesg` and have the card, its "
            "power and its cooling checked",
        )
    return Problem(
        "gpu.broken",
        f"GPU {number} can't be read ({error}); its memory and kind were wanted",
        hint=f"run `nvidia-smi -i {number} -q`; `sudo nvidia-smi -i {number} -r` or a reboot may "
        "mend it",
    )


def _not_alone(broken: list[Problem]) -> Iterator[Problem]:
    """With other GPUs at hand, a broken one is worth knowing but decides nothing."""
    for problem in broken:
        yield Problem(problem.code, problem.message, problem.hint, blocking=False)


def _text(value: Any) -> str:
    # Strings inside of NVML's structures come as bytes.
    return value.decode() if isinstance(value, bytes) else str(value)
