"""`gemma-serve diagnose`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from gemma_serve.cli.options import AsJson
from gemma_serve.errors import EXIT_NO, EXIT_OK, UsageError


def diagnose(
    log: Annotated[
        str | None,
        typer.Argument(
            metavar="[LOG|-]",
            help="A log of vLLM, or - for standard input; by default the last deployment's.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="A deployment's log instead.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Name the one root cause in an engine's log. Exits 1 if there is a failure in it."""
    from gemma_serve.usecases.diagnose import diagnose_deployment, diagnose_file, diagnose_stream
    from gemma_serve.view.diagnosis import diagnosis_data, diagnosis_problems, diagnosis_text
    from gemma_serve.view.output import Output

    if log is not None and name is not None:
        raise UsageError(
            f"the log {log} and the deployment {name} were both named",
            code="usage",
            hint="leave one of the two out",
        )
    if log is None:
        report = diagnose_deployment(name, os.environ)
    elif log == "-":
        report = diagnose_stream(_standard_input())
    else:
        report = diagnose_file(Path(log))
    found = report.diagnosis
    output = Output(as_json=as_json)
    if as_json:
        output.result(
            "diagnose",
            ok=not found.found_failure,
            data=diagnosis_data(found),
            problems=diagnosis_problems(found),
        )
    else:
        output.data(diagnosis_text(report))
    return EXIT_NO if found.found_failure else EXIT_OK


def _standard_input() -> BinaryIO:
    # A program may be started without one.
    if sys.stdin is None:
        raise UsageError(
            "standard input is closed",
            code="diagnose.unreadable",
            hint="pipe a log into it: `docker logs CONTAINER 2>&1 | gemma-serve diagnose -`",
        )
    return sys.stdin.buffer
