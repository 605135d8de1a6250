"""On a GPU machine: check-gpu, up to ready, a streamed completion, Ctrl-C, memory back to zero.

    python scripts/gpu/up_and_down.py --model DIR --out FOLDER [-- MORE FLAGS OF UP]

Runs gemma-serve as a person would, and the same engine by hand for comparison. Writes what was
printed to FOLDER/up-and-down.log and the figures to FOLDER/up-and-down.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
URL = "http://127.0.0.1:8000"
PROGRAM = [sys.executable, "-m", "gemma_serve"]


class Run:
    """The log of one run and its figures."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = (folder / "up-and-down.log").open("w")
        self.figures: dict[str, Any] = {}
        self._path = folder / "up-and-down.json"

    def say(self, text: str) -> None:
        """Write to the log and to the screen."""
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def keep(self, name: str, value: object) -> None:
        """Keep a figure; the file is whole after each."""
        self.figures[name] = value
        self.say(f"## {name}: {value}")
        self._path.write_text(json.dumps(self.figures, indent=1))

    def command(self, *argv: str) -> int:
        """Run a command to its end, with its output in the log."""
        shown = " ".join(argv).replace(" ".join(PROGRAM), "gemma-serve")
        self.say("$ " + shown.replace(f"{sys.executable} {ROOT}/", "python "))
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.say(done.stdout.rstrip() + f"\n[exit code {done.returncode}]\n")
        return done.returncode


def gpu_memory_mib() -> int:
    """Memory in use on the first GPU, as nvidia-smi tells it."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


def engine_processes() -> list[str]:
    """Processes of any vLLM that are alive, by pid and title."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return [
        line.strip() for line in listed.splitlines() if "VLLM::" in line or "api_server" in line
    ]


def generates() -> bool:
    """Whether the server on the port answers with a token."""
    body = json.dumps({"model": "m", "prompt": "Hello", "max_tokens": 1}).encode()
    request = urllib.request.Request(
        f"{URL}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with suppress(OSError), urllib.request.urlopen(request, timeout=300) as answer:
        return bool(json.load(answer)["usage"]["completion_tokens"])
    return False


def by_hand(run: Run, argv: Sequence[str]) -> None:
    """Start the very command that `plan` prints, and time it to its first token."""
    run.say("$ " + " ".join(argv))
    begun = time.monotonic()
    with Path(run.log.name).with_name("by-hand.log").open("w") as log:
        engine = subprocess.Popen(
            list(argv), stdout=log, stderr=log, start_new_session=True, env=dict(os.environ)
        )
        while not generates() and engine.poll() is None:
            time.sleep(0.2)
        run.keep("by_hand_ready_s", round(time.monotonic() - begun, 1))
        engine.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            engine.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(engine.pid, signal.SIGKILL)
    time.sleep(2)


def up(run: Run, name: str, flags: Sequence[str], end: str) -> None:
    """`gemma-serve up` to ready, a streamed completion, and the end that is asked for."""
    argv = [*PROGRAM, "up", *flags]
    run.say("$ gemma-serve up " + " ".join(flags))
    begun = stopped = time.monotonic()
    program = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    assert program.stdout is not None
    for line in program.stdout:
        run.say("  " + line.rstrip())
        if "ready after" in line:
            break
    run.keep(f"{name}_ready_s", round(time.monotonic() - begun, 1))
    if program.poll() is None:
        run.keep(f"{name}_memory_ready_mib", gpu_memory_mib())
        if end == "SIGINT":
            client = str(ROOT / "scripts" / "client_completions.py")
            run.command(sys.executable, client, "--url", URL)
            run.keep(f"{name}_smoke_test_exit", run.command(*PROGRAM, "smoke-test"))
            run.command(*PROGRAM, "check-gpu")
            concepts = str(ROOT / "scripts" / "measure_concepts.py")
            run.command(
                sys.executable, concepts, "--prefix-tokens", "4096", "--vocabulary", "250000"
            )
        stopped = time.monotonic()
        _end(program, end)
        run.say(f"[{end}]")
    for line in program.stdout:
        run.say("  " + line.rstrip())
    run.keep(f"{name}_exit_code", program.wait(60))
    run.keep(f"{name}_stop_s", round(time.monotonic() - stopped, 1))
    time.sleep(1)
    run.keep(f"{name}_memory_after_mib", gpu_memory_mib())
    run.keep(f"{name}_processes_after", engine_processes())


def _end(program: subprocess.Popen[str], end: str) -> None:
    if end == "SIGINT":
        program.send_signal(signal.SIGINT)
        return
    core = next(line for line in engine_processes() if "VLLM::EngineCore" in line)
    os.kill(int(core.split()[0]), signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description="gemma-serve on a GPU, from check to clean end.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("flags", nargs="*")
    options = parser.parse_args()
    run = Run(options.out)
    flags = ["--model", options.model, "--served-model-name", "m", *options.flags]
    run.command("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv")
    run.keep("memory_before_mib", gpu_memory_mib())
    run.command(*PROGRAM, "check-gpu")
    run.command(*PROGRAM, "check-gpu", "--json")
    run.command(*PROGRAM, "check-gpu", "--model", options.model)
    run.command(*PROGRAM, "plan", *flags)
    # The first start on a machine compiles kernels; the later ones find them in vLLM's caches.
    up(run, "up_first", flags, "SIGINT")
    plan = [*PROGRAM, "plan", *flags, "--format", "argv"]
    line = subprocess.run(plan, capture_output=True, text=True, check=True).stdout
    by_hand(run, ["bash", "-c", "exec " + line])
    up(run, "up_again", flags, "SIGINT")
    up(run, "up_killed", flags, "SIGKILL to VLLM::EngineCore")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
