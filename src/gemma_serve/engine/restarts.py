"""How often, and after which pause, an engine that died is started again. Without a clock."""

from __future__ import annotations

from dataclasses import dataclass

_MOST_DOUBLINGS = 64  # 2.0 ** 1024 overflows


@dataclass(frozen=True)
class RestartPolicy:
    """At most `max_restarts` within `window_s` seconds, with growing pauses between them.

    The pauses double from `first_pause_s` up to `longest_pause_s`. An engine that was ready for
    `stable_s` before it died starts with a clean record.
    """

    max_restarts: int = 5
    window_s: float = 600.0
    stable_s: float = 300.0
    first_pause_s: float = 1.0
    longest_pause_s: float = 60.0


class Restarts:
    """The restarts of one deployment so far. All times are monotonic seconds."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._deaths: list[float] = []

    @property
    def count(self) -> int:
        """The restarts within the window that ended at the last death."""
        return len(self._deaths)

    def after_death(self, now: float, ready_at: float) -> float | None:
        """The pause in seconds before the next start; None when the restarts are used up.

        `ready_at` is when the engine that died at `now` had become ready.
        """
        policy = self._policy
        stable = now - ready_at >= policy.stable_s
        self._deaths = [] if stable else [t for t in self._deaths if now - t <= policy.window_s]
        earlier = len(self._deaths)
        if earlier >= policy.max_restarts:
            return None
        self._deaths.append(now)
        pause_s = policy.first_pause_s * 2.0 ** min(earlier, _MOST_DOUBLINGS)
        return min(pause_s, policy.longest_pause_s)
