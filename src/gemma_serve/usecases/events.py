"""What happens while an engine starts, runs and stops, as values for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_serve.engine.diagnosis.diagnosis import Diagnosis
from gemma_serve.engine.ladder import StopStep
from gemma_serve.errors import Problem
from gemma_serve.planning.smoke.report import CheckResult, SmokeReport
from gemma_serve.usecases.diagnose import read_diagnosis


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
class Silent:
    """The engine has printed nothing for `silent_s` seconds; `phase` was its last phase."""

    phase: str
    silent_s: float


@dataclass(frozen=True)
class HealthChanged:
    """A ready engine stopped generating, and `reason` says how that showed; or it does again."""

    ok: bool
    reason: str


@dataclass(frozen=True)
class EngineDied:
    """The engine ended by itself, or was ended because it generated nothing any more."""

    cause: str


@dataclass(frozen=True)
class Restarting:
    """It is started again after `pause_s` seconds, for the `attempt`th time in a row."""

    pause_s: float
    attempt: int


@dataclass(frozen=True)
class Stopping:
    """The engine is being stopped, why, and after how long at most it is killed."""

    reason: str
    grace_s: float


@dataclass(frozen=True)
class EngineStopped:
    """The engine was ended, rung by rung, and what was found then.

    `left` are the pids that would not go. `port_is_free` says whether another server could listen
    there now. `gpu_bytes_held` is the memory that its GPUs did not get back, None without a GPU.
    """

    duration_s: float
    killed: bool
    left: tuple[int, ...]
    steps: tuple[StopStep, ...] = ()
    port_is_free: bool = True
    gpu_bytes_held: int | None = None


@dataclass(frozen=True)
class Diagnosed:
    """Why a start failed, or an engine died, from its log and from how it ended."""

    diagnosis: Diagnosis


@dataclass(frozen=True)
class AutoFixed:
    """A failure is being mended by `what`, and the start tried again, for the `attempt`th time.

    `message` is the failure's own.
    """

    id: str
    message: str
    what: str
    attempt: int


@dataclass(frozen=True)
class Failed:
    """The run is over, and not because somebody asked for it."""

    problem: Problem
    exit_code: int


Event = (
    CheckingFiles
    | FileDamaged
    | DownloadBegan
    | DownloadProgress
    | DownloadEnded
    | EngineStarted
    | PhaseBegan
    | PhaseProgress
    | Silent
    | EngineReady
    | HealthChanged
    | EngineDied
    | Restarting
    | Stopping
    | EngineStopped
    | Diagnosed
    | AutoFixed
    | Failed
    | Noticed
    | CheckResult
    | SmokeReport
)
OnEvent = Callable[[Event], None]

# The names in `events.jsonl` and in `up --json`.
EVENT_NAMES: dict[type, str] = {
    CheckingFiles: "checking_files",
    FileDamaged: "file_damaged",
    DownloadBegan: "download_began",
    DownloadProgress: "download_progress",
    DownloadEnded: "download_ended",
    EngineStarted: "engine_started",
    PhaseBegan: "phase_began",
    PhaseProgress: "phase_progress",
    Silent: "silent",
    EngineReady: "ready",
    HealthChanged: "health_changed",
    EngineDied: "engine_died",
    Restarting: "restarting",
    CheckResult: "smoke_check",
    SmokeReport: "smoke_test",
    Noticed: "noticed",
    Stopping: "stopping",
    EngineStopped: "engine_stopped",
    Diagnosed: "diagnosed",
    AutoFixed: "auto_fix",
    Failed: "failed",
}


def event_line(event: Event, *, time: float) -> dict[str, Any]:
    """An event as one JSON object: its name, when (seconds since 1970), and its own fields."""
    return {"event": EVENT_NAMES[type(event)], "time": round(time, 3), **asdict(event)}


def read_event(line: Mapping[str, Any]) -> Event | None:
    """What `event_line` wrote of a supervisor's events; None for anything else."""
    fields = {name: value for name, value in line.items() if name not in ("event", "time")}
    kind = _READ_BACK.get(str(line.get("event")))
    if kind is None:
        return None
    try:
        for name, read in _READERS.items():
            if name in fields:
                fields[name] = read(fields[name])
        event: Event = kind(**fields)
    except (KeyError, TypeError):
        return None  # another version's
    return event


_READ_BACK: dict[str, Callable[..., Event]] = {
    name: kind for kind, name in EVENT_NAMES.items() if kind not in (CheckResult, SmokeReport)
}
_READERS: dict[str, Callable[[Any], Any]] = {
    "problem": lambda value: Problem(**value),
    "diagnosis": read_diagnosis,
    "log": Path,
    "left": tuple,
    "steps": lambda value: tuple(StopStep(**step) for step in value),
}
