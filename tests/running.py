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
from pathlib import Path

import psutil

FAKE_ENGINE = Path(__file__).parent / "fake_engine.py"
# Longer than any of this takes, on any machine; a test that needs it has failed.
PATIENCE_S = 60.0


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
        self._readers = [
            threading.Thread(target=lines.extend, args=(stream,), daemon=True)
            for lines, stream in ((self.out, self.popen.stdout), (self.err, self.popen.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.engine_processes():
            process.kill()
        self.popen.kill()
        self.popen.wait()
        for reader in self._readers:
            reader.join()
        for stream in (self.popen.stdout, self.popen.stderr):
            assert stream is not None
            stream.close()

    @property
    def engine_pid(self) -> int | None:
        """The leader's pid, once the program has told it."""
        found = re.search(r"engine's pid (\d+)|\"pid\": (\d+)", "".join([*self.err, *self.out]))
        return int(found[1] or found[2]) if found else None

    def engine_processes(self) -> list[psutil.Process]:
        """What lives of the engine's session."""
        return session_of(self.engine_pid) if self.engine_pid else []

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

    def exit_code(self) -> int:
        """Wait for the end; nothing of its engine may be left by then."""
        code = self.popen.wait(PATIENCE_S * 2)
        for reader in self._readers:
            reader.join(PATIENCE_S)
        assert self.engine_processes() == []
        return code

    @property
    def json_lines(self) -> list[dict]:
        """Standard output as JSON lines."""
        return [json.loads(line) for line in self.out]
