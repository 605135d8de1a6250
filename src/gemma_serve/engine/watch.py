"""Whether a ready engine still generates.

`/health` says 200 while generation hangs, so a probe asks for one token. A probe may queue
behind real load: it is sent only while the token counters stand still, and a failed one counts
only if they stood still during its deadline too. Without a clock: somebody else keeps the
interval between two looks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenCounters:
    """How many tokens the engine has generated, and how many of prompts it has processed."""

    generation: float
    prompt: float


@dataclass(frozen=True)
class Health:
    """What one look found.

    `missed` counts the misses in a row; `reason` says why the probe got no token, also where
    that was not counted; `probed` says whether one was sent.
    """

    ok: bool
    reason: str | None = None
    missed: int = 0
    probed: bool = False


class Watch:
    """The looks at one engine, each compared with the one before it.

    `read_counters` returns None where they can't be read, which counts as standing still.
    `probe` takes a deadline in seconds and returns None when a token came, else why not, as a
    part of a sentence: "no token within 20 s". Neither may raise.
    """

    def __init__(
        self,
        *,
        read_counters: Callable[[], TokenCounters | None],
        probe: Callable[[float], str | None],
        deadline_s: float,
    ) -> None:
        self._read_counters = read_counters
        self._probe = probe
        self._deadline_s = deadline_s
        self._last: TokenCounters | None = None
        self._missed = 0

    def look(self) -> Health:
        """One round; it takes up to `deadline_s` and two reads of the counters."""
        before = self._read_counters()
        if _moved(self._last, before):
            self._last, self._missed = before, 0
            return Health(ok=True)
        failure = self._probe(self._deadline_s)
        # Read again after each probe: its own tokens are no traffic for the next round.
        self._last = self._read_counters()
        if failure is None:
            self._missed = 0
            return Health(ok=True, probed=True)
        if _moved(before, self._last):
            failure = f"{failure}, but the counters moved: it queued behind load"
        else:
            self._missed += 1
        return Health(ok=self._missed == 0, reason=failure, missed=self._missed, probed=True)


def _moved(before: TokenCounters | None, after: TokenCounters | None) -> bool:
    """Whether tokens came between two readings; fewer than before are a restarted engine's."""
    return before is not None and after is not None and before != after
