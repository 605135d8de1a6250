"""The GPUs as a table for people and as data for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma_serve.planning.hardware.gpus import Gpu, GpuProcess
from gemma_serve.planning.sizes import gib
from gemma_serve.usecases.check_gpu import GpuReport
from gemma_serve.view.fit import fit_data, fit_text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def gpu_data(report: GpuReport) -> dict[str, Any]:
    """The report for `--json`; sizes in bytes."""
    return {
        "device": report.hardware.device,
        "driver_version": report.hardware.inventory.driver_version,
        "cuda_version": report.hardware.inventory.cuda_version,
        "engine_version": report.fit.engine_version if report.fit else None,
        "gpus": gpus_data(report),
        **fit_data(report.fit, report.argv),
    }


def gpus_data(report: GpuReport) -> list[dict[str, Any]]:
    """Every GPU, and whether it is visible and chosen."""
    visible, chosen = report.hardware.visible.gpus, report.chosen.gpus
    return [
        _one_gpu(gpu, visible=gpu in visible, chosen=gpu in chosen)
        for gpu in report.hardware.inventory.gpus
    ]


def gpu_text(report: GpuReport) -> RenderableType:
    """The report for people: a table and, in plain sentences, what it comes to."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    hardware = report.hardware
    if hardware.for_gpu is not None:
        cards = hardware.for_gpu
        cards_text = f"{cards.count} x {cards.name}" if cards.count > 1 else cards.name
        each = " each" if cards.count > 1 else ""
        parts.append(Text(f"Planned for {cards_text} of {gib(cards.total_bytes)}{each}."))
    elif hardware.device == "cuda" and not hardware.inventory.gpus:
        parts.append(Text("No GPU."))
    elif hardware.device == "cuda":
        driver = hardware.inventory.driver_version or "unknown"
        cuda = hardware.inventory.cuda_version or "unknown"
        lines = [f"Driver {driver}, which runs CUDA up to {cuda}."]
        if report.chosen.gpus:
            lines.append(f"Chosen: {report.chosen.reason}.")
        parts += [_table(report), Text("\n".join(lines))]
    if report.fit is not None and report.fit.facts is not None:
        parts += [Text(), fit_text(report.fit)] if parts else [fit_text(report.fit)]
    return Group(*parts)


def _one_gpu(gpu: Gpu, *, visible: bool, chosen: bool) -> dict[str, Any]:
    return {
        "index": gpu.index,
        "uuid": gpu.uuid or None,  # a card that was only named has neither
        "pci_bus_id": gpu.pci_bus_id or None,
        "name": gpu.name,
        "compute_capability": _capability(gpu),
        "supports_bf16": gpu.supports_bf16,
        "mig_enabled": gpu.mig_enabled,
        "total_bytes": gpu.total_bytes,
        "used_bytes": gpu.used_bytes,
        "free_bytes": gpu.free_bytes,
        "visible": visible,
        "chosen": chosen,
        "processes": [
            {"pid": p.pid, "name": p.name, "used_bytes": p.used_bytes} for p in gpu.processes
        ],
    }


def _table(report: GpuReport) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("GPU", justify="right")
    table.add_column("name")
    for column in ("total", "used", "free", "compute"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("bf16")
    table.add_column("use", no_wrap=True)
    table.add_column("held by")
    for gpu in report.hardware.inventory.gpus:
        sizes = [gib(size) for size in (gpu.total_bytes, gpu.used_bytes, gpu.free_bytes)]
        bf16 = "yes" if gpu.supports_bf16 else "no"
        cells = [str(gpu.index), gpu.name, *sizes, _capability(gpu), bf16, _use(report, gpu)]
        table.add_row(*(Text(cell) for cell in cells), Text(_held_by(gpu)))
    return table


def _use(report: GpuReport, gpu: Gpu) -> str:
    use = "visible" if gpu in report.hardware.visible.gpus else "hidden"
    if gpu in report.chosen.gpus:
        use = "chosen"
    return f"{use}, MIG" if gpu.mig_enabled else use


def _held_by(gpu: Gpu) -> str:
    return "\n".join(_process(process) for process in gpu.processes) or "-"


def _process(process: GpuProcess) -> str:
    size = "size unknown" if process.used_bytes is None else gib(process.used_bytes)
    return f"{process.name} (pid {process.pid}) {size}"


def _capability(gpu: Gpu) -> str:
    major, minor = gpu.compute_capability
    return f"{major}.{minor}"
