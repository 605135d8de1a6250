"""The smoke test as people and programs read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gemma_serve.errors import Problem
from gemma_serve.planning.smoke import CheckResult, SmokeReport

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.text import Text

# The word, not its colour, is the verdict.
_MARKS = {"passed": ("pass", "bold green"), "failed": ("FAIL", "bold red"), "skipped": ("skip", "")}
_INDENT = 6
_ID_WIDTH = 19
# Answers to several questions get a line each, which fits on a terminal of 100 columns.
_LINE = 90


def smoke_data(report: SmokeReport) -> dict[str, Any]:
    """The report for programs; its keys are pinned by a test."""
    return {
        "url": report.url,
        "model": report.model,
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

    mark, style = _MARKS[check.status]
    head = Text.assemble((mark, style), f"  {check.id:<{_ID_WIDTH}}", (_summary(check), "dim"))
    head.rstrip()
    return Group(head, *map(_Indented, _below(check)))


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

    statuses = [check.status for check in report.checks]
    counts = ", ".join(
        f"{statuses.count(status)} {status}" for status in _MARKS if status in statuses
    )
    said = "the endpoint keeps its promises" if report.ok else "the endpoint breaks its promises"
    return Text.assemble("\n", (said, "bold green" if report.ok else "bold red"), f": {counts}")


def _summary(check: CheckResult) -> str:
    """The figures in a few words; of a check that was not tried, why."""
    if check.status == "skipped":
        return check.reason
    figures = check.figures
    parts = [write(figures) for write in (_SEVERAL if "answers" in figures else _ALONE)]
    return " · ".join(part for part in parts if part)


def _below(check: CheckResult) -> list[str]:
    lines = _exchange(check.figures)
    if check.status == "failed":
        lines.append(check.reason)
    if check.hint and check.status != "passed":
        lines.append(f"hint: {check.hint}")
    return lines


def _exchange(figures: Mapping[str, Any]) -> list[str]:
    """What was asked and answered; of several at a time, a line each."""
    if several := figures.get("answers"):
        lines = [f"{one['prompt']} → {one['answer']}" for one in several]
        return [line if len(line) <= _LINE else line[: _LINE - 1] + "…" for line in lines]
    if "answer" not in figures:
        return []
    system = f"[{figures['system']}] " if "system" in figures else ""
    return [f"{system}{figures['prompt']} → {figures['answer']}"]


def _models(figures: Mapping[str, Any]) -> str:
    if "models" not in figures:
        return ""
    limit = figures.get("max_model_len")
    return ", ".join(figures["models"]) + (f", up to {limit} tokens" if limit else "")


def _quicker(figures: Mapping[str, Any]) -> str:
    if "speedup" not in figures:
        return ""
    times, peak = figures["speedup"], figures["in_progress_at_once"]
    return f"{times:.1f} times as quick as one by one · {peak} in progress at once"


def _stop(figures: Mapping[str, Any]) -> str:
    return f"stopped at {figures['stop']!r}" if "stop" in figures else ""


def _growth(figures: Mapping[str, Any]) -> str:
    alone = figures.get("prompt_tokens_alone")
    return "" if alone is None else f"{figures['prompt_tokens']} prompt tokens, {alone} without"


def _overlap(figures: Mapping[str, Any]) -> str:
    if "overlap_s" not in figures:
        return ""
    return f"{figures['stagger_s']:.2f} s apart, {figures['overlap_s']:.2f} s side by side"


def _tokens(figures: Mapping[str, Any]) -> str:
    tokens = figures.get("tokens")
    return "" if tokens is None else f"{tokens} token{'' if tokens == 1 else 's'}"


def _pace(figures: Mapping[str, Any]) -> str:
    pace = figures.get("tokens_per_second")
    return "" if pace is None else f"{pace:.0f} tokens/s"


def _first_token(figures: Mapping[str, Any]) -> str:
    ttft_s = figures.get("ttft_s")
    return "" if ttft_s is None else f"first after {ttft_s:.3f} s"


_ALONE = (_models, _stop, _growth, _tokens, _pace, _first_token)
_SEVERAL = (_quicker, _overlap, _pace)
