#!/usr/bin/env python3
"""Run the smoke test again and again against an endpoint, and say how often and how fast it passed.

    python scripts/measure_smoke.py --url http://127.0.0.1:8000 [--runs 50] [--load N]

With --load, N streams of other answers are in flight all the time. Prints a table of the checks,
each failed check with its reason, and writes what was measured as JSON into FILE. Exits 1 unless
every run passed and, with --load, no stream of the load broke. The API key, where the server wants
one, is read from GEMMA_SERVE_API_KEY. Only for an engine on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

from gemma_serve.adapters.package_data import data_path

HERE = "127.0.0.1"
LOAD_TOKENS = 128
# The longest that a stream of the load may be silent; on two cores the whole batch shares them.
SILENCE_S = 120.0


@dataclass(frozen=True)
class Run:
    """One smoke test: its exit code, its wall time with the program's start, what it reported."""

    exit_code: int
    seconds: float
    answer: Mapping[str, Any]

    @property
    def checks(self) -> Sequence[Mapping[str, Any]]:
        """The checks of the report; none where the program could not start testing."""
        checks: Sequence[Mapping[str, Any]] = self.answer.get("data", {}).get("checks", ())
        return checks

    @property
    def failures(self) -> list[str]:
        """What failed and why, one entry a check."""
        failed = [f"{c['id']}: {c['reason']}" for c in self.checks if c["status"] == "failed"]
        if failed or self.exit_code == 0:
            return failed
        problems = [problem["message"] for problem in self.answer.get("problems", ())]
        return [f"exit code {self.exit_code}: {'; '.join(problems) or 'no report'}"]


@dataclass
class Load:
    """`streams` threads, each with a stream of tokens in flight, from `with` to its end."""

    client: httpx.Client
    model: str
    streams: int
    requests: int = 0
    events: int = 0
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._began = threading.Barrier(self.streams + 1)
        self._threads = [
            threading.Thread(target=self._ask_on, args=(random.Random(seed),), daemon=True)
            for seed in range(self.streams)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self._began.wait(SILENCE_S)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask_on(self, chance: random.Random) -> None:
        questions = known_questions()
        first = True
        while not self._stop.is_set():
            path, question = chance.choice(questions)
            try:
                events = self._ask(path, question)
            except httpx.HTTPError as problem:
                with self._lock:
                    self.errors.append(f"{type(problem).__name__}: {problem}")
                time.sleep(0.5)
            else:
                with self._lock:
                    self.requests += 1
                    self.events += events
            if first:
                self._began.wait(SILENCE_S)
                first = False

    def _ask(self, path: str, question: Mapping[str, Any]) -> int:
        """Read one stream, to its end or until the load ends; returns how many events it had."""
        body = {
            **question,
            "model": self.model,
            "max_tokens": LOAD_TOKENS,
            "ignore_eos": True,
            "stream": True,
        }
        events = 0
        with self.client.stream("POST", path, json=body) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                events += line.startswith("data: {")
                if self._stop.is_set():
                    break
        return events


def known_questions() -> list[tuple[str, dict[str, Any]]]:
    """Every question of the demo model that any model takes: where to send it, and what."""
    known = json.loads(data_path("answers.json").read_text())
    prompts = [("/v1/completions", {"prompt": one["prompt"]}) for one in known["completions"]]
    chats = [
        ("/v1/chat/completions", {"messages": one["messages"]})
        for one in known["chats"]
        if one["messages"][0]["role"] != "system"
    ]
    return [*prompts, *chats]


def smoke_test(url: str, more: Sequence[str]) -> Run:
    """Run `gemma-serve smoke-test` once, with `more` flags."""
    command = [sys.executable, "-m", "gemma_serve", "smoke-test", "--url", url, "--json", *more]
    begun = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - begun
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError:
        answer = {}
    return Run(done.returncode, round(seconds, 3), answer)


def table(runs: Sequence[Run]) -> str:
    """A row a check, in the order of the smoke test, and one for the whole."""
    ids = list(dict.fromkeys(check["id"] for run in runs for check in run.checks))
    rows = [
        "| check | passed | skipped | failed | median s | worst s |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for id in ids:
        checks = [check for run in runs for check in run.checks if check["id"] == id]
        statuses = [check["status"] for check in checks]
        counts = [statuses.count(status) for status in ("passed", "skipped", "failed")]
        rows.append(_row(id, counts, [check["duration_s"] for check in checks]))
    passed = sum(not run.failures for run in runs)
    rows.append(_row("all", [passed, 0, len(runs) - passed], [run.seconds for run in runs]))
    return "\n".join(rows)


def _row(name: str, counts: Sequence[int], seconds: Sequence[float]) -> str:
    times = [f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}"]
    return f"| {' | '.join([name, *map(str, counts), *times])} |"


def measure(url: str, count: int, more: Sequence[str]) -> list[Run]:
    """Run the smoke test `count` times in a row, and say on standard error how each went."""
    runs = []
    for number in range(1, count + 1):
        run = smoke_test(url, more)
        verdict = "failed" if run.failures else "passed"
        print(f"run {number} of {count}: {verdict} in {run.seconds:.1f} s", file=sys.stderr)
        for failure in run.failures:
            print(f"  {failure}", file=sys.stderr)
        runs.append(run)
    return runs


def measure_under_load(
    url: str, count: int, more: Sequence[str], streams: int
) -> tuple[list[Run], dict[str, Any]]:
    """The same while `streams` other streams are in flight; also what those did.

    Raises httpx.HTTPError where the endpoint doesn't list its model.
    """
    key = os.environ.get("GEMMA_SERVE_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=url, headers=headers, timeout=SILENCE_S, limits=limits) as client:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        begun = time.perf_counter()
        with Load(client, model, streams) as load:
            runs = measure(url, count, more)
        seconds = time.perf_counter() - begun
    return runs, {
        "streams": streams,
        "requests": load.requests,
        "events": load.events,
        "events_per_second": round(load.events / seconds, 1),
        "errors": load.errors,
    }


def local_url(text: str) -> str:
    """The address without a path. Raises ArgumentTypeError unless it is of this machine."""
    parts = urlsplit(text)
    if parts.scheme != "http" or parts.hostname != HERE or parts.port is None:
        raise argparse.ArgumentTypeError(f"{text} is not like http://{HERE}:8000")
    return f"http://{HERE}:{parts.port}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", type=local_url, required=True, help=f"http://{HERE}:PORT")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--load", type=int, default=0, metavar="N", help="streams in flight")
    parser.add_argument("--out", type=Path, metavar="FILE", help="for the raw figures, as JSON")
    parser.add_argument("--skip", metavar="IDS", help="checks to leave out")
    options = parser.parse_args(argv)
    more = ["--skip", options.skip] if options.skip else []
    load: dict[str, Any] | None = None
    if not options.load:
        runs = measure(options.url, options.runs, more)
    else:
        try:
            runs, load = measure_under_load(options.url, options.runs, more, options.load)
        except httpx.HTTPError as problem:
            print(f"cannot load {options.url}: {problem}", file=sys.stderr)
            return 1
    if options.out:
        raw = [{"exit_code": r.exit_code, "seconds": r.seconds, "answer": r.answer} for r in runs]
        options.out.write_text(json.dumps({"load": load, "runs": raw}, indent=1) + "\n")
    print(table(runs))
    failures = [(n, failure) for n, run in enumerate(runs, 1) for failure in run.failures]
    errors = load["errors"] if load else []
    if load:
        figures = ", ".join(f"{value} {name}" for name, value in load.items() if name != "errors")
        print(f"\nload: {figures}")
    for number, failure in failures:
        print(f"run {number}: {failure}")
    for error in errors:
        print(f"load: {error}")
    return 1 if failures or errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
