"""The planner's verdict: the budget of each GPU as a bar, and the plan as data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gemma_serve.planning.memory.alternatives import Alternative
from gemma_serve.planning.memory.fit import Fit, MemoryBudget
from gemma_serve.planning.model.facts import ModelFacts, Source
from gemma_serve.planning.model.weights import ModelWeights
from gemma_serve.planning.sizes import gib
from gemma_serve.usecases.fit import FitReport

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

SOURCES: dict[Source, str] = {
    "folder": "the folder's files",
    "cache": "the files in the local cache",
    "hub": "the Hub",
    "catalogue": "gemma-serve's own catalogue",
}

_BAR_WIDTH = 60
# Parts of the bar: their names, marks for a terminal without colours, and colours.
_PARTS = (
    ("weights", "█", "blue"),
    ("runtime", "▓", "magenta"),
    ("activations", "▒", "yellow"),
    ("KV cache", "░", "green"),
    ("free", "·", "bright_black"),
)


def fit_data(report: FitReport | None, argv: Sequence[str] | None) -> dict[str, Any]:
    """The verdict for `--json`; sizes in bytes, of one GPU where there are several."""
    if report is None:
        return {"fit": None, "facts_source": None, "model": None, "plan": None, "alternatives": []}
    fit = report.decision.fit if report.decision else None
    verdict = None if fit is None else "fits" if report.fits else "does_not_fit"
    return {
        "fit": verdict,
        "facts_source": report.facts.source if report.facts else None,
        "model": None if report.facts is None else _model_data(report.facts),
        "plan": None if fit is None else _plan_data(fit, report, argv),
        "alternatives": [_alternative_data(one) for one in report.alternatives],
    }


def fit_text(report: FitReport, *, reasons: bool = True) -> RenderableType:
    """The verdict for people: the budget as a bar, and what it comes to, with the `reasons`."""
    from rich.console import Group
    from rich.text import Text

    facts, decision = report.facts, report.decision
    if facts is None:
        return Text("")
    lines = [_model_line(facts)]
    if decision is None or decision.fit is None:
        return Group(Text("\n".join(lines)), *_alternatives(report))
    fit = decision.fit
    body = [Text("\n".join(lines)), Text(), _bar(fit.memory), _legend(fit.memory)]
    return Group(
        *body,
        Text("\n" + "\n".join(_sentences(report, fit, reasons=reasons))),
        *_alternatives(report),
    )


def _model_data(facts: ModelFacts) -> dict[str, Any]:
    geometry, entry = facts.geometry, facts.entry
    return {
        "id": facts.model,
        "architecture": facts.architecture,
        "model_type": facts.model_type,
        "parameters": facts.parameters,
        "dtype": facts.dtype,
        "quantization": facts.quantization,
        "weights_stored_bytes": facts.weights_bytes,
        "max_model_len": geometry.max_model_len if geometry else None,
        "num_layers": len(geometry.layers) if geometry else None,
        "modalities": ["text", *dict.fromkeys(tower.modality for tower in geometry.towers)]
        if geometry
        else None,
        "in_catalogue": entry is not None,
        "gated": entry.gated if entry else None,
        "license": entry.license if entry else None,
        "system_role": entry.system_role if entry else None,
        "chat": entry.chat if entry else None,
        "min_vllm": entry.min_vllm if entry else None,
        "tool_call_parser": entry.tool_call_parser if entry else None,
        "reasoning_parser": entry.reasoning_parser if entry else None,
    }


def _plan_data(fit: Fit, report: FitReport, argv: Sequence[str] | None) -> dict[str, Any]:
    settings = fit.settings
    return {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "dtype": settings.dtype,
        "quantization": settings.quantization,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        **dict.fromkeys(report.decision.left_open if report.decision else ()),
        "attention_backends": list(fit.attention.backends) if fit.attention else None,
        "planned_vllm_version": report.planned_version,
        "reasons": dict(report.decision.reasons) if report.decision else {},
        "argv": None if argv is None else list(argv),
        "memory": _memory_data(fit),
        "kv_cache": _kv_cache_data(fit, fits=report.fits),
    }


def _memory_data(fit: Fit) -> dict[str, Any]:
    memory = fit.memory
    return {
        "total_bytes": memory.total_bytes,
        "requested_bytes": memory.requested_bytes,
        "weights_bytes": memory.weights_bytes,
        "runtime_bytes": memory.runtime_bytes,
        "activation_bytes": memory.activation_bytes,
        "kv_cache_bytes": memory.kv_cache_bytes,
        "unused_bytes": memory.unused_bytes,
        "margin_bytes": memory.margin_bytes,
        "weights": _weights_data(fit.weights),
        "parts": _parts_data(fit),
    }


def _weights_data(weights: ModelWeights) -> dict[str, Any]:
    return {
        "text_bytes": weights.text_bytes,
        "embeddings_bytes": weights.embeddings_bytes,
        "rope_bytes": weights.rope_bytes,
        "towers_bytes": weights.towers_bytes,
        "buffers_bytes": weights.buffers_bytes,
        "staging_bytes": weights.staging_bytes,
        "approximate": weights.approximate,
    }


def _parts_data(fit: Fit) -> list[dict[str, Any]]:
    """Each use of memory beside weights and KV cache, and whether vLLM counts it."""
    if fit.runtime is None:
        return []
    runtime = fit.runtime
    places = (
        ("runtime", runtime.runtime),
        ("activation", (runtime.activation,)),
        ("outside", runtime.outside),
        ("after_sizing", runtime.after_sizing),
    )
    return [
        {
            "name": part.name,
            "counted_as": place,
            "bytes": part.bytes,
            "margin_bytes": part.margin_bytes,
            "explanation": part.explanation,
        }
        for place, parts in places
        for part in parts
    ]


def _kv_cache_data(fit: Fit, *, fits: bool) -> dict[str, Any]:
    """The cache; what it holds is only said where the engine would start."""
    layout, capacity = fit.kv_cache, fit.capacity
    if layout is None or capacity is None:
        return {}
    data: dict[str, Any] = {
        "block_size": layout.block_size,
        "num_blocks": capacity.num_blocks,
        "bytes_per_token": layout.bytes_per_token,
        "bytes_per_sequence": layout.bytes_per_sequence,
        "bytes_per_block": layout.pool_bytes_per_block,
        "groups": [
            {"kind": g.kind, "layers": g.layers, "block_size": g.block_size, "window": g.window}
            for g in layout.groups
        ],
    }
    if fits:
        data |= {"tokens": capacity.tokens, "max_concurrency": capacity.max_concurrency}
    return data


def _alternative_data(one: Alternative) -> dict[str, Any]:
    fit = one.decision.fit
    data: dict[str, Any] = {
        "kind": one.kind,
        "flags": one.flags,
        "settings": dict(one.settings),
        "gpu": one.gpu or None,
        "model": one.model or None,
        "changes_answers": one.costs_answers,
    }
    if fit is not None:
        data |= {
            "tensor_parallel_size": fit.settings.tensor_parallel_size,
            "max_model_len": fit.settings.max_model_len,
            **dict.fromkeys(one.decision.left_open & {"max_model_len"}),
            "tokens": fit.capacity.tokens if fit.capacity else None,
            "max_concurrency": fit.capacity.max_concurrency if fit.capacity else None,
        }
    return data


def _model_line(facts: ModelFacts) -> str:
    parameters = f", {count(facts.parameters)} parameters" if facts.parameters else ""
    kind = facts.architecture or facts.model_type or "of unknown architecture"
    quantized = f", {facts.quantization}" if facts.quantization else ""
    return f"{facts.model}: {kind}{parameters}{quantized} (by {SOURCES[facts.source]})"


def count(number: int) -> str:
    """A count for people: 8537680896 is "8.5 B"."""
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _shares(memory: MemoryBudget) -> list[int]:
    return [
        memory.weights_bytes,
        memory.runtime_bytes,
        memory.activation_bytes,
        memory.kv_cache_bytes,
        memory.unused_bytes,
    ]


def _bar(memory: MemoryBudget) -> Text:
    """The budget of one GPU, each part as wide as it is large."""
    from rich.text import Text

    bar = Text()
    for width, (_, mark, style) in zip(_widths(_shares(memory)), _PARTS, strict=True):
        bar.append(mark * width, style=style)
    if memory.used_bytes > memory.requested_bytes:
        bar.append(f"  {gib(memory.used_bytes - memory.requested_bytes)} too much", style="red")
    return bar


def _widths(sizes: Sequence[int]) -> list[int]:
    """Cells of the bar in proportion, at least one for whatever there is; the largest gives way."""
    whole = sum(sizes)
    widths = [max(1, round(_BAR_WIDTH * size / whole)) if size > 0 else 0 for size in sizes]
    widths[widths.index(max(widths))] += _BAR_WIDTH - sum(widths)
    return widths


def _legend(memory: MemoryBudget) -> Text:
    from rich.text import Text

    legend = Text()
    for size, (name, mark, style) in zip(_shares(memory), _PARTS, strict=True):
        legend.append(mark, style=style)
        legend.append(f" {name} {gib(size)}   ")
    legend.rstrip()
    return legend


def _sentences(report: FitReport, fit: Fit, *, reasons: bool) -> list[str]:
    settings, memory = fit.settings, fit.memory
    lines = [_requested(fit)]
    if report.fits and fit.kv_cache is not None and fit.capacity is not None:
        if fit.kv_cache.groups:
            at_once = f"{fit.capacity.max_concurrency:.2f} requests of {settings.max_model_len:,}"
            lines.append(f"KV cache: {fit.capacity.tokens:,} tokens: {at_once} tokens at once.")
        else:
            lines.append("It keeps no KV cache.")
    if reasons:
        lines += [f"{name} {getattr(settings, name)}: {why}." for name, why in _reasons(report)]
    if memory.margin_bytes and not settings.fixes_kv_cache:
        lines.append(f"The estimates may be off by {gib(memory.margin_bytes)}.")
    return lines


def _requested(fit: Fit) -> str:
    memory, settings = fit.memory, fit.settings
    device = "rank" if fit.attention and fit.attention.device == "cpu" else "GPU"
    each = f"on each {device} " if settings.tensor_parallel_size > 1 else ""
    if settings.fixes_kv_cache:
        return (
            f"vLLM takes {gib(memory.used_bytes)} {each}of {gib(memory.total_bytes)}, "
            f"{gib(memory.kv_cache_bytes)} of it for the KV cache."
        )
    return (
        f"vLLM may use {gib(memory.requested_bytes)} {each}of {gib(memory.total_bytes)} "
        f"(gpu_memory_utilization {settings.gpu_memory_utilization:g})."
    )


def _reasons(report: FitReport) -> Sequence[tuple[str, str]]:
    return tuple(report.decision.reasons.items()) if report.decision else ()


def _alternatives(report: FitReport) -> list[RenderableType]:
    """What else would fit, or hold more, as a table."""
    from rich.table import Table
    from rich.text import Text

    if not report.alternatives:
        return []
    table = Table(box=None, pad_edge=False, header_style="bold")
    title = "to hold more" if report.fits else "what would fit"
    table.add_column(title, overflow="fold")
    for column in ("GPUs", "context", "at once"):
        table.add_column(column, justify="right")
    table.add_column("")
    for one in report.alternatives:
        table.add_row(*_alternative_cells(one))
    return [Text(), table]


def _alternative_cells(one: Alternative) -> tuple[str, ...]:
    fit = one.decision.fit
    note = "changes the answers a little" if one.costs_answers else ""
    if "enforce_eager" in one.settings:
        note = "answers slower"
    if fit is None:
        return (one.flags, "", "", "", note)
    at_once = f"{fit.capacity.max_concurrency:.1f}" if fit.capacity else ""
    size = fit.settings.tensor_parallel_size
    return (one.flags, str(size), f"{fit.settings.max_model_len:,}", at_once, note)
