"""What the guard is ordered to run, and what it reports, as lines of JSON."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_serve.engine.ladder import Descent, StopStep
from gemma_serve.planning.process_id import Member, ProcessId, SharedFile


@dataclass(frozen=True)
class Order:
    """The engine to run, where its output goes, and what is to be cleaned up after it."""

    argv: tuple[str, ...]
    log: Path
    events: Path
    temporary_folder: Path


@dataclass(frozen=True)
class Exit:
    """How the leader ended: its exit code, or the signal that ended it."""

    code: int | None
    signum: int | None

    @classmethod
    def of(cls, returncode: int) -> Exit:
        """From a return code as Popen gives it, where a negative number is a signal."""
        return cls(None, -returncode) if returncode < 0 else cls(returncode, None)

    def __str__(self) -> str:
        if self.signum is None:
            return f"exit code {self.code}"
        try:
            return f"signal {signal.Signals(self.signum).name}"
        except ValueError:
            return f"signal {self.signum}"


@dataclass(frozen=True)
class Started:
    """The leader runs."""

    leader: ProcessId


@dataclass(frozen=True)
class NotStarted:
    """The command could not be run, and why."""

    reason: str


@dataclass(frozen=True)
class Joined:
    """A process of the engine was seen for the first time, or has got its title."""

    member: Member


@dataclass(frozen=True)
class SegmentsSeen:
    """All files of shared memory that the engine was seen to use so far."""

    files: tuple[SharedFile, ...]


@dataclass(frozen=True)
class Lost:
    """A process that vLLM can't do without has ended."""

    member: Member


@dataclass(frozen=True)
class LeaderEnded:
    """The leader has ended; the rest is being ended as well."""

    exit: Exit


@dataclass(frozen=True)
class LogTrouble:
    """The log can't be written, and why; lines are being lost."""

    reason: str


@dataclass(frozen=True)
class Stopped:
    """Nothing is left of the engine, or `descent.left` is."""

    descent: Descent
    duration_s: float


Report = Started | NotStarted | Joined | SegmentsSeen | Lost | LeaderEnded | LogTrouble | Stopped


def write_report(report: Report) -> bytes:
    """One line."""
    return json.dumps({type(report).__name__: asdict(report)}).encode() + b"\n"


def read_report(line: str) -> Report:
    """What `write_report` wrote."""
    ((name, value),) = json.loads(line).items()
    report: Report = _READERS[name](value)
    return report


def _process(value: dict[str, Any]) -> ProcessId:
    return ProcessId(**value)


def _member(value: dict[str, Any]) -> Member:
    return Member(_process(value["process"]), value["title"])


def _descent(value: dict[str, Any]) -> Descent:
    steps = tuple(StopStep(**step) for step in value["steps"])
    return Descent(steps, tuple(value["left"]))


_READERS: dict[str, Any] = {
    "Started": lambda value: Started(_process(value["leader"])),
    "NotStarted": lambda value: NotStarted(value["reason"]),
    "Joined": lambda value: Joined(_member(value["member"])),
    "SegmentsSeen": lambda value: SegmentsSeen(tuple(SharedFile(**f) for f in value["files"])),
    "Lost": lambda value: Lost(_member(value["member"])),
    "LeaderEnded": lambda value: LeaderEnded(Exit(**value["exit"])),
    "LogTrouble": lambda value: LogTrouble(value["reason"]),
    "Stopped": lambda value: Stopped(_descent(value["descent"]), value["duration_s"]),
}
