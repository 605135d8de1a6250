"""The smoke test's report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, StrictUndefined, Template

from gemma_serve.adapters.package_data import data_path
from gemma_serve.adapters.secrets import without_secrets
from gemma_serve.planning.smoke.report import CheckResult, SmokeReport
from gemma_serve.view.smoke import MARKS, counts, started_at, verdict
from gemma_serve.view.smoke_pictures import (
    WIDTH,
    first_token_picture,
    staggered_picture,
    together_pictures,
)
from gemma_serve.view.smoke_words import Figures, exchanges, legal_text, seconds, seen

_LONGEST_ANSWER = 4000


@dataclass(frozen=True)
class _Row:
    """One check as the page shows it."""

    id: str
    promise: str
    status: str
    mark: str
    seen: tuple[str, ...]
    reason: str
    hint: str
    took: str


@dataclass(frozen=True)
class _Exchange:
    """What was asked and answered; `alone` where it was another answer than that alone."""

    system: str
    prompt: str
    answer: str
    alone: str


def html_page(report: SmokeReport) -> str:
    """The report as an HTML page without scripts or outside resources."""
    at = started_at(report)
    return _template().render(
        ok=report.ok,
        verdict=verdict(report),
        counts=counts(report),
        url=without_secrets(report.url),
        model=report.model,
        engine_version=report.engine_version,
        started_iso=at.isoformat(timespec="seconds"),
        started=f"{at:%Y-%m-%d %H:%M:%S} UTC",
        took=seconds(report.duration_s),
        rows=[_row(check) for check in report.checks],
        pictures=[*together_pictures(report), staggered_picture(report)],
        first_tokens=first_token_picture(report),
        answers=_answers(report),
        width=WIDTH,
    )


@cache
def _template() -> Template:
    """The page, in which all that a server said is escaped and made legal."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: legal_text(value) if type(value) is str else value,
    )
    return environment.from_string(data_path("smoke_report.html.jinja").read_text(encoding="utf-8"))


def _row(check: CheckResult) -> _Row:
    return _Row(
        id=check.id,
        promise=check.promise,
        status=check.status,
        mark=MARKS[check.status][0],
        seen=seen(check),
        reason="" if check.status == "passed" else without_secrets(check.reason),
        hint="" if check.status == "passed" else without_secrets(check.hint),
        took="" if check.status == "skipped" else seconds(check.duration_s),
    )


def _answers(report: SmokeReport) -> list[tuple[_Exchange, list[str]]]:
    """Each exchange once, with the checks that had it."""
    found: dict[_Exchange, list[str]] = {}
    for check in report.checks:
        for exchange in _exchanges(check.figures):
            ids = found.setdefault(exchange, [])
            if check.id not in ids:
                ids.append(check.id)
    return list(found.items())


def _exchanges(figures: Figures) -> Iterator[_Exchange]:
    alone = {one.get("prompt"): _said(one, "answer") for one in exchanges(figures, "alone")}
    for one in exchanges(figures) or (figures,):
        answer = _said(one, "answer")
        if one.get("answer") is not None:
            other = alone.get(one.get("prompt"), answer)
            yield _Exchange(
                _said(one, "system"), _said(one, "prompt"), answer, "" if other == answer else other
            )


def _said(figures: Figures, key: str) -> str:
    text = str(figures.get(key) or "").strip()
    if len(text) <= _LONGEST_ANSWER:
        return text
    return f"{text[:_LONGEST_ANSWER]}… ({len(text) - _LONGEST_ANSWER} more characters)"
