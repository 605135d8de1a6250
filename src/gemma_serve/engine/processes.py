"""Processes as the kernel tells of them: who lives, who belongs together, and ending them.

Linux only, as vLLM is. Everything here goes by `ProcessId`, never by a bare pid.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from gemma_serve.planning.process_id import Member, ProcessId

_PR_SET_CHILD_SUBREAPER = 36
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_DEAD = ("Z", "X", "x")


def identify(pid: int) -> ProcessId | None:
    """The living process that has `pid` now; None for none, or one that waits to be collected."""
    fields = _stat_fields(pid)
    if fields is None or fields[0] in _DEAD:
        return None
    return ProcessId(pid, int(fields[19]))


def lives(process: ProcessId) -> bool:
    """Whether that very process still runs (stopped counts, a zombie doesn't)."""
    return identify(process.pid) == process


def _stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on: state, parent, group, session, ..."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name in parentheses may hold blanks and parentheses of its own.
    return text.rpartition(")")[2].split()


def boot_id() -> str:
    """What names this boot of the machine; "" where the kernel doesn't tell."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def become_subreaper() -> bool:
    """Inherit orphaned descendants, as init would; whether the kernel agreed (Linux 3.4).

    Then no process that the engine starts can leave our tree, whatever session it opens and
    whoever of its parents dies.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def descendants(pid: int) -> list[ProcessId]:
    """Every living process below `pid`."""
    with suppress(psutil.Error):
        below = psutil.Process(pid).children(recursive=True)
        found = (identify(process.pid) for process in below)
        return [process for process in found if process is not None]
    return []


def session_members(session: int) -> list[ProcessId]:
    """Every living process of the session."""
    found = []
    for pid in psutil.pids():
        with suppress(OSError):
            if os.getsid(pid) == session and (process := identify(pid)) is not None:
                found.append(process)
    return found


def vllm_title(pid: int) -> str:
    """The title that vLLM gives its long-lived processes ("VLLM::Worker_TP0"); "" for others."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    title = line.replace(b"\0", b" ").decode(errors="replace").strip()
    return title if title.startswith("VLLM::") else ""


def send(process: ProcessId, signum: signal.Signals) -> None:
    """Send a signal to that very process, if it still lives and may be signalled."""
    if lives(process):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signum)


def kill_all(processes: Iterable[ProcessId]) -> None:
    """SIGKILL to each; a stopped process ends of it as well."""
    for process in processes:
        send(process, signal.SIGKILL)


def survivors(members: Iterable[Member], session: int | None) -> list[ProcessId]:
    """What still lives of an engine that nobody looks after any more.

    The members that were written down; what they have started since; and the rest of their
    session, provided that one of them is still in it: only then is it the same session, since
    the number of one that has ended may be given to another.
    """
    known = [member.process for member in members if lives(member.process)]
    found = set(known)
    for process in known:
        found.update(descendants(process.pid))
    if session is not None and any(_session_of(process.pid) == session for process in known):
        found.update(session_members(session))
    return sorted(found - {identify(os.getpid())}, key=lambda process: process.pid)


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def collect_zombies(spare: frozenset[int]) -> None:
    """Collect our dead children but those in `spare`, as PID 1 and a subreaper have to."""
    with suppress(psutil.Error):
        for child in psutil.Process().children():
            with suppress(psutil.Error, ChildProcessError):
                if child.pid not in spare and child.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(child.pid, os.WNOHANG)


def listens_on(pids: Iterable[int], port: int) -> bool:
    """Whether one of `pids` listens on TCP `port`."""
    for pid in pids:
        with suppress(psutil.Error):
            for connection in psutil.Process(pid).net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,):
                    return True
    return False
