"""The catalogue as a table for people and as data for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma_serve.planning.memory.fit import Fit
from gemma_serve.planning.sizes import gib
from gemma_serve.usecases.models import KnownModel, ModelsReport
from gemma_serve.view.fit import count

if TYPE_CHECKING:
    from rich.console import RenderableType


def models_data(report: ModelsReport) -> dict[str, Any]:
    """The `data` of `models --json`; sizes in bytes."""
    return {
        "device": report.hardware.device,
        "engine_version": report.engine_version,
        "gpus": [
            {"index": gpu.index, "name": gpu.name, "total_bytes": gpu.total_bytes}
            for gpu in report.hardware.visible.gpus
        ],
        "models": [_model_data(model) for model in report.models],
    }


def models_table(report: ModelsReport) -> RenderableType:
    """Every model with what it takes, and how it fits."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    for column in ("parameters", "weights", "GPUs", "context", "at once"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for model in report.models:
        table.add_row(*_cells(model))
    fitting = sum(1 for model in report.models if model.fit is not None and model.fit.fits)
    lines = [f"{fitting} of {len(report.models)} fit {_where(report)}."]
    reasons = {reason for model in report.models if (reason := _reason(model))}
    if not fitting and len(reasons) == 1:
        lines.append(f"Why: {reasons.pop()}.")
    return Group(table, Text("\n" + "\n".join(lines)))


def _where(report: ModelsReport) -> str:
    hardware = report.hardware
    if hardware.device == "cpu":
        return "this machine's CPU and memory"
    gpus = hardware.visible.gpus
    return f"{len(gpus)} x {gpus[0].name}" if gpus else "no GPU"


def _fit(model: KnownModel) -> Fit | None:
    return model.fit.decision.fit if model.fit is not None and model.fit.decision else None


def _cells(model: KnownModel) -> tuple[str, ...]:
    entry, fit = model.entry, _fit(model)
    parameters = count(entry.parameters) if entry.parameters else ""
    if fit is None or model.fit is None:
        return (entry.id, parameters, "", "", "", "", "not known")
    weights = gib(fit.weights.total_bytes)
    if not model.fit.fits:
        return (entry.id, parameters, weights, "", "", "", "no")
    settings = fit.settings
    at_once = f"{fit.capacity.max_concurrency:.1f}" if fit.capacity and fit.capacity.tokens else ""
    size = str(settings.tensor_parallel_size)
    return (entry.id, parameters, weights, size, f"{settings.max_model_len:,}", at_once, "yes")


def _reason(model: KnownModel) -> str | None:
    """Why it does not fit, in the words of check-gpu."""
    if model.fit is None or model.fit.fits:
        return None
    return next((problem.message for problem in model.fit.problems if problem.blocking), None)


def _model_data(model: KnownModel) -> dict[str, Any]:
    entry, fit = model.entry, _fit(model)
    data: dict[str, Any] = {
        "id": entry.id,
        "family": entry.family,
        "variant": entry.variant,
        "chat": entry.chat,
        "modalities": list(entry.modalities),
        "parameters": entry.parameters,
        "license": entry.license,
        "gated": entry.gated,
        "quantization": (entry.quantization_config or {}).get("quant_method"),
        "min_vllm": entry.min_vllm,
        "fit": None,
        "reason": None,
        "plan": None,
    }
    if fit is None or model.fit is None:
        return data
    settings = fit.settings
    data["fit"] = "fits" if model.fit.fits else "does_not_fit"
    if not model.fit.fits:
        data["reason"] = _reason(model)
    data["plan"] = {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "weights_bytes": fit.memory.weights_bytes,
        "kv_cache_bytes": fit.memory.kv_cache_bytes,
    }
    if model.fit.fits and fit.capacity is not None:
        data["plan"] |= {
            "tokens": fit.capacity.tokens,
            "max_concurrency": fit.capacity.max_concurrency,
        }
    return data
