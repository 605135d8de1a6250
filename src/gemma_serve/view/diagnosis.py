"""A diagnosis as text and as JSON: what it is, why, what mends it, and where the log says so."""

from __future__ import annotations

import time
from typing import Any

from gemma_serve.engine.diagnosis.diagnosis import Diagnosis
from gemma_serve.errors import Problem
from gemma_serve.usecases.diagnose import DiagnosisReport
from gemma_serve.view.times import age_text

_WIDTH = 9
_LONGEST_LINE = 240


def diagnosis_data(diagnosis: Diagnosis) -> dict[str, Any]:
    """The `data` of `diagnose --json`; the same stands in `status --json` and in events."""
    return {
        "verdict": diagnosis.verdict,
        "id": diagnosis.id,
        "title": diagnosis.title,
        "cause": diagnosis.cause,
        "fix": diagnosis.fix,
        "command": diagnosis.command,
        "evidence": [{"line": place.line, "text": place.text} for place in diagnosis.evidence],
        "also": [
            {"id": other.id, "title": other.title, "line": other.line} for other in diagnosis.also
        ],
    }


def diagnosis_text(report: DiagnosisReport) -> str:
    """The diagnosis for a person."""
    diagnosis = report.diagnosis
    head = diagnosis.verdict if diagnosis.id is None else diagnosis.id
    lines = [f"{head}: {diagnosis.title}", *_rows(diagnosis)]
    if report.deployment is not None and report.started_at is not None:
        age = age_text(time.time() - report.started_at)
        lines.append(
            f"  {'log':{_WIDTH}}{report.source}, of {report.deployment} as started {age} ago"
        )
    return "\n".join(lines)


def evidence_lines(diagnosis: Diagnosis) -> list[str]:
    """The lines of the log that show it."""
    return [f"line {place.line}: {_shortened(place.text)}" for place in diagnosis.evidence]


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]} ..."


def diagnosis_problems(diagnosis: Diagnosis) -> tuple[Problem, ...]:
    """The failure as a problem; none for a healthy log."""
    if not diagnosis.found_failure:
        return ()
    code = diagnosis.id or "unknown"
    message = ": ".join(part for part in (diagnosis.title, diagnosis.cause) if part)
    return (Problem(code, message, diagnosis.fix),)


def _rows(diagnosis: Diagnosis) -> list[str]:
    rows = [
        ("cause", diagnosis.cause),
        ("fix", diagnosis.fix),
        ("command", diagnosis.command),
    ]
    shown = [f"  {name:{_WIDTH}}{value}" for name, value in rows if value]
    shown += [f"  {line}" for line in evidence_lines(diagnosis)]
    for other in diagnosis.also:
        shown.append(f"  {'also':{_WIDTH}}{other.id}, line {other.line}: {other.title}")
    return shown
