"""This machine: its memory, its disks, its cores, its ports."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from pathlib import Path

import psutil

from gemma_serve.errors import Problem


def available_memory_bytes() -> int:
    """Main memory that a new process can have without swapping."""
    return int(psutil.virtual_memory().available)


def total_memory_bytes() -> int:
    """All of the main memory."""
    return int(psutil.virtual_memory().total)


def out_of_memory_kills() -> int | None:
    """How many processes the kernel has killed for memory since it started; None if untold."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    counts = dict(line.split() for line in lines)
    return int(counts["oom_kill"]) if "oom_kill" in counts else None


def free_disk_bytes(folder: Path) -> int | None:
    """What this account may still write where `folder` is or will be; None where none can say."""
    for place in (folder, *folder.absolute().parents):
        try:
            usage = shutil.disk_usage(place)
            # What the kernel makes up, such as /proc, has no size at all.
            return usage.free if usage.total else None
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def can_write(folder: Path) -> bool:
    """Whether this account may put files where `folder` is or will be."""
    for place in (folder, *folder.absolute().parents):
        try:
            place.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return False  # a folder that this account may not look into
        return place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    return False


def free_shared_memory_bytes() -> int | None:
    """What processes may still share through /dev/shm; None where there is none."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None


def usable_cores() -> tuple[int, ...]:
    """The CPU cores that this process may run on; empty where the platform doesn't say."""
    if not hasattr(os, "sched_getaffinity"):
        return ()
    return tuple(sorted(os.sched_getaffinity(0)))


def free_port(host: str) -> int:
    """A port of `host` that nobody listens on at this moment."""
    with _bound(host, 0) as listener:
        return int(listener.getsockname()[1])


def port_problem(host: str, port: int) -> Problem | None:
    """Why a server can't listen on `host`:`port`, or None if it can."""
    try:
        _bound(host, port).close()
    except OSError as error:
        return _explain(host, port, error)
    return None


def _bound(host: str, port: int) -> socket.socket:
    family, kind, proto, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, proto)
    try:
        # As servers do: a port that only lingers in TIME_WAIT is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener


def _explain(host: str, port: int, error: OSError) -> Problem:
    if error.errno == errno.EADDRINUSE:
        return Problem(
            "port-in-use",
            f"port {port} on {host} is taken{_by_whom(port)}",
            f"stop that process, or use another port: --port {_next_port(port)}, "
            "or --port 0 for any",
        )
    if error.errno == errno.EACCES:
        return Problem(
            "port.not_permitted",
            f"port {port} on {host} needs more rights than this account has",
            "use a port from 1024 up, for instance --port 8000",
        )
    return Problem(
        "port.not_here" if error.errno == errno.EADDRNOTAVAIL else "port.bad_address",
        f"cannot listen on {host}: {error.strerror or error}",
        "use an address of this machine: --host 127.0.0.1, or --host 0.0.0.0 for all",
    )


def _next_port(port: int) -> int:
    return port + 1 if port < 65535 else 8000


def _by_whom(port: int) -> str:
    """ " by NAME (pid N)" where this account may know it."""
    try:
        listeners = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        pid = next((c.pid for c in listeners if c.laddr and c.laddr[1] == port), None)
        return "" if pid is None else f" by {psutil.Process(pid).name()} (pid {pid})"
    except psutil.Error:
        return ""
