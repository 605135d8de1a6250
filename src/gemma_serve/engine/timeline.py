"""The phases of an engine's start, how long each took, and which one takes too long."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gemma_serve.planning.phases import PHASE_TIMEOUTS_S, PHASES

__all__ = [
    "PHASES",
    "PHASE_TIMEOUTS_S",
    "SILENCE_S",
    "Overdue",
    "PhaseSeen",
    "Stretch",
    "Timeline",
    "phase_of",
]

# After this long without a line, somebody who waits wonders whether anything still happens.
SILENCE_S = 40.0

# The parts of messages are those of vLLM 0.26 to 0.33; a line that none of them is in belongs
# to the phase before it. "imports" ends with the first that is told, and the caller tells
# "first token".
_PHASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("configuration", ("non-default args:", "Resolved architecture:", "Using max model len")),
    ("engine core", ("Initializing a V1 LLM engine", "Waiting for engine core")),
    (
        "weights",
        (
            "Starting to load model",
            "Loading model from scratch",
            "checkpoint shards:",
            "Multi-thread loading shards:",
        ),
    ),
    (
        "compilation",
        (
            "Starting torch.compile",
            "for vLLM's torch.compile",
            "Dynamo bytecode transform",
            "Warming up model for the compilation",
            "Compile and warming up model",
        ),
    ),
    (
        "KV cache",
        (
            "Available KV cache memory",
            "KV cache size:",
            "for KV Cache as specified",
            "GiB for KV cache on node",
        ),
    ),
    ("CUDA graphs", ("Capturing CUDA graphs", "Profiling CUDA graph memory")),
    (
        "warm-up",
        (
            "Graph capturing finished",
            "JIT kernel warmup starting",
            "[Autotuner]: Autotuning process starts",
        ),
    ),
    ("API server", ("Starting vLLM server on", "Starting vLLM API server", "Available routes")),
)
_PERCENT = re.compile(r"(?:shards|Capturing CUDA graphs[^:]*):\s+(\d+)%")


@dataclass(frozen=True)
class PhaseSeen:
    """A line told that `phase` has begun, or how far it is (`detail`, e.g. "50 %")."""

    phase: str
    detail: str = ""


@dataclass(frozen=True)
class Stretch:
    """A time without a break in one phase, in seconds since the start; still on without an end."""

    phase: str
    began_s: float
    ended_s: float | None


@dataclass(frozen=True)
class Overdue:
    """`phase` has gone on for `waited_s` seconds without progress, more than its `limit_s`."""

    phase: str
    waited_s: float
    limit_s: float


def phase_of(line: str) -> PhaseSeen | None:
    """What `line` says of the start's progress, if anything."""
    for phase, parts in _PHASES:
        if any(part in line for part in parts):
            percent = _PERCENT.search(line)
            return PhaseSeen(phase, f"{percent[1]} %" if percent else "")
    return None


class Timeline:
    """A start, line by line.

    Every `now` is the caller's monotonic clock in seconds; all that comes out is in seconds
    since the `now` of the start. A phase can come back: vLLM's V2 runner captures graphs once
    to measure them and again to keep them.
    """

    def __init__(self, now: float) -> None:
        self._start = now
        self._last_line_s = 0.0
        self._progress_s = 0.0
        self._stretches = [Stretch(PHASES[0], 0.0, None)]
        self.detail = ""

    @property
    def phase(self) -> str:
        """The current phase; after the end, the last one."""
        return self._stretches[-1].phase

    @property
    def phase_began_s(self) -> float:
        """When the current phase began, this time."""
        return self._stretches[-1].began_s

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """Every stretch so far, one after the other, without gaps."""
        return tuple(self._stretches)

    def read(self, line: str, now: float) -> PhaseSeen | None:
        """The phase that `line` begins or its new progress; None where it tells nothing new."""
        self._last_line_s = now - self._start
        seen = phase_of(line)
        if seen is None or self._is_late(seen):
            return None
        if seen.phase != self.phase:
            self._begin(seen, now)
            return seen
        if seen.detail in ("", self.detail):
            return None
        self.detail = seen.detail
        self._progress_s = now - self._start
        return seen

    def begin(self, phase: str, now: float) -> None:
        """Go over to a phase that no line tells."""
        if phase != self.phase or self._has_ended():
            self._begin(PhaseSeen(phase), now)

    def end(self, now: float) -> None:
        """The engine is ready; lines tell no more phases."""
        if not self._has_ended():
            self._stretches[-1] = replace(self._stretches[-1], ended_s=now - self._start)

    def durations(self, now: float) -> dict[str, float]:
        """Seconds in each phase, by first appearance; the running one counts up to `now`."""
        seconds: dict[str, float] = {}
        for stretch in self._stretches:
            ended_s = now - self._start if stretch.ended_s is None else stretch.ended_s
            seconds[stretch.phase] = seconds.get(stretch.phase, 0.0) + ended_s - stretch.began_s
        return seconds

    def silent_s(self, now: float) -> float:
        """Seconds since the last line, whatever it said."""
        return now - self._start - self._last_line_s

    def overdue(self, now: float, limits: Mapping[str, float]) -> Overdue | None:
        """Whether the current phase has taken longer than its limit (in seconds).

        It counts from the phase's begin or its last progress. A phase without a limit, and an
        engine that is ready, are never overdue.
        """
        limit_s = limits.get(self.phase)
        waited_s = now - self._start - self._progress_s
        if limit_s is None or self._has_ended() or waited_s <= limit_s:
            return None
        return Overdue(self.phase, waited_s, limit_s)

    def _begin(self, seen: PhaseSeen, now: float) -> None:
        self.end(now)
        self._stretches.append(Stretch(seen.phase, now - self._start, None))
        self._progress_s = now - self._start
        self.detail = seen.detail

    def _has_ended(self) -> bool:
        return self._stretches[-1].ended_s is not None

    def _is_late(self, seen: PhaseSeen) -> bool:
        """Whether a line tells a phase that is not there any more, or not there yet.

        An endpoint can answer before its last lines are read. And graphs that were captured
        only to be measured end with the line that otherwise begins the warm-up.
        """
        if self._has_ended() or self.phase == PHASES[-1]:
            return True
        return seen.phase == "warm-up" and all(s.phase != "KV cache" for s in self._stretches)
