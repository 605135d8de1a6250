"""One engine: the leader that we start, everything it starts, and the way they all end.

vLLM's core and workers outlive a leader that was killed and keep the GPU's memory. So the
leader gets a session of its own, its descendants are written down as they appear, and the end
is the end of all of them: whatever is in the session, and whatever was written down.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from gemma_serve.errors import EngineFailed

# Giving back tens of GB can take a killed process seconds on a busy machine.
_KILL_TIMEOUT_S = 10.0
_LINGER_S = 0.5


@dataclass(frozen=True)
class Exit:
    """How the leader ended: its exit code, or the signal that ended it."""

    code: int | None
    signum: int | None

    @classmethod
    def of(cls, returncode: int) -> Exit:
        """From Popen's return code, where a negative number is a signal."""
        return cls(None, -returncode) if returncode < 0 else cls(returncode, None)

    def __str__(self) -> str:
        if self.signum is None:
            return f"exit code {self.code}"
        try:
            return f"signal {signal.Signals(self.signum).name}"
        except ValueError:
            return f"signal {self.signum}"


def explain_end(how: Exit | None, lost: str | None, error: str | None) -> str:
    """Why the engine ended: what killed its leader, else its last `error`, else what is known."""
    if how is not None and how.signum is not None:
        return f"it was killed by {how}" + ("" if error is None else f"; last error: {error}")
    if error is not None:
        return error
    if lost is not None:
        return f"its process {lost} is gone, and no error is in its log"
    return f"it ended with {how} and no error in its log"


class EngineProcess:
    """A running engine. Make it with `start`."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen
        self._known: dict[int, psutil.Process] = {}
        self._titled: dict[int, str] = {}
        self.pid = popen.pid
        self.started_at = self._start_time()

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        on_exit: Callable[[], None],
    ) -> EngineProcess:
        """Start `argv` in a session of its own, writing to `log`.

        `on_exit` is called from another thread as soon as the leader has ended.

        Raises:
            EngineFailed: the command can't be run.
        """
        try:
            with log.open("ab") as out:
                popen = subprocess.Popen(
                    argv,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise EngineFailed(
                f"cannot run {argv[0]}: {reason}",
                code="engine.not_runnable",
                hint="name the Python that has vLLM with --engine-python",
            ) from None
        try:
            engine = cls(popen)
            threading.Thread(target=engine._wait_then, args=(on_exit,), daemon=True).start()
        except BaseException:
            popen.kill()
            popen.wait()
            raise
        return engine

    def _wait_then(self, on_exit: Callable[[], None]) -> None:
        self._popen.wait()
        on_exit()

    def _start_time(self) -> float:
        with suppress(psutil.Error):
            return float(psutil.Process(self.pid).create_time())
        return time.time()

    @property
    def exit(self) -> Exit | None:
        """How the leader ended, or None while it runs."""
        code = self._popen.poll()
        return None if code is None else Exit.of(code)

    def note_descendants(self) -> None:
        """Write down what the engine has started by now, so that it can be ended later.

        A process that opens a session of its own is found only while its parent still lives.
        """
        with suppress(psutil.Error):
            for process in psutil.Process(self.pid).children(recursive=True):
                self._known.setdefault(process.pid, process)
        for pid in self._known.keys() - self._titled.keys():
            if title := _vllm_title(self._known[pid]):
                self._titled[pid] = title

    def lost(self) -> str | None:
        """A process of vLLM's that has ended by itself: "VLLM::EngineCore (pid 12)".

        An engine whose core was killed can go on listening for seconds; nothing will answer.
        """
        # A copy: the thread that waits for readiness writes down descendants too.
        for pid, title in list(self._titled.items()):
            if not _lives(self._known[pid]):
                return f"{title} (pid {pid})"
        return None

    def members(self) -> list[psutil.Process]:
        """Every living process of the engine: its session and the descendants written down."""
        self.note_descendants()
        found = dict(self._known)
        for pid in psutil.pids():
            with suppress(psutil.Error, OSError):
                if os.getsid(pid) == self.pid:
                    found.setdefault(pid, psutil.Process(pid))
        return [process for process in found.values() if _lives(process)]

    def listens_on(self, port: int) -> bool:
        """Whether it is a process of this engine that listens on `port`."""
        for process in self.members():
            with suppress(psutil.Error):
                for connection in process.net_connections("tcp"):
                    listens = connection.status == psutil.CONN_LISTEN
                    if listens and connection.laddr[1:2] == (port,):
                        return True
        return False

    def ask_to_stop(self) -> None:
        """SIGTERM to the leader alone: it ends its own children in order."""
        with suppress(ProcessLookupError):
            self._popen.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to every process of the engine."""
        for process in self.members():
            with suppress(psutil.Error):
                process.kill()


def _vllm_title(process: psutil.Process) -> str | None:
    """The title that vLLM gives its long-lived processes; helpers have none."""
    with suppress(psutil.Error):
        title = " ".join(process.cmdline()).strip()
        return title if title.startswith("VLLM::") else None
    return None


def _lives(process: psutil.Process) -> bool:
    """Alive and the same that was written down; a zombie is dead and waits to be collected."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@dataclass(frozen=True)
class StopReport:
    """What stopping took: whether SIGKILL was needed, who is left, how long."""

    killed: bool
    left: tuple[int, ...]
    duration_s: float


def stop_engine(
    engine: EngineProcess,
    *,
    grace_s: float,
    wait: Callable[[float], None],
    hurry: Callable[[], bool],
) -> StopReport:
    """End the engine and everything it started.

    The ladder: SIGTERM to the leader; up to `grace_s` for all to go, cut short by `hurry`;
    half a second for the others to follow it; then SIGKILL for whatever is left.

    Args:
        wait: pauses for that many seconds or until something happened.
        hurry: whether the person asked a second time.
    """
    begun = time.monotonic()
    engine.note_descendants()
    if engine.exit is None:
        engine.ask_to_stop()
    while engine.exit is None and not hurry() and time.monotonic() < begun + grace_s:
        engine.note_descendants()
        wait(0.05)
    # Python's own helper processes end by themselves once the leader has.
    linger_until = time.monotonic() + _LINGER_S
    while engine.members() and not hurry() and time.monotonic() < linger_until:
        wait(0.02)
    killed = _kill_rest(engine)
    left = tuple(process.pid for process in engine.members())
    return StopReport(killed, left, time.monotonic() - begun)


def _kill_rest(engine: EngineProcess) -> bool:
    """SIGKILL until nobody is left or time is up; whether any had to be killed."""
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    killed = False
    while engine.members() and time.monotonic() < deadline:
        # Once more each round: what was just being forked is in the next list.
        engine.kill()
        killed = True
        time.sleep(0.02)
    return killed
