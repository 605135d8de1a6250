"""The smoke test's report as JUnit XML, which pipelines read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from gemma_serve.adapters.secrets import without_secrets
from gemma_serve.errors import Problem
from gemma_serve.planning.smoke.report import CheckResult, SmokeReport
from gemma_serve.view.smoke_words import Figures, exchanges, legal_text, one_line

_SUITE = "gemma-serve smoke-test"
_CLASS = "gemma-serve.smoke"
_STREAMS = ("answers", "alone")
_LONGEST = 500


def junit_xml(report: SmokeReport) -> str:
    """The report as one test suite, with a test case for each check."""
    suite = _suite([check.status for check in report.checks], report.started_at, report.duration_s)
    properties = SubElement(suite, "properties")
    for name in ("url", "model", "engine_version"):
        _add(properties, "property", name=name, value=without_secrets(str(getattr(report, name))))
    for check in report.checks:
        _add_check(suite, check)
    return _written(suite)


def junit_of_problems(problems: Sequence[Problem], *, started_at: float) -> str:
    """A test suite of one case, `start`, for a run that ended before any check could be tried.

    `started_at` is in seconds since 1970.
    """
    suite = _suite(["error"], started_at, 0.0)
    case = _add(suite, "testcase", classname=_CLASS, name="start", time="0.000")
    lines = [line for problem in problems for line in (problem.message, _hint(problem.hint))]
    first = problems[0] if problems else Problem("smoke.start", "nothing was started")
    _add(case, "error", _told(lines), message=without_secrets(first.message), type=first.code)
    return _written(suite)


def _suite(statuses: Sequence[str], started_at: float, duration_s: float) -> Element:
    return Element(
        "testsuite",
        name=_SUITE,
        tests=str(len(statuses)),
        failures=str(statuses.count("failed")),
        errors=str(statuses.count("error")),
        skipped=str(statuses.count("skipped")),
        time=f"{duration_s:.3f}",
        timestamp=datetime.fromtimestamp(started_at, UTC).isoformat(timespec="seconds"),
    )


def _add_check(suite: Element, check: CheckResult) -> None:
    time = f"{check.duration_s:.3f}"
    case = _add(suite, "testcase", classname=_CLASS, name=check.id, time=time)
    reason = without_secrets(check.reason)
    if check.status == "failed":
        told = _told([check.promise, check.reason, _hint(check.hint)])
        _add(case, "failure", told, message=reason, type=f"smoke.{check.id}")
    elif check.status == "skipped":
        _add(case, "skipped", message=reason)
    if lines := list(_figure_lines(check.figures)):
        _add(case, "system-out", "\n".join(lines))


def _figure_lines(figures: Figures) -> Iterator[str]:
    """A line for each figure, and one for each stream; the times of their tokens are left out."""
    for name, value in figures.items():
        if name in _STREAMS:
            for one in exchanges(figures, name):
                yield _line(name, f"{one.get('prompt')} → {one.get('answer')}")
        elif value is not None:
            yield _line(name, value)


def _line(name: str, value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"{name}: {one_line(text, _LONGEST)}"


def _hint(hint: str) -> str:
    return f"hint: {hint}" if hint else ""


def _told(lines: Sequence[str]) -> str:
    return without_secrets("\n".join(line for line in lines if line))


def _add(parent: Element, tag: str, text: str = "", **attributes: str) -> Element:
    """A new element in `parent`, whose text and attributes may hold anything."""
    legal = {name: legal_text(value) for name, value in attributes.items()}
    element = SubElement(parent, tag, legal)
    element.text = legal_text(text) or None
    return element


def _written(suite: Element) -> str:
    suites = Element("testsuites", {name: suite.attrib[name] for name in _TOTALS}, name=_SUITE)
    suites.append(suite)
    ElementTree.indent(suites)
    declared = '<?xml version="1.0" encoding="utf-8"?>\n'
    return declared + ElementTree.tostring(suites, encoding="unicode") + "\n"


_TOTALS = ("tests", "failures", "errors", "skipped", "time")
