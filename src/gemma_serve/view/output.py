"""The one way out: data on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from gemma_serve.adapters.secrets import without_secrets
from gemma_serve.errors import Problem

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SCHEMA = 1


def envelope(
    command: str, *, ok: bool, data: Mapping[str, Any], problems: Sequence[Problem]
) -> dict[str, Any]:
    """The object that every `--json` prints; its keys are pinned by a test."""
    return {
        "schema": SCHEMA,
        "command": command,
        "ok": ok,
        "data": dict(data),
        "problems": [
            {
                "code": p.code,
                "message": without_secrets(p.message),
                "hint": without_secrets(p.hint),
            }
            for p in problems
        ],
    }


class Output:
    """Writes what a command found, for a person or, with `as_json`, for a program."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json

    def data(self, renderable: RenderableType) -> None:
        """Show the answer itself to a person; nothing under `--json`."""
        if not self.as_json:
            out_console().print(
                renderable, markup=False, highlight=False, soft_wrap=isinstance(renderable, str)
            )

    def note(self, text: str) -> None:
        """Tell a person what is going on, on standard error; nothing under `--json`."""
        if not self.as_json:
            err_console().print(text, markup=False, highlight=False, soft_wrap=True)

    def problems(self, problems: Sequence[Problem]) -> None:
        """Show `problems` on standard error, each with its hint."""
        for problem in problems:
            show_problem(problem)

    def json_line(self, value: Mapping[str, Any]) -> None:
        """Write one JSON object as one line on standard output."""
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()

    def result(
        self,
        command: str,
        *,
        ok: bool,
        data: Mapping[str, Any],
        problems: Sequence[Problem] = (),
        text: RenderableType | None = None,
    ) -> None:
        """Give a command's answer: the envelope under `--json`, else `text` and the problems."""
        if self.as_json:
            self.json_line(envelope(command, ok=ok, data=data, problems=problems))
            return
        if text is not None:
            self.data(text)
        self.problems(problems)


def show_problem(problem: Problem) -> None:
    """Write one problem on standard error: the sentence, then the way out."""
    console = err_console()
    label, style = ("error", "bold red") if problem.blocking else ("warning", "bold yellow")
    console.print(f"[{style}]{label}:[/] ", end="", highlight=False)
    console.print(without_secrets(problem.message), markup=False, highlight=False, soft_wrap=True)
    if problem.hint:
        console.print("[bold cyan]hint:[/] ", end="", highlight=False)
        console.print(without_secrets(problem.hint), markup=False, highlight=False, soft_wrap=True)


def out_console() -> Console:
    """Standard output, for data."""
    return _console(sys.stdout)


def err_console() -> Console:
    """Standard error, for everything else."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    class PlainConsole(Console):
        def on_broken_pipe(self) -> None:
            """Rich would end the program here; whoever called has an engine to stop first."""
            raise BrokenPipeError

    # A pipe gets whole lines: 80 columns would cut tables that a person reads in a CI log.
    return PlainConsole(file=stream, width=None if stream.isatty() else 120)
