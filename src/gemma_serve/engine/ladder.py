"""The way down: SIGTERM to the leader, a clock, SIGKILL to every process, and the proof.

vLLM's core and workers outlive a leader that was killed and keep the GPU's memory, so the end
is the end of all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gemma_serve.engine.processes import kill_all
from gemma_serve.planning.process_id import ProcessId

# How long the leader gets beyond the drain that was asked for.
GRACE_S = 3.0
# Giving back tens of GB can take a killed process seconds on a busy machine.
KILL_TIMEOUT_S = 10.0
# Python's own helper processes end by themselves once the leader has.
LINGER_S = 0.5

StepName = Literal["drain", "terminate", "kill", "clean"]


@dataclass(frozen=True)
class StopStep:
    """One rung and how long it took.

    `drain`: requests in flight went on; `terminate`: SIGTERM until the leader had ended and its
    helpers had followed; `kill`: SIGKILL for the `count` that were left; `clean`: shared memory
    and temporary files.
    """

    step: StepName
    duration_s: float
    count: int = 0


@dataclass(frozen=True)
class Descent:
    """What ending the processes took, and the pids that would not go even so."""

    steps: tuple[StopStep, ...]
    left: tuple[int, ...]

    @property
    def killed(self) -> bool:
        """Whether SIGKILL was needed."""
        return any(step.step == "kill" for step in self.steps)


@dataclass(frozen=True)
class Ending:
    """What the ladder asks and does; `members` are the living processes of the engine.

    `leader_lives` says whether the leader is still there, `terminate` sends it SIGTERM,
    `wait` pauses for that many seconds or until something happened, and `hurry` says whether
    somebody asked again.
    """

    members: Callable[[], list[ProcessId]]
    leader_lives: Callable[[], bool]
    terminate: Callable[[], None]
    wait: Callable[[float], None]
    hurry: Callable[[], bool]


def descend(ending: Ending, *, drain_s: float = 0.0) -> Descent:
    """End the engine and everything that it started.

    SIGTERM goes to the leader alone, which ends its own in order: after `drain_s` for the
    requests in flight and `GRACE_S` for the rest, cut short by `hurry`, everyone that is left
    gets SIGKILL.
    """
    begun = time.monotonic()
    steps = []
    if ending.leader_lives():
        ending.terminate()
        _wait_for_leader(ending, begun + drain_s + GRACE_S)
    _wait_for_helpers(ending)
    name: StepName = "drain" if drain_s else "terminate"
    steps.append(StopStep(name, time.monotonic() - begun))
    if left := ending.members():
        steps.append(_kill(ending, len(left)))
    return Descent(tuple(steps), tuple(process.pid for process in ending.members()))


def _wait_for_leader(ending: Ending, until: float) -> None:
    while ending.leader_lives() and not ending.hurry() and time.monotonic() < until:
        ending.wait(0.05)


def _wait_for_helpers(ending: Ending) -> None:
    until = time.monotonic() + LINGER_S
    while not ending.leader_lives() and ending.members() and time.monotonic() < until:
        if ending.hurry():
            return
        ending.wait(0.02)


def _kill(ending: Ending, count: int) -> StopStep:
    begun = time.monotonic()
    empty = 0
    # Twice empty: a process whose parent ends while the list is made can be missing in it.
    while empty < 2 and time.monotonic() < begun + KILL_TIMEOUT_S:
        # Again each round: what was just being forked is in the next list.
        left = ending.members()
        empty = 0 if left else empty + 1
        kill_all(left)
        ending.wait(0.02)
    return StopStep("kill", time.monotonic() - begun, count)
