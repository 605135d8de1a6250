"""Running the program as people do: a child process, its output as it comes, its engine."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

from gemma_serve.adapters.state import all_deployments
from gemma_serve.engine.processes import send
from gemma_serve.usecases.deployments import settle_all

FAKE_ENGINE = Path(__file__).parent / "fake_engine.py"
# Longer than any of this takes, on any machine; a test that needs it has failed.
PATIENCE_S = 60.0
# What `up` says of a leader, to people and as JSON. `status --json` tells a pid as well, of an
# engine that another program started.
_ENGINE_PID = re.compile(r"engine's pid (\d+)|\"event\": \"engine_started\".*?\"pid\": (\d+)")


def fake_python(folder: Path) -> Path:
    """An executable that stands for a Python with vLLM, and is the fake engine."""
    script = folder / "fake-python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE_ENGINE}" "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def eventually(condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)


def session_of(sid: int) -> list[psutil.Process]:
    """The living processes of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == sid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.Error):
            continue
    return found


def end_deployments(environ: Mapping[str, str]) -> None:
    """End whatever a test has left running in the background: the guards do the rest."""
    for deployment in all_deployments(environ):
        if deployment.supervisor is not None:
            send(deployment.supervisor, signal.SIGKILL)
    settle_all(environ)


class Program:
    """`gemma-serve ARGS` as a child process."""

    def __init__(self, *args: str, environ: Mapping[str, str]) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "gemma_serve", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "NO_COLOR": "1", **environ},
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._sessions: set[int] = set()
        self._readers = [
            threading.Thread(target=self._read, args=(lines, stream), daemon=True)
            for lines, stream in ((self.out, self.popen.stdout), (self.err, self.popen.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, lines: list[str], stream: IO[str]) -> None:
        for line in stream:
            if found := _ENGINE_PID.search(line):
                self._note_session(int(found[1] or found[2]))
            lines.append(line)

    def _note_session(self, leader: int) -> None:
        """Remember the guard's session, also where the leader has ended already."""
        with suppress(OSError):
            self._sessions.add(os.getsid(leader))
        with suppress(psutil.Error):
            for process in psutil.Process(self.popen.pid).children(recursive=True):
                if "gemma_serve.engine.guard" in process.cmdline():
                    self._sessions.add(process.pid)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.popen.wait()
        # A guard whose supervisor is gone ends all that is below it, whatever its session.
        deadline = time.monotonic() + 10.0
        while (left := self.engine_processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in left:
            process.kill()
        for reader in self._readers:
            reader.join()
        for stream in (self.popen.stdout, self.popen.stderr):
            assert stream is not None
            stream.close()

    @property
    def engine_pid(self) -> int | None:
        """The leader's pid, once the program has told it; the last one's after a restart."""
        found = _ENGINE_PID.findall("".join([*self.err, *self.out]))
        return int(found[-1][0] or found[-1][1]) if found else None

    def engine_processes(self) -> list[psutil.Process]:
        """What lives of the engine's sessions: the guard, the leader, and what they started."""
        return [process for sid in list(self._sessions) for process in session_of(sid)]

    def wait_for(self, text: str, stream: str = "err") -> None:
        """Wait until the program has written `text`, or fail with all that it wrote."""
        lines = self.out if stream == "out" else self.err
        deadline = time.monotonic() + PATIENCE_S * 2
        while not any(text in line for line in list(lines)):
            ended = self.popen.poll() is not None and not self._readers[0].is_alive()
            assert not ended, f"ended without {text!r}: {self.out} {self.err}"
            assert time.monotonic() < deadline, f"no {text!r} in {self.out} {self.err}"
            time.sleep(0.02)

    def send(self, signum: signal.Signals) -> None:
        """Send a signal to the program alone."""
        self.popen.send_signal(signum)

    def close_streams(self) -> None:
        """Stop reading: what it writes from now on has nowhere to go."""
        for stream in (self.popen.stdout, self.popen.stderr):
            assert stream is not None
            os.dup2(os.open(os.devnull, os.O_RDONLY), stream.fileno())

    def exit_code(self, *, detached: bool = False) -> int:
        """Wait for the end; nothing of its engine may be left by then, unless it is detached."""
        code = self.popen.wait(PATIENCE_S * 2)
        for reader in self._readers:
            reader.join(PATIENCE_S)
        if detached:
            self._sessions.clear()  # not ours to end: see `end_deployments`
        assert self.engine_processes() == []
        return code

    @property
    def json_lines(self) -> list[dict]:
        """Standard output as JSON lines."""
        return [json.loads(line) for line in self.out]
