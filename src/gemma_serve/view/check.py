"""The one verdict before a start, as a table for people and as data for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma_serve.usecases.check import CheckId, CheckReport, CheckRow, State
from gemma_serve.usecases.plan import ServePlan
from gemma_serve.view.access import access_data, access_summary, disk_summary
from gemma_serve.view.fit import count
from gemma_serve.view.plan import plan_data

if TYPE_CHECKING:
    from rich.console import RenderableType

_STYLES: dict[State, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "warning": ("warn", "yellow"),
    "failed": ("NO", "bold red"),
    "unknown": ("?", "yellow"),
}


def check_data(report: CheckReport) -> dict[str, Any]:
    """The verdict for `--json`: each check, and what access and plan are made of."""
    return {
        "checks": [
            {
                "id": row.id,
                "state": row.state,
                "summary": row_summary(row, report),
                "problems": [problem.code for problem in row.problems],
            }
            for row in report.rows
        ],
        "access": None if report.access is None else access_data(report.access),
        "plan": plan_data(report.plan),
    }


def row_summary(row: CheckRow, report: CheckReport) -> str:
    """What a check found, in a few words: what stands against it, else what there is."""
    blocking = next((problem for problem in row.problems if problem.blocking), None)
    if blocking is not None:
        return blocking.message
    if row.problems and not row.is_known:
        return row.problems[0].message
    return _found(row.id, report) or row.problems[0].message


def _found(name: CheckId, report: CheckReport) -> str:
    plan = report.plan
    if name == "engine":
        built = f"{plan.engine.distribution or 'vLLM'} {plan.engine.version or ''}".strip()
        return f"{built} for {'the CPU' if plan.engine.device == 'cpu' else 'GPUs'}"
    if name == "model":
        return _model_found(plan)
    if name == "access":
        is_folder = plan.model.is_local and plan.model.commit is None
        return (
            "not needed: a folder of this machine"
            if is_folder
            else access_summary(plan.config.model, report.access)
        )
    if name == "disk":
        return disk_summary(report.access)
    if name == "gpu":
        on_cpu = plan.engine.device == "cpu"
        return (
            "not needed: the engine runs on the CPU"
            if on_cpu
            else plan.report.chosen.reason or "none"
        )
    if name == "plan":
        return _plan_found(plan)
    return f"{plan.config.host}:{plan.config.port} is free" if name == "port" else ""


def _model_found(plan: ServePlan) -> str:
    facts = plan.report.fit.facts if plan.report.fit else None
    if facts is None:
        return f"{plan.config.model}: unknown"
    parameters = f", {count(facts.parameters)} parameters" if facts.parameters else ""
    return f"{facts.model}: {facts.architecture or facts.model_type}{parameters}"


def _plan_found(plan: ServePlan) -> str:
    fit = plan.report.fit
    decided = fit.decision.fit if fit and fit.decision else None
    if fit is None or decided is None:
        return "not planned"
    settings = decided.settings
    if not fit.fits:
        return f"does not fit with {settings.max_model_len:,} tokens of context"
    held = f", {decided.capacity.tokens:,} tokens of KV cache" if decided.capacity else ""
    return f"fits: {settings.max_model_len:,} tokens of context{held}"


def check_text(report: CheckReport) -> RenderableType:
    """The verdict for people: a row for each check, and what it comes to."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in report.rows:
        mark, style = _STYLES[row.state]
        table.add_row(Text(mark, style=style), Text(row.id), Text(row_summary(row, report)))
    failed = ", ".join(row.id for row in report.rows if row.state == "failed")
    verdict = "`gemma-serve up` with the same settings can start it"
    if failed:
        verdict = f"`gemma-serve up` would refuse it: {failed}"
    return Group(table, Text(f"\n{verdict}"))
