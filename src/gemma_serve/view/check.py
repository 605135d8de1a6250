"""The one verdict before a start, as a table for people and as data for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma_serve.usecases.check import CheckReport, State
from gemma_serve.view.access import access_data
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
                "summary": row.summary,
                "problems": [problem.code for problem in row.problems],
            }
            for row in report.rows
        ],
        "access": None if report.access is None else access_data(report.access),
        "plan": plan_data(report.plan),
    }


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
        table.add_row(Text(mark, style=style), Text(row.id), Text(row.summary))
    failed = ", ".join(row.id for row in report.rows if row.state == "failed")
    verdict = "`gemma-serve up` with the same settings can start it"
    if failed:
        verdict = f"`gemma-serve up` would refuse it: {failed}"
    return Group(table, Text(f"\n{verdict}"))
