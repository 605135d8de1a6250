"""The streams that the smoke test timed, read from the figures of a check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gemma_serve.planning.smoke.report import CheckResult
from gemma_serve.view.smoke_words import Figures, exchanges, number


@dataclass(frozen=True)
class Stream:
    """One answer as it came: when it was asked for, and when each of its tokens arrived.

    Seconds since the first request of its group; `times_s` ascends.
    """

    prompt: str
    started_s: float
    times_s: tuple[float, ...]

    @property
    def ttft_s(self) -> float | None:
        """The time to first token; None where none came."""
        return self.times_s[0] - self.started_s if self.times_s else None


def streams_of(check: CheckResult | None, key: str) -> tuple[Stream, ...]:
    """The streams in the figure `key` of a check; times that can't be are left out."""
    return () if check is None else tuple(map(_stream, exchanges(check.figures, key)))


def _stream(figures: Figures) -> Stream:
    started_s = max(0.0, number(figures.get("started_s")) or 0.0)
    found = figures.get("token_times_s")
    times = [number(time) for time in found] if isinstance(found, list | tuple) else []
    known = sorted(max(started_s, time) for time in times if time is not None)
    return Stream(str(figures.get("prompt") or ""), started_s, tuple(known))


def took_s(streams: Sequence[Stream]) -> float:
    """From the first request to the last token."""
    ends = [stream.times_s[-1] for stream in streams if stream.times_s]
    return max(ends) - min(stream.started_s for stream in streams) if ends else 0.0


def most_at_once(written: Sequence[Stream]) -> int:
    """The most streams that were between their first and their last token at one time."""
    edges = [(s.times_s[0], 1) for s in written] + [(s.times_s[-1], -1) for s in written]
    running = most = 0
    for _, step in sorted(edges):  # at the same time, an end comes before a beginning
        running += step
        most = max(most, running)
    return most
