"""Measure what `up` adds to vLLM's own start, how long an end takes, what `--help` costs.

    .venv/bin/python scripts/measure_start.py [--rounds N] [--json]

`up` and the very command that `plan` prints start in turns on this machine, so that a noisy
neighbour troubles both alike; the figure is the ratio of their medians. Ready means that a
token was generated, for both.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress

UP = [sys.executable, "-m", "gemma_serve", "up", "--model", "demo"]
PLAN = [sys.executable, "-m", "gemma_serve", "plan", "--model", "demo", "--format", "argv"]


def generates(port: int) -> bool:
    """Whether a server on `port` answers with a token."""
    body = json.dumps({"model": "demo", "prompt": "Hello", "max_tokens": 1}).encode()
    url = f"http://127.0.0.1:{port}/v1/completions"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with suppress(OSError), urllib.request.urlopen(request, timeout=60) as answer:
        return bool(json.load(answer)["usage"]["completion_tokens"])
    return False


def by_hand(port: int) -> float:
    """Seconds from starting vLLM with the flags of the plan to its first token."""
    line = subprocess.run([*PLAN, "--port", str(port)], capture_output=True, text=True, check=True)
    begun = time.perf_counter()
    engine = subprocess.Popen(
        ["bash", "-c", f"exec {line.stdout}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not generates(port):
        if engine.poll() is not None:
            raise SystemExit(f"the engine by hand ended with {engine.returncode}")
        time.sleep(0.1)
    seconds = time.perf_counter() - begun
    os.killpg(engine.pid, signal.SIGKILL)
    engine.wait()
    return seconds


def session_is_empty(sid: int) -> bool:
    """Whether no living process is left in a session."""
    listed = subprocess.run(["ps", "-eo", "sess=,stat="], capture_output=True, text=True).stdout
    rows = (line.split() for line in listed.splitlines())
    return not any(int(session) == sid and state[0] != "Z" for session, state in rows)


def with_up(port: int, signum: signal.Signals, *, to_core: bool = False) -> tuple[float, float]:
    """Seconds of `up` from its own start to ready, and from the signal to nobody left."""
    begun = time.perf_counter()
    program = subprocess.Popen(
        [*UP, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert program.stdout is not None
    leader = 0
    for line in program.stdout:
        if found := re.search(r"engine's pid (\d+)", line):
            leader = int(found[1])
        if "ready after" in line:
            break
    ready_s = time.perf_counter() - begun
    begun = time.perf_counter()
    if to_core:
        children = subprocess.run(["pgrep", "-P", str(leader)], capture_output=True, text=True)
        for pid in children.stdout.split():
            os.kill(int(pid), signum)
    else:
        program.send_signal(signum)
    while program.poll() is None or not session_is_empty(leader):
        time.sleep(0.01)
    return ready_s, time.perf_counter() - begun


def help_seconds(runs: int) -> float:
    """Median of `gemma-serve --help` in seconds."""
    times = []
    for _ in range(runs):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "gemma_serve", "--help"], stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What gemma-serve adds to vLLM's own start.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GEMMA_SERVE_STATE_DIR"] = folder
        help_s = help_seconds(10)
        hand, up, ends = [], [], {}
        ways = [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGKILL, True)]
        for round_ in range(options.rounds):
            hand.append(by_hand(options.port))
            signum, to_core = ways[round_ % len(ways)]
            ready_s, end_s = with_up(options.port, signum, to_core=to_core)
            up.append(ready_s)
            ends[f"{signum.name}{' to the core' if to_core else ''}"] = round(end_s, 2)
    figures = {
        "help_median_s": round(help_s, 3),
        "by_hand_ready_s": [round(s, 1) for s in hand],
        "up_ready_s": [round(s, 1) for s in up],
        "ratio": round(statistics.median(up) / statistics.median(hand), 3),
        "nobody_left_after_s": ends,
    }
    print(
        json.dumps(figures) if options.json else "\n".join(f"{k}: {v}" for k, v in figures.items())
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
