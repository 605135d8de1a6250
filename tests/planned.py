"""Models of the catalogue on cards of the data, planned in this process and with no one asked."""

from __future__ import annotations

import io
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from gemma_serve.adapters.package_data import (
    load_catalogue,
    load_engine_rules,
    load_gpu_cards,
    load_runtime_constants,
)
from gemma_serve.cli import main
from gemma_serve.planning.config import ServeConfig
from gemma_serve.planning.hardware.gpu_cards import parse_for_gpu
from gemma_serve.planning.launch import Engine
from gemma_serve.planning.memory.engine_rules import rules_for
from gemma_serve.planning.memory.fit import DeviceMemory
from gemma_serve.planning.memory.request import EngineKnowledge, Machine
from gemma_serve.planning.model.facts import FactsReading, ModelFacts, facts_from_config
from gemma_serve.usecases import target
from gemma_serve.usecases.fit import FitReport, judge_fit

GIB = 2**30
VERSION = "0.32.0"


@contextmanager
def nobody_to_ask() -> Iterator[None]:
    """No settings in the environment, no Hub, no cache; vLLM 0.32.0 for GPUs is installed."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [*os.environ]:
            if name.startswith(("GEMMA_SERVE_", "VLLM_")):
                patch.delenv(name)
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(constants, "HF_HUB_CACHE", "/no-such-folder")
        engine = Engine(Path("python"), "cuda", VERSION, "vllm")
        patch.setattr(target, "find_engine", lambda _: engine)
        yield


def asked(*argv: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the answer of `gemma-serve ARGV --json`."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([*argv, "--json"])
    assert err.getvalue() == ""
    answer = json.loads(out.getvalue())
    assert isinstance(answer, dict)
    return code, answer


def knowledge(version: str = VERSION) -> EngineKnowledge:
    return EngineKnowledge(rules_for(version, load_engine_rules())[0], load_runtime_constants())


def facts(model: str) -> ModelFacts:
    """What the catalogue knows of a model."""
    entry = next(entry for entry in load_catalogue() if entry.id == model)
    reading = facts_from_config(entry.id, entry.config, source="catalogue", entry=entry)
    assert reading.facts is not None
    return reading.facts


def machine(text: str) -> Machine:
    """Cards as `--for-gpu` takes them, or "cpu" for a CPU with 64 GiB free of 80."""
    if text == "cpu":
        memory = DeviceMemory("cpu", "CPU", 80 * GIB, 64 * GIB)
        return Machine(1, lambda _: memory)
    cards = parse_for_gpu(text, load_gpu_cards())
    total = cards.total_bytes
    memory = DeviceMemory("cuda", cards.name, total, total, cards.compute_capability)
    return Machine(cards.count, lambda _: memory)


def judged(
    model: str | ModelFacts, where: str, version: str | None = VERSION, **settings: Any
) -> FitReport:
    """The verdict on a model, with `settings` as the configuration has them."""
    known = facts(model) if isinstance(model, str) else model
    config = ServeConfig(model=known.model, **settings)
    return judge_fit(FactsReading(known), config, machine(where), version)


def chosen(report: FitReport) -> tuple[Any, ...]:
    """GPUs, dtype, context, sequences and tokens of a batch, as decided."""
    assert report.decision is not None
    assert report.decision.fit is not None
    s = report.decision.fit.settings
    return (
        s.tensor_parallel_size,
        s.dtype,
        s.max_model_len,
        s.max_num_seqs,
        s.max_num_batched_tokens,
    )


def changed(argv: list[str], flags: str) -> list[str]:
    """A command line with the flags of an alternative in the place of its own."""
    words = shlex.split(flags)
    argv = list(argv)
    while words:
        word = words.pop(0)
        name = words.pop(0) if word == "without" else word
        if name in argv:
            at = argv.index(name)
            del argv[at : at + 2]
        if word in ("--language-model-only", "--enforce-eager"):
            argv.append(word)
        elif word != "without":
            argv += [word, words.pop(0)]
    return argv
