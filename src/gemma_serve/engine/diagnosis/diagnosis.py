"""What a log and an engine's end say: the one root cause, in words, with the lines that show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gemma_serve.engine.diagnosis.text import Place
from gemma_serve.planning.failures import Change, Remedy


@dataclass(frozen=True)
class Ending:
    """What is known of an engine's end beside its log.

    `signum` is the signal that ended its leader, `lost` the process of it that is gone. With
    `out_of_memory` the kernel has killed something on this machine for memory meanwhile.
    `silent_s` is for how long nothing was printed. It may also live and generate nothing.
    """

    signum: int | None = None
    code: int | None = None
    lost: str | None = None
    out_of_memory: bool = False
    silent_s: float | None = None
    generates_nothing: bool = False

    @property
    def is_known(self) -> bool:
        """Whether the engine has ended, and how is known."""
        return (self.signum, self.code, self.lost) != (None, None, None)


@dataclass(frozen=True)
class Also:
    """Another failure that the same log shows."""

    id: str
    title: str
    line: int


@dataclass(frozen=True)
class Diagnosis:
    """What a log says.

    `id` is the catalogue's, None unless the verdict is "known". `change` is the fix as settings,
    where it is certain, and `remedy` names the one that `up --auto-fix` may do.
    """

    verdict: Literal["known", "unknown", "healthy"]
    id: str | None
    title: str
    cause: str = ""
    fix: str = ""
    command: str = ""
    change: Change | None = None
    remedy: Remedy | None = None
    evidence: tuple[Place, ...] = ()
    also: tuple[Also, ...] = ()

    @property
    def found_failure(self) -> bool:
        """Whether something is wrong."""
        return self.verdict != "healthy"
