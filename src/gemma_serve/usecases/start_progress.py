"""A start as events: its phases, how far they are, and that nothing was heard for a while."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gemma_serve.engine.timeline import SILENCE_S, Overdue, Timeline
from gemma_serve.usecases.events import Event, PhaseBegan, PhaseProgress, Silent

_FIRST_TOKEN = "first token"


class StartProgress:
    """Reads one start. Every `now` is the caller's monotonic clock in seconds."""

    def __init__(self, now: float) -> None:
        self._timeline = Timeline(now)
        self._silence_told = SILENCE_S

    @property
    def phase(self) -> str:
        """The current phase."""
        return self._timeline.phase

    @property
    def phases(self) -> tuple[PhaseBegan, ...]:
        """When each stretch of a phase began, in seconds since the start."""
        return tuple(PhaseBegan(s.phase, s.began_s) for s in self._timeline.stretches)

    def begun(self) -> PhaseBegan:
        """The current phase as an event."""
        return PhaseBegan(self._timeline.phase, self._timeline.phase_began_s)

    def read(self, lines: Iterable[str], now: float) -> list[Event]:
        """What the engine's new `lines` tell."""
        events: list[Event] = []
        for line in lines:
            self._silence_told = SILENCE_S
            before = self._timeline.phase_began_s, self._timeline.phase
            seen = self._timeline.read(line, now)
            if seen is None:
                continue
            if (self._timeline.phase_began_s, self._timeline.phase) != before:
                events.append(self.begun())
            if seen.detail:
                events.append(PhaseProgress(seen.phase, seen.detail))
        return events

    def listening(self, now: float) -> list[Event]:
        """The endpoint answers, and a token was asked for; no line of the log tells that."""
        if self._timeline.phase == _FIRST_TOKEN:
            return []
        self._timeline.begin(_FIRST_TOKEN, now)
        return [self.begun()]

    def silence(self, now: float) -> list[Event]:
        """That nothing was heard, told anew each time that as much time again has passed."""
        silent_s = self._timeline.silent_s(now)
        if silent_s < self._silence_told:
            return []
        self._silence_told += SILENCE_S
        return [Silent(self._timeline.phase, silent_s)]

    def overdue(self, now: float, limits: Mapping[str, float]) -> Overdue | None:
        """The phase that takes longer than it may, if it does."""
        return self._timeline.overdue(now, limits)

    def end(self, now: float) -> dict[str, float]:
        """The engine is ready: how many seconds each phase took."""
        self._timeline.end(now)
        return self._timeline.durations(now)
