"""The smoke test as people and programs read it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from gemma_serve.errors import Problem
from gemma_serve.planning.smoke.promises import PROMISES
from gemma_serve.planning.smoke.report import CheckResult, SmokeReport
from gemma_serve.view.smoke_words import Figures, exchanges, one_line, seen

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.text import Text

# The word, not its colour, is the verdict.
MARKS = {"passed": ("pass", "bold green"), "failed": ("FAIL", "bold red"), "skipped": ("skip", "")}
ID_WIDTH = max(map(len, PROMISES))
_INDENT = 6
# Answers to several questions get a line each, which fits on a terminal of 100 columns.
_LINE = 90
# Of all else that a server says, this much.
_LONGEST = 400
# What these say tells a person most about a model; the other answers are in the reports.
_WITH_ANSWERS = ("completion", "chat", "chat-multi-turn", "chat-system", "together")


def smoke_data(report: SmokeReport) -> dict[str, Any]:
    """The report for programs; its keys are pinned by a test."""
    return {
        "url": report.url,
        "model": report.model,
        "started_at": started_at(report).isoformat(timespec="seconds"),
        "duration_s": report.duration_s,
        "engine_version": report.engine_version,
        "checks": [check_data(check) for check in report.checks],
    }


def check_data(check: CheckResult) -> dict[str, Any]:
    """One check for programs."""
    return {
        "id": check.id,
        "promise": check.promise,
        "status": check.status,
        "reason": check.reason,
        "figures": dict(check.figures),
        "hint": check.hint,
        "duration_s": check.duration_s,
    }


def started_at(report: SmokeReport) -> datetime:
    """When the run began, in UTC."""
    return datetime.fromtimestamp(report.started_at, UTC)


def smoke_problems(report: SmokeReport) -> tuple[Problem, ...]:
    """A problem for every broken promise, with code `smoke.<id of the check>`."""
    return tuple(
        Problem(f"smoke.{check.id}", f"{check.promise}: {check.reason}", check.hint)
        for check in report.checks
        if check.status == "failed"
    )


def smoke_title(url: str, model: str | None) -> Text:
    """What is tested; the model may not be known yet."""
    from rich.text import Text

    return Text.assemble("smoke test of ", (model or "the first model", "bold"), f" at {url}\n")


def check_view(check: CheckResult) -> RenderableType:
    """One check: its mark, its figures, and underneath what was asked and answered."""
    from rich.console import Group
    from rich.text import Text

    mark, style = MARKS[check.status]
    head = Text.assemble((mark, style), f"  {check.id:<{ID_WIDTH}}  ", (summary(check), "dim"))
    head.rstrip()
    return Group(head, *indented(below(check)))


def indented(lines: Iterable[str]) -> list[RenderableType]:
    """Each of `lines`, wrapped and set in under its check."""
    return [_Indented(line) for line in lines]


class _Indented:
    """Wrapped text, indented. Rich's own padding would fill its lines up with spaces."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        for line in Text(self._text).wrap(console, max(20, options.max_width - _INDENT)):
            line.rstrip()
            yield Text(" " * _INDENT).append_text(line)


def verdict_line(report: SmokeReport) -> Text:
    """The last line: how many checks passed, failed and were skipped, and what that means."""
    from rich.text import Text

    style = "bold green" if report.ok else "bold red"
    return Text.assemble("\n", (verdict(report), style), f": {counts(report)}")


def verdict(report: SmokeReport) -> str:
    """The verdict as a sentence; where nothing was shown, it is neither good nor bad."""
    if report.ok:
        return "the endpoint keeps its promises"
    if any(check.status == "failed" for check in report.checks):
        return "the endpoint breaks its promises"
    return "no promise of the endpoint was tried"


def counts(report: SmokeReport) -> str:
    """How many checks passed, failed and were skipped: "26 passed, 1 skipped"."""
    statuses = [check.status for check in report.checks]
    found = (f"{statuses.count(status)} {status}" for status in MARKS if status in statuses)
    return ", ".join(found) or "0 checks"


def summary(check: CheckResult) -> str:
    """The figures in a few words; of a check that was not tried, why."""
    text = check.reason if check.status == "skipped" else " · ".join(seen(check))
    return one_line(text, _LONGEST)


def below(check: CheckResult) -> list[str]:
    """What a person wants to read under a check, a line each: answers, reason, hint."""
    failed = check.status == "failed"
    lines = _exchange(check.figures) if failed or check.id in _WITH_ANSWERS else []
    if failed:
        lines.append(one_line(check.reason, _LONGEST))
    if check.hint and check.status != "passed":
        lines.append(f"hint: {one_line(check.hint, _LONGEST)}")
    return lines


def _exchange(figures: Figures) -> list[str]:
    """What was asked and answered; of several at a time, a line each."""
    if several := exchanges(figures):
        return [one_line(f"{one.get('prompt')} → {one.get('answer')}", _LINE) for one in several]
    if figures.get("answer") is None:
        return []
    system = f"[{figures['system']}] " if figures.get("system") else ""
    return [one_line(f"{system}{figures.get('prompt')} → {figures['answer']}", _LONGEST)]
