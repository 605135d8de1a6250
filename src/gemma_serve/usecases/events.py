"""What happens while an engine starts, runs and stops, as values for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma_serve.errors import Problem
from gemma_serve.planning.smoke import CheckResult, SmokeReport


@dataclass(frozen=True)
class CheckingFiles:
    """Files on the disk are being compared with their checksums: bytes read of all."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class FileDamaged:
    """A file is not what it should be, and will be fetched again; `found` says how it differs."""

    file: str
    found: str


@dataclass(frozen=True)
class DownloadBegan:
    """`files` of `total_bytes` are wanted in `folder`, `missing_bytes` of them are yet to come."""

    model: str
    commit: str
    folder: Path
    files: int
    total_bytes: int
    missing_bytes: int


@dataclass(frozen=True)
class DownloadProgress:
    """How much is here by now. The rate is that of the last seconds, None until it can be told."""

    done_bytes: int
    total_bytes: int
    files_done: int
    files: int
    bytes_per_s: float | None
    left_s: float | None


@dataclass(frozen=True)
class DownloadEnded:
    """All files are in `folder` and are what the Hub promises."""

    model: str
    commit: str
    folder: Path
    files: int
    total_bytes: int
    fetched_bytes: int
    duration_s: float


@dataclass(frozen=True)
class EngineStarted:
    """The engine's leader runs as `pid`; what it prints goes to `log`."""

    pid: int
    log: Path


@dataclass(frozen=True)
class PhaseBegan:
    """The start has come to `phase`, `at_s` seconds after the leader was started."""

    phase: str
    at_s: float


@dataclass(frozen=True)
class PhaseProgress:
    """How far the current phase is: "50 %"."""

    phase: str
    detail: str


@dataclass(frozen=True)
class EngineReady:
    """A token was generated, `ready_s` seconds after the leader was started."""

    url: str
    served_model_name: str
    ready_s: float
    needs_key: bool
    has_chat: bool


@dataclass(frozen=True)
class Noticed:
    """Something went wrong that does not end the run."""

    problem: Problem


@dataclass(frozen=True)
class Stopping:
    """The engine is being stopped, and why."""

    reason: str
    grace_s: float


@dataclass(frozen=True)
class EngineStopped:
    """Nothing of the engine is left, or `left` are the pids that would not go."""

    duration_s: float
    killed: bool
    left: tuple[int, ...]


Event = (
    CheckingFiles
    | FileDamaged
    | DownloadBegan
    | DownloadProgress
    | DownloadEnded
    | EngineStarted
    | PhaseBegan
    | PhaseProgress
    | EngineReady
    | Stopping
    | EngineStopped
    | Noticed
    | CheckResult
    | SmokeReport
)
OnEvent = Callable[[Event], None]
