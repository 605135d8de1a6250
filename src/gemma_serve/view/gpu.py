"""The GPUs as a table for people and as data for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma_serve.planning.checkpoint import Source
from gemma_serve.planning.gpus import Gpu, GpuProcess
from gemma_serve.usecases.check_gpu import GpuReport
from gemma_serve.view.output import gib

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_SOURCES: dict[Source, str] = {
    "folder": "by the folder's files",
    "cache": "by the files in the local cache",
    "hub": "by the Hub's list of files",
    "catalogue": "by gemma-serve's own catalogue",
}


def gpu_data(report: GpuReport) -> dict[str, Any]:
    """The report for `--json`; sizes in bytes."""
    visible = {gpu.uuid for gpu in report.visible.gpus}
    chosen = {gpu.uuid for gpu in report.chosen.gpus}
    return {
        "driver_version": report.inventory.driver_version,
        "cuda_version": report.inventory.cuda_version,
        "gpus": [
            _one_gpu(gpu, visible=gpu.uuid in visible, chosen=gpu.uuid in chosen)
            for gpu in report.inventory.gpus
        ],
        "model": _model_data(report),
    }


def gpu_text(report: GpuReport) -> RenderableType:
    """The report for people: a table and, in plain sentences, what it comes to."""
    from rich.console import Group
    from rich.text import Text

    if not report.inventory.gpus:
        return Text("No GPU.")
    driver = report.inventory.driver_version or "unknown"
    cuda = report.inventory.cuda_version or "unknown"
    lines = [f"Driver {driver}, which runs CUDA up to {cuda}."]
    if report.chosen.gpus:
        lines.append(f"Chosen: {report.chosen.reason}.")
    lines += weights_sentences(report)
    return Group(_table(report), Text("\n".join(lines)))


def weights_sentences(report: GpuReport) -> list[str]:
    """The weights, where their size came from, and the memory that vLLM may use; maybe nothing."""
    checkpoint, weights = report.checkpoint, report.weights
    if checkpoint is None or weights is None:
        return []
    about = "about " if checkpoint.approximate else ""
    each = "" if weights.share_bytes == weights.loaded_bytes else " on each GPU"
    left = gib(weights.requested_bytes - weights.share_bytes)
    answer = f"they fit and leave {left} for all else" if weights.fits else "they do not fit"
    return [
        f"The weights of {checkpoint.model} take {about}{gib(weights.share_bytes)}{each} "
        f"({_SOURCES[checkpoint.source]}).",
        f"vLLM may use {gib(weights.requested_bytes)} of GPU {weights.gpu.index}: {answer}.",
    ]


def _one_gpu(gpu: Gpu, *, visible: bool, chosen: bool) -> dict[str, Any]:
    return {
        "index": gpu.index,
        "uuid": gpu.uuid,
        "pci_bus_id": gpu.pci_bus_id,
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


def _model_data(report: GpuReport) -> dict[str, Any] | None:
    checkpoint, weights = report.checkpoint, report.weights
    if checkpoint is None:
        return None
    return {
        "id": checkpoint.model,
        "weights_bytes": weights.loaded_bytes if weights else checkpoint.weights_bytes,
        "source": checkpoint.source,
        "fits": weights.fits if weights else None,
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
    for gpu in report.inventory.gpus:
        sizes = [gib(size) for size in (gpu.total_bytes, gpu.used_bytes, gpu.free_bytes)]
        bf16 = "yes" if gpu.supports_bf16 else "no"
        cells = [str(gpu.index), gpu.name, *sizes, _capability(gpu), bf16, _use(report, gpu)]
        table.add_row(*(Text(cell) for cell in cells), Text(_held_by(gpu)))
    return table


def _use(report: GpuReport, gpu: Gpu) -> str:
    use = "visible" if gpu in report.visible.gpus else "hidden"
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
