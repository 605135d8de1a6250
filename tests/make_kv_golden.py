"""Writes tests/data/kv_golden.json: what the vLLM of each release says of the KV cache.

    python tests/make_kv_golden.py PYTHON [FOLDER ...]

PYTHON has vLLM's requirements installed; each FOLDER holds one release's `vllm` package (its wheel,
unpacked). Without a folder the vLLM that PYTHON has is asked. Answers of other releases are kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from kv_cases import case_of, drawn, grid, question, written
from kv_models import MODELS

CHILD = Path(__file__).with_name("vllm_kv_child.py")
GOLDEN = Path(__file__).parent / "data" / "kv_golden.json"


def ask(python: str, questions: list[dict[str, Any]], folder: str = "") -> dict[str, Any]:
    """The answers of one vLLM: its version and one result for each question."""
    command = [python, str(CHILD), *([folder] if folder else [])]
    done = subprocess.run(
        command, input=json.dumps(questions), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def shortened(result: dict[str, Any]) -> list[Any]:
    """A result without its keys, to keep the file small."""
    if "refused" in result:
        return []
    if not result["fits"]:
        return [result["backends"], result["cache_block_size"], result["longest_model_len"]]
    names = ("backends", "cache_block_size", "groups", "num_blocks", "tokens", "max_concurrency")
    return [result[name] for name in names]


def main() -> None:
    python, folders = sys.argv[1], sys.argv[2:] or [""]
    cases = list(dict.fromkeys([*grid(), *drawn(400, seed=20261124)]))
    questions = [question(case, MODELS[case.model]) for case in cases]
    rows = [{"case": written(case), "answers": []} for case in cases]
    if GOLDEN.exists():
        kept = {json.dumps(row["case"]): row for row in json.loads(GOLDEN.read_text())["rows"]}
        rows = [kept.get(json.dumps(row["case"]), row) for row in rows]
    for folder in folders:
        answers = ask(python, questions, folder)
        for row, result in zip(rows, answers["results"], strict=True):
            keep(row, answers["version"], shortened(result))
        print(answers["version"], len(cases), "cases", flush=True)
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text('{"rows":[\n' + lines + "\n]}\n")


def keep(row: dict[str, Any], version: str, result: list[Any]) -> None:
    """Add one version's answer: versions that answer alike share an entry."""
    assert case_of(row["case"])
    for entry in row["answers"]:
        if version in entry["versions"]:
            entry["versions"].remove(version)
    row["answers"] = [entry for entry in row["answers"] if entry["versions"]]
    for entry in row["answers"]:
        if entry["result"] == result:
            entry["versions"].append(version)
            return
    row["answers"].append({"versions": [version], "result": result})


if __name__ == "__main__":
    main()
