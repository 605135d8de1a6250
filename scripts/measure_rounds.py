#!/usr/bin/env python3
"""Start, smoke-test and stop a deployment again and again, and count what is left each time.

    python scripts/measure_rounds.py [--rounds 20] [--port 8000] [ARGS of `gemma-serve up` ...]

Counts processes, temporary folders, shared memory, files of the state folder and listeners on the
port, of these deployments alone, before the first round and after each. Exits 1 if any of them has
grown since the second round's end, or a round failed. Prints a table, and the raw counts as JSON
lines on standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

GEMMA_SERVE = [sys.executable, "-m", "gemma_serve"]


class Made:
    """What the deployments of all rounds were written down to have made: sessions and segments."""

    def __init__(self, state: Path) -> None:
        self._record = state / "deployments"
        self.sessions: set[int] = set()
        self.segments: set[Path] = set()

    def note(self) -> None:
        """Take in what the records of the deployments that run now say."""
        for path in self._record.glob("*/deployment.json"):
            record = json.loads(path.read_text())
            self.sessions.add(record["guard"]["pid"])
            self.segments |= {Path(file["path"]) for file in record["shared_files"]}


def counts(state: Path, port: int, made: Made) -> dict[str, int]:
    """What there is of ours now, also beside engines of others."""
    temporary = Path(tempfile.gettempdir())
    listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return {
        "processes": sum(_is_ours(process, state, made) for process in psutil.process_iter()),
        "temporary folders": len(list(temporary.glob("gemma-serve-*"))),
        "shared memory": sum(path.exists() for path in made.segments),
        "state files": sum(1 for path in state.rglob("*") if path.is_file()),
        "listeners on the port": sum(1 for c in listening if c.laddr[1:2] == (port,)),
    }


def _is_ours(process: psutil.Process, state: Path, made: Made) -> bool:
    with suppress(psutil.Error, OSError):
        if process.status() == psutil.STATUS_ZOMBIE:
            return process.ppid() == os.getpid()
        # vLLM's titles overwrite the environment of its processes; they stay in their session.
        if os.getsid(process.pid) in made.sessions:
            return True
        mine = process.environ().get("GEMMA_SERVE_STATE_DIR") == str(state)
        return mine and process.pid != os.getpid()
    return False


def one_round(up: Sequence[str], environment: dict[str, str], made: Made) -> dict[str, float]:
    """Up in the background, smoke test, stop; the seconds of each. Raises CalledProcessError."""
    seconds: dict[str, float] = {}
    try:
        _run_all(up, environment, made, seconds)
    except subprocess.CalledProcessError as error:
        print(error.stdout.decode(), error.stderr.decode(), file=sys.stderr)
        subprocess.run([*GEMMA_SERVE, "stop"], env=environment, check=False)
        raise
    return seconds


def _run_all(
    up: Sequence[str], environment: dict[str, str], made: Made, seconds: dict[str, float]
) -> None:
    for name, command in (("up", ["up", "--detach", *up]), ("test", ["smoke-test"]),
                          ("stop", ["stop"])):  # fmt: skip
        begun = time.monotonic()
        subprocess.run([*GEMMA_SERVE, *command], env=environment, check=True, capture_output=True)
        seconds[name] = time.monotonic() - begun
        if name != "stop":
            made.note()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--port", type=int, default=8000)
    options, up = parser.parse_known_args()
    up = [*(up or ["--model", "demo"]), "--port", str(options.port)]
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        environment = {**os.environ, "GEMMA_SERVE_STATE_DIR": folder}
        made = Made(state)
        seen = [counts(state, options.port, made)]
        print("| round | up s | test s | stop s | " + " | ".join(seen[0]) + " |")
        print("|---" * (4 + len(seen[0])) + "|")
        print("| 0 | | | | " + " | ".join(map(str, seen[0].values())) + " |", flush=True)
        for number in range(1, options.rounds + 1):
            took = one_round(up, environment, made)
            seen.append(counts(state, options.port, made))
            cells = [f"{s:.1f}" for s in took.values()] + [str(n) for n in seen[-1].values()]
            print(f"| {number} | " + " | ".join(cells) + " |", flush=True)
            print(json.dumps({"round": number, **took, **seen[-1]}), file=sys.stderr, flush=True)
    # The files of the state folder are made in the first round, and those of its forerunner
    # (`.1`) in the second.
    first = seen[min(2, len(seen) - 1)]
    grown = [name for name, count in seen[-1].items() if count > first[name]]
    print(f"\ngrown since round 2: {', '.join(grown) or 'nothing'}")
    return 1 if grown else 0


if __name__ == "__main__":
    raise SystemExit(main())
