"""A stage for one fault: a deployment of the fake engine with everything of its own.

Its processes carry a mark in their environment, which they keep in whatever session they are
and whoever inherits them; its temporary files are in a folder of its own, its shared memory has
a name of its own, and its port is nobody else's. So what is left of it can be counted.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from gemma_serve.adapters.host import free_port
from gemma_serve.adapters.state import Deployment, DeploymentFolder
from running import PATIENCE_S, eventually, fake_python

NAME = "demo"
PROGRAM = [sys.executable, "-m", "gemma_serve"]
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Remains:
    """What there is of a deployment: its processes, files, and whether its port is taken."""

    processes: tuple[str, ...] = ()
    segments: tuple[str, ...] = ()
    temporary: tuple[str, ...] = ()
    port_taken: bool = False

    @property
    def any(self) -> bool:
        """Whether anything is left."""
        return self != Remains()


@dataclass(frozen=True)
class Said:
    """What a command that ended has said: its exit code and the envelope of its JSON."""

    code: int
    ok: bool
    data: dict
    problems: tuple[str, ...]
    messages: tuple[str, ...]


class Client:
    """Streams one long answer in a thread, and knows whether it got all of it."""

    def __init__(self, port: int, tokens: int) -> None:
        self.pieces = 0
        self.whole = False
        self._port, self._tokens = port, tokens
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        body = {"model": NAME, "prompt": "Tell me more", "stream": True, "ignore_eos": True}
        body["max_tokens"] = self._tokens
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE_S)
        with suppress(OSError, http.client.HTTPException):
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            for line in connection.getresponse():
                self.pieces += line.startswith(b"data: {")
                self.whole = self.whole or line.startswith(b"data: [DONE]")
        connection.close()

    @property
    def lost(self) -> bool:
        """Whether the answer broke off; waits for its end."""
        self._thread.join(PATIENCE_S)
        return not self.whole


class Stage:
    """One deployment and all that is done to it. Everything ends with the `with`."""

    def __init__(self, *flags: str, **faults: object) -> None:
        self.mark = f"gs{uuid.uuid4().hex[:10]}"
        # Short: the names of sockets below it may have 107 bytes in all.
        self.folder = Path(tempfile.mkdtemp(prefix="gs", dir="/tmp"))
        self.temporary = self.folder / "t"
        self.temporary.mkdir()
        self.state = self.folder / "state"
        self.port = free_port("127.0.0.1")
        self.flags = flags
        self.faults = {"core": True, "leave_segment": self.mark, "token_delay_s": 0.02, **faults}
        self.environ = {
            **os.environ,
            "STAGE": self.mark,
            "GEMMA_SERVE_STATE_DIR": str(self.state),
            "TMPDIR": str(self.temporary),
            "NO_COLOR": "1",
        }
        self.clients: list[Client] = []
        self.mounted = False
        self._started: list[subprocess.Popen[str]] = []
        self._python = fake_python(self.folder)
        self.deployment = DeploymentFolder(self.state / "deployments" / NAME)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._living():
            with suppress(psutil.Error):
                process.kill()
        for popen in self._started:
            popen.kill()
            popen.wait()
            for stream in (popen.stdout, popen.stderr):
                if stream is not None:
                    stream.close()
        for file in self._segments():
            file.unlink(missing_ok=True)
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.state)], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- its commands

    def argv(self, *more: str) -> list[str]:
        """`up` of this deployment."""
        return [
            *PROGRAM, "up", "--model", "demo", "--engine-python", str(self._python),
            "--port", str(self.port), "--json", *self.flags, *more,
        ]  # fmt: skip

    def start(self, argv: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """A command in the background, ended with the stage at the latest."""
        popen = subprocess.Popen(
            list(argv),
            **{  # type: ignore[call-overload]
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
                "env": self.environ | {"FAKE_ENGINE": json.dumps(self.faults)},
                **options,
            },
        )
        self._started.append(popen)
        return popen

    def up(self, *more: str) -> subprocess.Popen[str]:
        """`up` in the foreground, or with --detach."""
        return self.start(self.argv(*more))

    def run(self, command: str, *args: str) -> Said:
        """A command about the deployment, run to its end."""
        return heard(self.start([*PROGRAM, command, NAME, "--json", *args]))

    def up_again(self) -> Said:
        """The next `up` of the same name, with an engine without faults."""
        self.faults = {"core": True, "leave_segment": self.mark}
        return heard(self.up("--once"))

    # --- its state

    @property
    def record(self) -> Deployment | None:
        """What is written down of it."""
        return self.deployment.load()

    def wait_for(self, condition: Callable[[Deployment], object], what: str) -> Deployment:
        """Wait until the record is so."""

        def holds() -> bool:
            record = self.record
            return record is not None and bool(condition(record))

        eventually(holds, f"{what}: {self.record}")
        record = self.record
        assert record is not None
        return record

    def wait_for_state(self, state: str) -> Deployment:
        """Wait until the deployment is in that state."""
        return self.wait_for(lambda record: record.state == state, state)

    def wait_for_family(self) -> Deployment:
        """Wait until the engine's processes and its segment are written down."""
        return self.wait_for(
            lambda record: len(record.members) >= 3 and record.shared_files, "its whole family"
        )

    def pid(self, who: str) -> int:
        """The pid of the leader, the core, the supervisor or the guard."""
        record = self.record
        assert record is not None
        if who == "core":
            return next(m.process.pid for m in record.members if m.title == "VLLM::EngineCore")
        return getattr(record, who).pid

    def send(self, who: str, signum: signal.Signals) -> None:
        """Send a signal to one of its processes."""
        os.kill(self.pid(who), signum)

    def stream(self, tokens: int = 100) -> Client:
        """A client whose answer of `tokens` tokens has begun."""
        client = Client(self.port, tokens)
        self.clients.append(client)
        eventually(lambda: client.pieces >= 2, "the answer's first tokens")
        return client

    def events(self, name: str) -> list[dict]:
        """What the supervisor wrote of this kind."""
        with suppress(OSError):
            lines = self.deployment.events.read_text().splitlines()
            return [value for value in map(json.loads, lines) if value["event"] == name]
        return []

    # --- what is left

    def remains(self) -> Remains:
        """All that there is of it now."""
        return Remains(
            processes=tuple(f"{p.pid} {_line(p)}" for p in self._living()),
            segments=tuple(file.name for file in self._segments()),
            temporary=tuple(sorted(path.name for path in self.temporary.iterdir())),
            port_taken=_is_taken(self.port),
        )

    def wait_until_clean(self, since: float, patience_s: float = 30.0) -> tuple[float, Remains]:
        """Seconds from `since` (monotonic) until nothing was left, and what is left by then."""
        while (left := self.remains()).any and time.monotonic() < since + patience_s:
            time.sleep(0.02)
        return time.monotonic() - since, left

    def _living(self) -> list[psutil.Process]:
        wanted = f"STAGE={self.mark}\0".encode()
        found = []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if wanted in Path(f"/proc/{process.pid}/environ").read_bytes():
                    found.append(process)
        return found

    def _segments(self) -> list[Path]:
        return sorted(_SHARED_MEMORY.glob(f"{self.mark}*"))


def heard(popen: subprocess.Popen[str]) -> Said:
    """Wait for the end of a command that writes JSON."""
    out, err = popen.communicate(timeout=PATIENCE_S * 2)
    try:
        last = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        return Said(popen.returncode, False, {}, (), (out + err,))
    problems = last.get("problems", [])
    return Said(
        popen.returncode,
        bool(last.get("ok")),
        last.get("data", {}),
        tuple(problem["code"] for problem in problems),
        tuple(problem["message"] for problem in problems),
    )


def _is_taken(port: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", port))
            tried.listen()
        except OSError:
            return True
    return False


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:80]
    except psutil.Error:
        return "gone"
