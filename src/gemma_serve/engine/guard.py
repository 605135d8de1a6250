"""The process between the supervisor and the engine; run as `python -m gemma_serve.engine.guard`.

It leads the engine's session, inherits every orphan of it, writes the log, and ends all of it
when the supervisor asks, or is gone: the pipe from the supervisor ends with the supervisor,
however that dies. It takes one JSON object per line on its standard input, the `Order` first
and then commands (`{"stop": DRAIN_S}`, `{"hurry": true}`), and reports on its standard output,
one JSON object per line (`gemma_serve.engine.reports`).
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemma_serve.engine.ladder import Descent, Ending, StopStep, descend
from gemma_serve.engine.log_file import RotatingLog
from gemma_serve.engine.processes import (
    become_subreaper,
    collect_zombies,
    descendants,
    identify,
    lives,
    send,
    vllm_title,
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
    write_report,
)
from gemma_serve.engine.shared_files import (
    mapped_files,
    remove_shared_files,
    remove_temporary_folder,
    shared_files,
)
from gemma_serve.planning.process_id import Member, ProcessId, SharedFile

# How often new processes and segments are looked for: nothing depends on seeing them at once,
# since all of them stay below the guard.
_TICK_S = 0.2
_LATER_TICK_S = 1.0
_YOUNG_S = 120.0
# The engine must not wait for its log: a pipe of a megabyte holds 10,000 lines.
_PIPE_BYTES = 2**20
_F_SETPIPE_SZ = 1031


class Guard:
    """One engine from its start to its end."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._log = RotatingLog(order.log)
        self._log.begin_anew()
        self._members: dict[ProcessId, str] = {}
        self._lost: set[ProcessId] = set()
        self._segments: frozenset[SharedFile] = frozenset()
        self._foreign = shared_files()
        self._poll = select.poll()
        self._pidfds: dict[int, ProcessId] = {}
        self._commands = b""
        self._supervised = True
        self._stop_with: float | None = None
        self._hurry = False
        self._drained = False
        self._unsent = b""
        self._begun = time.monotonic()
        self._exit: Exit | None = None
        self._looked_at = 0.0

    def run(self) -> None:
        """Start the engine, look after it, and leave nothing of it."""
        self._open_pipes()
        leader = self._start()
        if leader is None:
            return
        self._leader = leader
        self._report(Started(leader))
        while self._stop_with is None and self._exit is None:
            self._wait(_TICK_S)
        if self._exit is None or self._members_left():
            self._look()
        self._end()

    def _open_pipes(self) -> None:
        for stream in (sys.stdin, sys.stdout):
            os.set_blocking(stream.fileno(), False)
        self._poll.register(sys.stdin.fileno(), select.POLLIN)
        wake_read, wake_write = os.pipe()
        for end in (wake_read, wake_write):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # Whoever stops us alone (systemd signals every process of a unit) means the engine.
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, self._asked)
        self._wake = wake_read
        self._poll.register(wake_read, select.POLLIN)

    def _asked(self, signum: int, frame: object) -> None:
        if self._stop_with is None:
            self._stop_with = 0.0

    def _start(self) -> ProcessId | None:
        self._output, write_end = os.pipe()
        with suppress(OSError):
            _widen(write_end)
        os.set_blocking(self._output, False)
        self._poll.register(self._output, select.POLLIN)
        try:
            # The guard's own environment is the engine's.
            self._popen = subprocess.Popen(
                self._order.argv,
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=subprocess.STDOUT,
            )
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            self._report(NotStarted(str(reason)))
            self._clean()
            return None
        finally:
            os.close(write_end)
        # Ended already and not yet collected: it has no identity any more, but an exit code.
        leader = identify(self._popen.pid) or ProcessId(self._popen.pid, 0)
        self._members[leader] = ""
        return leader

    def _wait(self, timeout_s: float) -> None:
        """Do what there is to do, waiting up to `timeout_s` for it."""
        due_s = max(0.0, self._looked_at + self._tick_s() - time.monotonic())
        events = self._poll.poll(min(timeout_s, due_s) * 1000)
        for fd, _ in events:
            if fd == self._output:
                self._pump()
            elif fd == self._wake:
                os.read(self._wake, 4096)
            elif fd == sys.stdin.fileno():
                self._hear()
        if any(fd in self._pidfds or fd == self._wake for fd, _ in events):
            self._note_deaths()
        if time.monotonic() >= self._looked_at + self._tick_s():
            self._look()
        self._send_unsent()

    def _tick_s(self) -> float:
        """Processes and segments are made while an engine starts, and hardly any afterwards."""
        return _TICK_S if time.monotonic() < self._begun + _YOUNG_S else _LATER_TICK_S

    def _hear(self) -> None:
        """Take in the supervisor's commands; its end is one too."""
        try:
            data = os.read(sys.stdin.fileno(), 65536)
        except BlockingIOError:
            return
        if not data:
            self._poll.unregister(sys.stdin.fileno())
            self._supervised = False
            # Nobody is left who would want a drain to go on.
            self._hurry = self._stop_with is not None
            self._stop_with = self._stop_with or 0.0
            return
        *lines, self._commands = (self._commands + data).split(b"\n")
        for line in lines:
            command = json.loads(line)
            if "stop" in command and self._stop_with is None:
                self._stop_with = float(command["stop"])
            self._hurry = self._hurry or bool(command.get("hurry"))

    def _pump(self) -> bool:
        """Move what the engine has printed into the log; whether there was anything."""
        try:
            data = os.read(self._output, _PIPE_BYTES)
        except BlockingIOError:
            return False
        if not data:
            if not self._drained:
                self._poll.unregister(self._output)
                self._drained = True
            return False
        trouble = self._log.write(data)
        if trouble is not None:
            self._report(LogTrouble(trouble.strerror or str(trouble)))
        return True

    def _note_deaths(self) -> None:
        """See who has ended, collect them, and tell of the leader and of vLLM's own."""
        if self._exit is None:
            pid, status = os.waitpid(self._leader.pid, os.WNOHANG)
            if pid:
                self._exit = Exit.of(os.waitstatus_to_exitcode(status))
                while self._pump():  # its last words are in the log when its end is told
                    continue
                self._report(LeaderEnded(self._exit))
        for process, title in self._members.items():
            if title and process not in self._lost and not lives(process):
                self._lost.add(process)
                self._report(Lost(Member(process, title)))
        for fd, process in list(self._pidfds.items()):
            if not lives(process):
                self._poll.unregister(fd)
                os.close(fd)
                del self._pidfds[fd]
        collect_zombies(spare=frozenset({self._leader.pid}) if self._exit is None else frozenset())

    def _look(self) -> None:
        """Write down which processes and segments there are by now."""
        self._looked_at = time.monotonic()
        living = self._members_left()
        for process in living:
            # vLLM's processes get their titles when they have been running for a while.
            title = self._members.get(process) or vllm_title(process.pid)
            if self._members.get(process) != title:
                self._members[process] = title
                self._report(Joined(Member(process, title)))
                self._watch(process)
        segments = mapped_files(process.pid for process in living) - self._foreign
        if segments - self._segments:
            self._segments |= segments
            self._report(SegmentsSeen(tuple(sorted(self._segments, key=lambda file: file.path))))
        self._note_deaths()

    def _watch(self, process: ProcessId) -> None:
        """Be woken when `process` ends, where the kernel can (Linux 5.3)."""
        if process in self._pidfds.values():
            return
        with suppress(OSError, AttributeError):
            fd = os.pidfd_open(process.pid)
            self._pidfds[fd] = process
            self._poll.register(fd, select.POLLIN)

    def _members_left(self) -> list[ProcessId]:
        return descendants(os.getpid())

    def _end(self) -> None:
        """Take everything down, tell how it went, and tell the events if nobody else can."""
        begun = time.monotonic()
        ending = Ending(
            members=self._members_left,
            leader_lives=lambda: self._exit is None,
            terminate=lambda: send(self._leader, signal.SIGTERM),
            wait=self._wait,
            hurry=lambda: self._hurry,
        )
        descent = descend(ending, drain_s=self._stop_with or 0.0)
        while self._pump():
            continue
        self._note_deaths()
        step = self._clean()
        stopped = Stopped(Descent((*descent.steps, step), descent.left), time.monotonic() - begun)
        self._report(stopped)
        if not self._supervised:
            self._leave_word(stopped)

    def _clean(self) -> StopStep:
        begun = time.monotonic()
        removed = remove_shared_files(self._segments)
        remove_temporary_folder(self._order.temporary_folder)
        self._log.close()
        return StopStep("clean", time.monotonic() - begun, len(removed))

    def _leave_word(self, stopped: Stopped) -> None:
        """The supervisor can't write to the events any more, and somebody will ask."""
        line = {
            "event": "guard_stopped_engine",
            "time": round(time.time(), 3),
            "reason": "the supervisor was gone",
            "duration_s": round(stopped.duration_s, 3),
            "steps": [asdict(step) for step in stopped.descent.steps],
            "left": list(stopped.descent.left),
        }
        with suppress(OSError), self._order.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _report(self, report: Report) -> None:
        """Tell the supervisor; one that is gone or doesn't read misses it."""
        self._unsent += write_report(report)
        self._send_unsent()

    def _send_unsent(self) -> None:
        if self._unsent:
            with suppress(OSError):
                written = os.write(sys.stdout.fileno(), self._unsent)
                self._unsent = self._unsent[written:]


def _widen(pipe: int) -> None:
    fcntl.fcntl(pipe, _F_SETPIPE_SZ, _PIPE_BYTES)


def _read_order(line: str) -> Order:
    value: Mapping[str, Any] = json.loads(line)
    return Order(
        argv=tuple(value["argv"]),
        log=Path(value["log"]),
        events=Path(value["events"]),
        temporary_folder=Path(value["temporary_folder"]),
    )


def main() -> int:
    """Guard the engine that the first line of standard input orders."""
    become_subreaper()
    line = b""
    # Byte by byte: what follows the first line belongs to the loop.
    while not line.endswith(b"\n"):
        piece = os.read(sys.stdin.fileno(), 1)
        if not piece:
            return 1  # the supervisor died before it had said anything
        line += piece
    Guard(_read_order(line.decode())).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
