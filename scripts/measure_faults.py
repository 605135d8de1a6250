#!/usr/bin/env python3
"""Do every fault of tests/faults.py to a deployment, and write what was measured into the docs.

    python scripts/measure_faults.py [--jobs N] [--only NAME ...]

It replaces the table of docs/reliability.md, exits 1 if an outcome is not the expected one, and
takes some minutes. With --only it prints those rows and leaves the document alone.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
HEAD = (
    "| fault | exit code | status | processes left | files left | seconds to clean "
    "| requests lost |\n|---|--:|---|--:|--:|--:|--:|\n"
)


def row(fault: Any, outcome: Any) -> str:
    """One line of the table."""
    state = outcome.state if outcome.cause is None else f"{outcome.state} (`{outcome.cause}`)"
    # A program that was ended by a signal has no exit code; shells say 128 and its number.
    code = outcome.exit if outcome.exit >= 0 else 128 - outcome.exit
    files = len(outcome.left.segments) + len(outcome.left.temporary)
    cells = (
        fault.what.replace("|", "/"), code, state, len(outcome.left.processes), files,
        f"{outcome.seconds:.1f}", outcome.lost,
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |\n"


def main() -> int:
    """Measure, write, and say what was not as expected."""
    parser = argparse.ArgumentParser(description="Measure what faults leave behind.")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults alone")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    faults = importlib.import_module("faults")
    chosen = [f for f in faults.FAULTS if f.possible() and (not args.only or f.name in args.only)]

    def kept(fault: Any, outcome: Any) -> bool:
        return bool(outcome == fault.expected and outcome.seconds < faults.PROMISED_S)

    def tried(fault: Any) -> Any:
        try:
            outcome = faults.measure(fault)
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            outcome = error
        print("as expected" if kept(fault, outcome) else "NOT EXPECTED", fault.name)
        return outcome

    with ThreadPoolExecutor(args.jobs) as pool:
        outcomes = list(pool.map(tried, chosen))
    found = list(zip(chosen, outcomes, strict=True))
    wrong = [(fault, outcome) for fault, outcome in found if not kept(fault, outcome)]
    for fault, outcome in wrong:
        print(f"{fault.name}: {outcome}", file=sys.stderr)
    rows = [row(fault, outcome) for fault, outcome in found if not isinstance(outcome, Exception)]
    if args.only:
        print("".join(rows), end="")
    else:
        before, rest = PAGE.read_text().split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n\n{HEAD}{''.join(rows)}\n{END}{after}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
