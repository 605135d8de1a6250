"""The engine's log: read as it grows, cut into lines, told apart into phases."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# In the order of a start. The parts of messages are those of vLLM 0.26 to 0.33; a line that
# none of them is in belongs to the phase before it.
_PHASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("configuration", ("non-default args:", "Resolved architecture:", "Using max model len")),
    ("engine core", ("Initializing a V1 LLM engine", "Waiting for engine core")),
    ("weights", ("Starting to load model", "Loading model from scratch", "checkpoint shards:")),
    ("compilation", ("Starting torch.compile", "Dynamo bytecode transform", "Warming up model")),
    ("KV cache", ("Available KV cache memory", "KV cache size:", "for KV Cache as specified")),
    ("CUDA graphs", ("Capturing CUDA graphs", "JIT kernel warmup starting")),
    ("API server", ("Starting vLLM server on", "Starting vLLM API server", "Available routes")),
)
_SHARDS = re.compile(r"checkpoint shards:\s+(\d+)% Completed")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_PREFIX = re.compile(
    r"^(\([\w-]+ pid=\d+\) ?)?((DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d "
    r"\[[^\]]+\] ?)?"
)


@dataclass(frozen=True)
class PhaseSeen:
    """A line told that `phase` has begun, or how far it is (`detail`, e.g. "50 %")."""

    phase: str
    detail: str = ""


def phase_of(line: str) -> PhaseSeen | None:
    """What `line` says of the start's progress, if anything."""
    for phase, parts in _PHASES:
        if any(part in line for part in parts):
            shards = _SHARDS.search(line)
            return PhaseSeen(phase, f"{shards[1]} %" if shards else "")
    return None


def bare_message(line: str) -> str:
    """A log line without colours, process name, level, time and place."""
    return _PREFIX.sub("", _COLOUR.sub("", line), count=1)


class LogLines:
    """Cuts a growing log into lines; progress bars end theirs with a carriage return."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, text: str) -> Iterator[str]:
        """The lines that `text` completes."""
        *lines, self._rest = re.split(r"[\r\n]+", self._rest + text)
        yield from (line for line in lines if line)


class LogReader:
    """The engine's log as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = LogLines()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at = 0

    def new_lines(self) -> Iterable[str]:
        """The lines that were completed since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._at)
                data = file.read()
        except OSError:
            return
        self._at += len(data)
        yield from self._lines.feed(self._decoder.decode(data))

    def all_lines(self) -> Iterable[str]:
        """Every line so far; none if the log is gone."""
        try:
            with self.path.open(encoding="utf-8", errors="replace") as file:
                yield from file
        except OSError:
            return
