"""GPUs for tests, as NVML would report them."""

from __future__ import annotations

from gemma_serve.planning.hardware.gpus import Gpu, GpuProcess

GIB = 2**30
H200 = "NVIDIA H200"
T4 = "Tesla T4"


def make_gpu(
    index: int,
    *,
    name: str = H200,
    total: float = 139.8,
    used: float = 0.0,
    capability: tuple[int, int] = (9, 0),
    uuid: str | None = None,
    mig: bool = False,
    processes: tuple[GpuProcess, ...] = (),
) -> Gpu:
    total_bytes, used_bytes = int(total * GIB), int(used * GIB)
    return Gpu(
        index=index,
        uuid=uuid or f"GPU-{index}a2b3c4d",
        pci_bus_id=f"00000000:{index:02X}:00.0",
        name=name,
        total_bytes=total_bytes,
        used_bytes=used_bytes,
        free_bytes=total_bytes - used_bytes,
        compute_capability=capability,
        mig_enabled=mig,
        processes=processes,
    )


def make_t4(index: int, *, used: float = 0.0) -> Gpu:
    return make_gpu(index, name=T4, total=14.56, used=used, capability=(7, 5))
