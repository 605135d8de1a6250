"""Everything that can go wrong, as one tree.

    GemmaServeError            1  the answer is no
    ├── UsageError             2  a flag, a variable or a file is wrong; nothing was touched
    ├── EngineFailed           3  the engine did not start, or died
    └── Stopped          130/143  SIGINT or SIGTERM asked us to stop

An error is one sentence with what was found and what was wanted, then a hint that names the
command or the flag that mends it. `code` is the stable name that `--json` shows to programs.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

EXIT_OK = 0
EXIT_NO = 1
EXIT_USAGE = 2
EXIT_ENGINE = 3


@dataclass(frozen=True)
class Problem:
    """One thing that a command found wrong.

    `blocking` problems turn the command's answer into "no"; the others are worth knowing.
    `settings` are those that are certain to mend it, by name.
    """

    code: str
    message: str
    hint: str = ""
    blocking: bool = True
    settings: Mapping[str, str] = field(default_factory=dict)


class GemmaServeError(Exception):
    """The root: one or more problems and the exit code that they lead to."""

    exit_code: ClassVar[int] = EXIT_NO

    def __init__(self, message: str, *, code: str, hint: str = "") -> None:
        super().__init__(message)
        self.problems: tuple[Problem, ...] = (Problem(code, message, hint),)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> GemmaServeError:
        """An error that carries all of `problems` (at least one)."""
        error = cls(problems[0].message, code=problems[0].code, hint=problems[0].hint)
        error.problems = tuple(problems)
        return error


class UsageError(GemmaServeError):
    """A flag, an environment variable or a file is wrong, and nothing was touched."""

    exit_code = EXIT_USAGE


class EngineFailed(GemmaServeError):
    """The engine did not start, or it died."""

    exit_code = EXIT_ENGINE


class Stopped(GemmaServeError):
    """A signal asked us to stop; the engine is gone by the time this reaches `main`."""

    def __init__(self, signum: int) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}", code="stopped")
        self.signum = signum

    @property
    def shell_code(self) -> int:
        """128 + the signal, as shells report it: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + self.signum
