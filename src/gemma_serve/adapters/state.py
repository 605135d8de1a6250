"""Deployments on disk: one folder each, with what is running and the engine's log."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from gemma_serve.adapters.settings import STATE_DIR_VARIABLE
from gemma_serve.adapters.whole_files import write_whole
from gemma_serve.errors import GemmaServeError, UsageError

_RECORD = "deployment.json"
_LOG = "engine.log"


@dataclass(frozen=True)
class Deployment:
    """One engine that `up` started.

    `pid` is the leader's; with `started_at` (seconds since 1970, as the kernel counts them) it
    names one process for good. Of an API key only the file's path is kept.
    """

    name: str
    url: str
    served_model_name: str
    model: str
    pid: int
    started_at: float
    log: Path
    api_key_file: Path | None = None
    ready: bool = False


def deployment_name(served_name: str, port: int) -> str:
    """The folder's name: `gemma-7b-it-8000`."""
    slug = re.sub(r"[^a-z0-9.]+", "-", served_name.rsplit("/", 1)[-1].lower()).strip("-.")
    return f"{slug or 'model'}-{port}"


def deployments_dir(environ: Mapping[str, str] | None = None) -> Path:
    """The folder of all deployments."""
    return state_dir(environ) / "deployments"


def state_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Where all that we keep is; `GEMMA_SERVE_STATE_DIR` moves it."""
    chosen = (os.environ if environ is None else environ).get(STATE_DIR_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return platformdirs.user_state_path("gemma-serve")


def prepare_log(name: str, environ: Mapping[str, str] | None = None) -> Path:
    """An empty log, readable by its owner only; the one of the last start moves to `.1`.

    Raises:
        UsageError: the state folder can't be written.
    """
    folder = deployments_dir(environ) / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        log = folder / _LOG
        if log.exists():
            log.replace(folder / f"{_LOG}.1")
        os.close(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
    except OSError as error:
        raise _unwritable(folder, error) from None
    return log


def save_deployment(deployment: Deployment) -> None:
    """Write the record whole: a reader sees the old one or the new one, never half of it.

    Raises:
        UsageError: the state folder can't be written.
    """
    folder = deployment.log.parent
    text = json.dumps(asdict(deployment), default=str, indent=1)
    try:
        write_whole(folder / _RECORD, text, mode=0o600)
    except OSError as error:
        raise _unwritable(folder, error) from None


def remove_deployment(deployment: Deployment) -> None:
    """Forget a deployment that ended; its log stays, and so does a record of another process."""
    record = deployment.log.parent / _RECORD
    found = _load(record)
    if found is None or found.pid == deployment.pid:
        record.unlink(missing_ok=True)


@contextmanager
def claim_port(port: int, environ: Mapping[str, str] | None = None) -> Iterator[None]:
    """Keep others of ours off `port` while the engine, which binds it late, is starting.

    Raises:
        GemmaServeError: another `up` has claimed it.
        UsageError: the state folder can't be written.
    """
    folder = deployments_dir(environ)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / f"port-{port}.lock").open("w")
    except OSError as error:
        raise _unwritable(folder, error) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise GemmaServeError(
                f"another `gemma-serve up` is using port {port}",
                code="port.in_use",
                hint="use another port: --port 0 takes any that is free",
            ) from None
        yield


def running_deployments(environ: Mapping[str, str] | None = None) -> list[Deployment]:
    """The deployments whose leader is alive, by name. Records that can't be read don't count."""
    records = sorted(deployments_dir(environ).glob(f"*/{_RECORD}"))
    found = [deployment for path in records if (deployment := _load(path)) is not None]
    return [deployment for deployment in found if _is_alive(deployment)]


def _load(path: Path) -> Deployment | None:
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        key_file = fields["api_key_file"]
        fields["log"] = Path(fields["log"])
        fields["api_key_file"] = None if key_file is None else Path(key_file)
        return Deployment(**fields)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _is_alive(deployment: Deployment) -> bool:
    """Whether the very process that was started still runs: pids are used again."""
    try:
        process = psutil.Process(deployment.pid)
        same = abs(process.create_time() - deployment.started_at) < 1
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _unwritable(folder: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot write the state folder {folder}: {error.strerror}",
        code="state.unwritable",
        hint=f"name another one: {STATE_DIR_VARIABLE}=/path/to/folder",
    )
