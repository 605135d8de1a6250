"""Deployments on disk: one folder each, with what is running, its settings, log and events."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gemma_serve.adapters.settings import STATE_DIR_VARIABLE
from gemma_serve.adapters.whole_files import write_whole
from gemma_serve.errors import Problem, UsageError
from gemma_serve.planning.process_id import Member, ProcessId, SharedFile

State = Literal[
    "starting", "ready", "unhealthy", "restarting", "stopping", "stopped", "failed", "unreadable"
]

_RECORD = "deployment.json"
_STOP_REQUEST = "stop.json"
_SCHEMA = 1


@dataclass(frozen=True)
class Deployment:
    """One engine that `up` started, as its supervisor last wrote it down.

    Times are seconds since 1970, for people; processes are named by `ProcessId`, which no change
    of the clock touches, and hold for the boot `boot_id` only. `needs_key` and `api_key_file` say
    how clients prove themselves; the key itself is never written. `last_death` is why it was last
    started again, if it was. `phase_began_at` belongs to `phase`, the last one of the start.
    """

    name: str
    folder: Path
    state: State
    changed_at: float
    url: str
    served_model_name: str
    model: str
    boot_id: str
    started_at: float
    supervisor: ProcessId | None = None
    guard: ProcessId | None = None
    leader: ProcessId | None = None
    members: tuple[Member, ...] = ()
    shared_files: tuple[SharedFile, ...] = ()
    temporary_folder: Path | None = None
    detached: bool = False
    engine: str = ""
    gpus: tuple[str, ...] = ()
    phase: str = ""
    phase_began_at: float = 0.0
    ready_s: float | None = None
    restart: str = "no"
    restarts: int = 0
    last_death: str = ""
    needs_key: bool = False
    api_key_file: Path | None = None
    problem: Problem | None = None

    @property
    def log(self) -> Path:
        """What the engine prints."""
        return DeploymentFolder(self.folder).log

    @property
    def events(self) -> Path:
        """What happened since the last `up`, as JSON lines."""
        return DeploymentFolder(self.folder).events


@dataclass(frozen=True)
class DeploymentFolder:
    """The files of one deployment."""

    path: Path

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self.path.name

    @property
    def log(self) -> Path:
        """The engine's output; older parts are beside it as `.1`, `.2`, ..."""
        return self.path / "engine.log"

    @property
    def events(self) -> Path:
        """What happened since the last `up`, as JSON lines; that before is in `.1`."""
        return self.path / "events.jsonl"

    @property
    def run(self) -> Path:
        """The configuration as run."""
        return self.path / "run.json"

    @property
    def timeline(self) -> Path:
        """How long each phase of the last good start took."""
        return self.path / "timeline.json"

    @property
    def diagnosis(self) -> Path:
        """Why the last start failed, and how the engine ended."""
        return self.path / "diagnosis.json"

    @property
    def suspect(self) -> Path:
        """There while a start compiles: the folders whose content is not to be trusted then."""
        return self.path / "compiling.json"

    @property
    def supervisor_log(self) -> Path:
        """What a supervisor in the background, or a guard, has to say of its own failures."""
        return self.path / "supervisor.log"

    def begin(self) -> None:
        """Make room for a new run: the last one's log and events are kept as `.1`.

        Raises:
            UsageError: the state folder can't be written.
        """
        try:
            private_folder(self.path)
            self.stop_request.unlink(missing_ok=True)
            self.diagnosis.unlink(missing_ok=True)
            for file in (self.log, self.events):
                if file.exists():
                    file.replace(file.with_name(f"{file.name}.1"))
                os.close(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
            os.close(os.open(self.supervisor_log, os.O_CREAT | os.O_WRONLY, 0o600))
        except OSError as error:
            raise unwritable(self.path, error) from None

    @property
    def stop_request(self) -> Path:
        """How `stop` tells the supervisor more than a signal can."""
        return self.path / _STOP_REQUEST

    def write_json(self, path: Path, value: Mapping[str, Any]) -> None:
        """Write one of the files whole, for its owner only.

        Raises:
            UsageError: it can't be written.
        """
        try:
            write_whole(path, json.dumps(value, default=str, indent=1), mode=0o600)
        except OSError as error:
            raise unwritable(self.path, error) from None

    def read_json(self, path: Path) -> dict[str, Any] | None:
        """What `write_json` wrote; None for a file that is missing or damaged."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def add_event(self, line: Mapping[str, Any]) -> OSError | None:
        """Append one event; what kept it from being written."""
        try:
            handle = os.open(self.events, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
            try:
                os.write(handle, json.dumps(line, default=str).encode() + b"\n")
            finally:
                os.close(handle)
        except OSError as error:
            return error
        return None

    def load(self) -> Deployment | None:
        """The record; None where there is none. A damaged one has the state `unreadable`."""
        try:
            text = (self.path / _RECORD).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return self._unreadable()
        try:
            return _read_record(json.loads(text), self.path)
        except (ValueError, TypeError, KeyError, AttributeError):
            return self._unreadable()

    def _unreadable(self) -> Deployment:
        return Deployment(
            name=self.name, folder=self.path, state="unreadable", changed_at=0.0, url="",
            served_model_name="", model="", boot_id="", started_at=0.0,
        )  # fmt: skip

    def save(self, deployment: Deployment) -> None:
        """Write the record whole: a reader sees the old one or the new one, never half of it.

        Raises:
            UsageError: the state folder can't be written.
        """
        fields = asdict(deployment)
        del fields["folder"]
        with suppress(OSError):
            private_folder(self.path)  # somebody may have removed it
        self.write_json(self.path / _RECORD, {"schema": _SCHEMA, **fields})


def _read_record(fields: dict[str, Any], folder: Path) -> Deployment:
    if fields.pop("schema") != _SCHEMA:
        raise ValueError("written by another version")

    def process(value: Any) -> ProcessId | None:
        return None if value is None else ProcessId(int(value["pid"]), int(value["start_ticks"]))

    def path(value: Any) -> Path | None:
        return None if value is None else Path(value)

    members = []
    for value in fields["members"]:
        found = process(value["process"])
        if found is not None:
            members.append(Member(found, value["title"]))
    problem = fields["problem"]
    return Deployment(
        **{
            **fields,
            "folder": folder,
            "name": folder.name,
            "changed_at": float(fields["changed_at"]),
            "started_at": float(fields["started_at"]),
            "phase_began_at": float(fields["phase_began_at"]),
            "supervisor": process(fields["supervisor"]),
            "guard": process(fields["guard"]),
            "leader": process(fields["leader"]),
            "members": tuple(members),
            "shared_files": tuple(SharedFile(**value) for value in fields["shared_files"]),
            "temporary_folder": path(fields["temporary_folder"]),
            "api_key_file": path(fields["api_key_file"]),
            "gpus": tuple(fields["gpus"]),
            "problem": None if problem is None else Problem(**problem),
        }
    )


def deployments_dir(environ: Mapping[str, str] | None = None) -> Path:
    """The folder of all deployments."""
    return state_dir(environ) / "deployments"


def deployment_folder(name: str, environ: Mapping[str, str] | None = None) -> DeploymentFolder:
    """The folder of the deployment `name`, which need not exist."""
    return DeploymentFolder(deployments_dir(environ) / name)


def all_deployments(environ: Mapping[str, str] | None = None) -> list[Deployment]:
    """Every deployment that is written down, by name, whatever became of it."""
    folders = sorted(path.parent for path in deployments_dir(environ).glob(f"*/{_RECORD}"))
    found = (DeploymentFolder(path).load() for path in folders)
    return [deployment for deployment in found if deployment is not None]


def state_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Where all that we keep is; `GEMMA_SERVE_STATE_DIR` moves it."""
    chosen = (os.environ if environ is None else environ).get(STATE_DIR_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return platformdirs.user_state_path("gemma-serve")


def private_folder(path: Path) -> None:
    """Make `path` a folder for its owner only. Raises OSError."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    with suppress(OSError):
        path.chmod(0o700)


def unwritable(folder: Path, error: OSError) -> UsageError:
    """The error of whoever can't write below the state folder."""
    return UsageError(
        f"cannot write the state folder {folder}: {error.strerror}",
        code="state.unwritable",
        hint=f"name another one: {STATE_DIR_VARIABLE}=/path/to/folder",
    )
