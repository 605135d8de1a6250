"""Why an engine ended: what killed it, or the last error in its log that is no wrapper."""

from __future__ import annotations

import re
from collections.abc import Iterable

from gemma_serve.engine.log import bare_message
from gemma_serve.engine.reports import Exit

# Said of every failed start; the cause stands above them.
_WRAPPERS = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "EngineCore encountered an issue",
    "EngineCore failed to start",
    "WorkerProc failed to start",
    "Engine core proc",
    "Cancelled by user",
)
_ERROR = re.compile(
    r"^(?:[A-Za-z_][\w.]*\.)?([A-Z]\w*(?:Error|Exception|Exit|Interrupt))(?::\s*(.*))?$"
)
_USAGE = re.compile(r"^[\w.-]+: error: (.+)$")
_DETAIL = re.compile(r"^\s+Value error, (.+?)(?: \[type=.*)?$")


def last_error(lines: Iterable[str]) -> str | None:
    """The sentence of the last error, with its type: "ValueError: No available memory ...".

    A validation error's own sentence is in the line after it; that one is taken. None where
    the log has no error that says anything.
    """
    found: str | None = None
    for line in lines:
        message = bare_message(line).rstrip()
        if detail := _DETAIL.match(message):
            found = f"ValueError: {detail[1]}"
        elif usage := _USAGE.match(message):
            found = usage[1]
        elif (error := _ERROR.match(message)) and _says_something(error[2]):
            found = f"{error[1]}: {error[2]}"
    return found


def _says_something(text: str | None) -> bool:
    return bool(text) and not any(wrapper in str(text) for wrapper in _WRAPPERS)


def explain_end(how: Exit | None, lost: str | None, error: str | None) -> str:
    """Why the engine ended: what killed its leader, else its last `error`, else what is known."""
    if how is not None and how.signum is not None:
        return f"it was killed by {how}" + ("" if error is None else f"; last error: {error}")
    if error is not None:
        return error
    if lost is not None:
        return f"its process {lost} is gone, and no error is in its log"
    return f"it ended with {how} and no error in its log"
