"""An engine under its guard, as the supervisor holds it.

The guard does the work while it lives. If it dies, its children come to us, for we are a
subreaper too; then we end whatever was written down and whatever is below us.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from gemma_serve.engine.ladder import (
    GRACE_S,
    KILL_TIMEOUT_S,
    LINGER_S,
    Descent,
    Ending,
    StopStep,
    descend,
)
from gemma_serve.engine.processes import (
    become_subreaper,
    collect_zombies,
    descendants,
    identify,
    listens_on,
    lives,
    send,
    survivors,
)
from gemma_serve.engine.reports import (
    Exit,
    Joined,
    LeaderEnded,
    LogTrouble,
    Lost,
    NotStarted,
    Order,
    Report,
    SegmentsSeen,
    Started,
    Stopped,
    read_report,
)
from gemma_serve.engine.shared_files import remove_shared_files, remove_temporary_folder
from gemma_serve.errors import EngineFailed
from gemma_serve.planning.process_id import Member, ProcessId, SharedFile

# Python's start and the imports of the guard; on a machine that is busy with other starts too.
_START_TIMEOUT_S = 60.0
# Beyond the ladder's own clock, before a guard that doesn't answer is taken for dead.
_PATIENCE_S = LINGER_S + KILL_TIMEOUT_S + 2.0


@dataclass(frozen=True)
class Family:
    """What is written down of an engine, so that anyone may end it later."""

    guard: ProcessId
    leader: ProcessId
    members: tuple[Member, ...]
    shared_files: tuple[SharedFile, ...]
    temporary_folder: Path


class GuardedEngine:
    """A running engine. Make it with `start_engine`."""

    def __init__(
        self, popen: subprocess.Popen[bytes], order: Order, on_news: Callable[[], None]
    ) -> None:
        self._popen = popen
        self._order = order
        self._on_news = on_news
        self._reports: deque[Report] = deque()
        self._members: dict[ProcessId, str] = {}
        self._segments: tuple[SharedFile, ...] = ()
        self._finished = threading.Event()
        self._spare = frozenset(process.pid for process in descendants(os.getpid()))
        self.guard = identify(popen.pid) or ProcessId(popen.pid, 0)
        self.leader: ProcessId | None = None
        self.exit: Exit | None = None
        self.lost: Member | None = None
        self.log_trouble: str | None = None
        self.not_started: str | None = None
        self._stopped: Stopped | None = None
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        """Collect what the guard reports, until it ends."""
        assert self._popen.stdout is not None
        with self._popen.stdout as lines:
            for line in lines:
                # The last line of a guard that was killed is torn.
                with suppress(ValueError, KeyError, TypeError):
                    self._reports.append(read_report(line.decode()))
                    self._on_news()
        self._popen.wait()
        self._finished.set()
        self._on_news()

    def take_in(self) -> bool:
        """Bring the fields up to date with what the guard reported; whether anything was new."""
        news = False
        while self._reports:
            self._take(self._reports.popleft())
            news = True
        return news

    def _take(self, report: Report) -> None:
        if isinstance(report, Started):
            self.leader = report.leader
            self._members.setdefault(report.leader, "")
        elif isinstance(report, NotStarted):
            self.not_started = report.reason
        elif isinstance(report, Joined):
            self._members[report.member.process] = report.member.title
        elif isinstance(report, SegmentsSeen):
            self._segments = report.files
        elif isinstance(report, Lost):
            self.lost = self.lost or report.member
        elif isinstance(report, LeaderEnded):
            self.exit = report.exit
        elif isinstance(report, LogTrouble):
            self.log_trouble = report.reason
        else:
            self._stopped = report

    @property
    def guard_is_gone(self) -> bool:
        """Whether the guard has ended without having ended the engine."""
        return self._finished.is_set() and not self._reports and self._stopped is None

    @property
    def family(self) -> Family:
        """What there is to end. Call it when the leader has been started."""
        assert self.leader is not None
        members = tuple(Member(process, title) for process, title in self._members.items())
        return Family(
            self.guard, self.leader, members, self._segments, self._order.temporary_folder
        )

    def listens_on(self, port: int) -> bool:
        """Whether it is a process of this engine that listens on `port`."""
        return listens_on((process.pid for process in list(self._members)), port)

    def stop(
        self,
        *,
        drain_s: float,
        wait: Callable[[float], None],
        hurry: Callable[[], bool],
        gently: bool = True,
    ) -> Stopped:
        """End the engine and everything that it started.

        Args:
            drain_s: how long requests in flight may go on.
            wait: pauses for that many seconds or until something happened.
            hurry: whether somebody asked again; from then on nothing is waited for.
            gently: False kills at once, when there is nothing left to end in order.
        """
        begun = time.monotonic()
        send(self.guard, signal.SIGCONT)  # somebody may have halted it
        self._command({"stop": drain_s, "hurry": not gently})
        until = begun + drain_s + GRACE_S + _PATIENCE_S
        hurried = not gently
        while not self._has_stopped() and time.monotonic() < until:
            if not hurried and hurry():
                hurried = True
                self._command({"hurry": True})
                until = min(until, time.monotonic() + GRACE_S)
            wait(0.1)
        if self._stopped is None:
            return self._stop_without_guard(begun)
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(_PATIENCE_S)
        self.let_go()
        return self._stopped

    def _has_stopped(self) -> bool:
        self.take_in()
        return self._stopped is not None or self.guard_is_gone

    def let_go(self) -> None:
        """Close the pipe to the guard; one that still lives ends its engine then."""
        assert self._popen.stdin is not None
        with suppress(OSError):
            self._popen.stdin.close()

    def _command(self, command: Mapping[str, object]) -> None:
        assert self._popen.stdin is not None
        with suppress(OSError, ValueError):  # gone: then nobody needs it
            self._popen.stdin.write(json.dumps(command).encode() + b"\n")
            self._popen.stdin.flush()

    def _stop_without_guard(self, begun: float) -> Stopped:
        """The guard is dead or halted: end what it looked after."""
        send(self.guard, signal.SIGKILL)
        self._popen.wait()
        self.let_go()
        self.take_in()
        if self.leader is None:
            return Stopped(Descent((), ()), time.monotonic() - begun)
        ended = end_family(self.family, adopted=self._adopted)
        return Stopped(ended, time.monotonic() - begun)

    def _adopted(self) -> list[ProcessId]:
        """What came to us when the guard died: whatever is below us and wasn't before."""
        collect_zombies(spare=self._spare)
        if os.getpid() == 1:
            # Everybody's orphans come to us; those of the session are found without this.
            return []
        return [process for process in descendants(os.getpid()) if process.pid not in self._spare]

    def collect_zombies(self) -> None:
        """Collect whoever ended below us, as PID 1 of a container has to."""
        collect_zombies(spare=self._spare | {self._popen.pid})


def start_engine(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Path,
    events: Path,
    guard_log: Path,
    temporary_folder: Path,
    keep_open: Sequence[int],
    on_news: Callable[[], None],
) -> GuardedEngine:
    """Start `argv` under a guard of its own, writing to `log`.

    Args:
        events: where the guard leaves word if it ends the engine without us.
        guard_log: where the guard's own failures go.
        temporary_folder: the engine's TMPDIR, removed at the end.
        keep_open: file descriptors that the guard keeps for as long as it lives: locks.
        on_news: called from another thread whenever there is something to take in.

    Raises:
        EngineFailed: the command can't be run.
    """
    become_subreaper()
    order = Order(tuple(argv), log, events, temporary_folder)
    with guard_log.open("ab") as errors:
        popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "gemma_serve.engine.guard"],
            env={**environment, "TMPDIR": str(temporary_folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            pass_fds=tuple(keep_open),
        )
    with ExitStack() as if_it_fails:
        if_it_fails.callback(_end_guard, popen)
        engine = GuardedEngine(popen, order, on_news)
        engine._command(json.loads(json.dumps(asdict(order), default=str)))
        _wait_for_leader(engine, argv[0], guard_log)
        if_it_fails.pop_all()
    return engine


def _end_guard(popen: subprocess.Popen[bytes]) -> None:
    """Let the guard end whatever it may have started."""
    assert popen.stdin is not None
    with suppress(OSError):
        popen.stdin.close()
    popen.wait()


def _wait_for_leader(engine: GuardedEngine, program: str, guard_log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while engine.leader is None:
        engine.take_in()
        if engine.not_started is not None:
            raise EngineFailed(
                f"cannot run {program}: {engine.not_started}",
                code="engine.not_runnable",
                hint="name the Python that has vLLM with --engine-python",
            )
        if engine.guard_is_gone or time.monotonic() > deadline:
            raise EngineFailed(
                "the process that guards the engine did not start",
                code="engine.no_guard",
                hint=f"what it said is in {guard_log}",
            )
        time.sleep(0.01)


def end_family(family: Family, *, adopted: Callable[[], list[ProcessId]] = list) -> Descent:
    """End an engine whose guard is gone: what was written down, and what is below it.

    A leader without a guard can't write its log, so nobody waits for an orderly end.
    """

    def left() -> list[ProcessId]:
        found = {*survivors(family.members, family.guard.pid), *adopted()}
        return sorted(found, key=lambda process: process.pid)

    ending = Ending(
        members=left,
        leader_lives=lambda: lives(family.leader),
        terminate=lambda: send(family.leader, signal.SIGTERM),
        wait=time.sleep,
        hurry=lambda: True,
    )
    descent = descend(ending)
    begun = time.monotonic()
    removed = remove_shared_files(family.shared_files)
    remove_temporary_folder(family.temporary_folder)
    clean = StopStep("clean", time.monotonic() - begun, len(removed))
    return Descent((*descent.steps, clean), descent.left)
