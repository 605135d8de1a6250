"""Who has a deployment's name, and who has a port: locks that end with whoever holds them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from gemma_serve.adapters.state import (
    DeploymentFolder,
    deployment_folder,
    private_folder,
    state_dir,
    unwritable,
)
from gemma_serve.errors import GemmaServeError
from gemma_serve.planning.process_id import ProcessId


@dataclass
class Lock:
    """A claim that holds for as long as any process has `fd` open; a guard inherits it."""

    fd: int
    path: Path

    def release(self) -> None:
        """Give up our own hold of it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(frozen=True)
class Claim:
    """A name and a port that are ours."""

    name: Lock
    port: Lock

    @classmethod
    def inherited(
        cls, fds: tuple[int, int], name: str, port: int, environ: Mapping[str, str]
    ) -> Claim:
        """The claim that whoever started us has made for us; `fds` are those of its `fds`."""
        return cls(
            Lock(fds[0], _name_lock_path(deployment_folder(name, environ))),
            Lock(fds[1], _port_lock_path(port, environ)),
        )

    @property
    def fds(self) -> tuple[int, int]:
        """The descriptors that keep it, for a child to inherit."""
        return self.name.fd, self.port.fd

    def finish(self) -> None:
        """The deployment has ended: ports come and go, so a port's file goes too."""
        self.port.path.unlink(missing_ok=True)

    def note_holder(self, holder: ProcessId, boot_id: str) -> None:
        """Write down who has it, for when the deployment's record gets damaged."""
        text = json.dumps({**asdict(holder), "boot_id": boot_id})
        with suppress(OSError):
            os.ftruncate(self.name.fd, 0)
            os.pwrite(self.name.fd, text.encode(), 0)


def read_holder(folder: DeploymentFolder, boot_id: str) -> ProcessId | None:
    """Who claimed the name last in this boot; None where that can't be read."""
    value = folder.read_json(_name_lock_path(folder)) or {}
    if value.get("boot_id") != boot_id:
        return None
    try:
        return ProcessId(int(value["pid"]), int(value["start_ticks"]))
    except (KeyError, TypeError, ValueError):
        return None


def claim_name(name: str, environ: Mapping[str, str] | None = None) -> Lock | None:
    """Claim the deployment `name`; None while somebody has it: its supervisor or its guard.

    Raises:
        UsageError: the state folder can't be written.
    """
    return _claim(_name_lock_path(deployment_folder(name, environ)))


def claim_port(port: int, environ: Mapping[str, str] | None = None) -> Lock:
    """Keep others of ours off `port` while the engine, which binds it late, is starting.

    Raises:
        GemmaServeError: another `up` has claimed it.
        UsageError: the state folder can't be written.
    """
    path = _port_lock_path(port, environ)
    lock = _claim(path)
    while lock is not None and not _is_at(lock, path):
        # Its former holder removed the file between our opening and claiming it.
        lock.release()
        lock = _claim(path)
    if lock is None:
        raise GemmaServeError(
            f"another `gemma-serve up` is using port {port}",
            code="port-in-use",
            hint="use another port: --port 0 takes any that is free",
        )
    return lock


def _name_lock_path(folder: DeploymentFolder) -> Path:
    return folder.path / "lock"


def _port_lock_path(port: int, environ: Mapping[str, str] | None) -> Path:
    return state_dir(environ) / "ports" / f"{port}.lock"


def _is_at(lock: Lock, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fd), path.stat())
    except OSError:
        return False


def _claim(path: Path) -> Lock | None:
    try:
        private_folder(path.parent)
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise unwritable(path.parent, error) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise unwritable(path.parent, error) from None
    return Lock(fd, path)
