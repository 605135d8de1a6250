# ruff: noqa: E501  # log lines are as long as they are
"""A start as a timeline: how long each phase took, and which one takes too long."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_serve.engine.log import LogLines
from gemma_serve.engine.timeline import (
    PHASE_TIMEOUTS_S,
    PHASES,
    Overdue,
    PhaseSeen,
    Stretch,
    Timeline,
    phase_of,
)

LOGS = Path(__file__).parent / "data" / "logs"
_CLOCK = re.compile(r"\b(\d\d):(\d\d):(\d\d)\b")

API = "(APIServer pid=20441) "
CORE = "(EngineCore pid=20534) "
WORKER = "(Worker pid=20621) "

CONFIGURATION = "INFO [model.py:623] Resolved architecture: GemmaForCausalLM"
WEIGHTS = "Loading safetensors checkpoint shards:  {}% Completed | 1/4"
MEASURING = "INFO [gpu_model_runner.py:1] Profiling CUDA graph memory: PIECEWISE=51"
CAPTURING = "Capturing CUDA graphs (FULL):  {}%|     | 3/51"
CAPTURED = "INFO [model_runner.py:747] Graph capturing finished in 4 secs, took 1.03 GiB"
KV_CACHE = "INFO [gpu_worker.py:560] Available KV cache memory: 108.13 GiB"


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        (API + "INFO 11-22 10:51:10 [model.py:733] Resolved architecture: GemmaForCausalLM",
         PhaseSeen("configuration")),
        (CORE + "INFO 11-22 10:51:16 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='x'",
         PhaseSeen("engine core")),
        (WORKER + "INFO 11-22 10:51:23 [cpu_model_runner.py:68] Starting to load model /models/tiny-gemma...",
         PhaseSeen("weights")),
        (CORE + "INFO 11-22 10:39:56 [model_runner.py:284] Loading model from scratch...",
         PhaseSeen("weights")),
        ("Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:00<00:00, 352.76it/s]",
         PhaseSeen("weights", "50 %")),
        (CORE + "INFO 11-22 09:50:13 [backends.py:1105] Dynamo bytecode transform time: 3.2 s",
         PhaseSeen("compilation")),
        (WORKER + "INFO 11-22 10:27:16 [cpu_model_runner.py:87] Warming up model for the compilation...",
         PhaseSeen("compilation")),
        (CORE + "INFO 11-22 10:51:24 [kv_cache_utils.py:2327] CPU KV cache size: 4,194,304 tokens, Maximum",
         PhaseSeen("KV cache")),
        (CORE + "INFO 11-22 09:50:13 [gpu_worker.py:440] Available KV cache memory: 108.13 GiB",
         PhaseSeen("KV cache")),
        ("Capturing CUDA graphs (decode, FULL):  50%|█████     | 18/35",
         PhaseSeen("CUDA graphs", "50 %")),
        (CORE + "INFO 11-22 10:40:25 [model_runner.py:747] Graph capturing finished in 4 secs, took 1.03 GiB",
         PhaseSeen("warm-up")),
        (API + "INFO 11-22 10:51:28 [entry.py:140] Starting vLLM server on http://127.0.0.1:8011",
         PhaseSeen("API server")),
        (API + "WARNING 11-22 10:51:10 [vllm.py:1703] Enforce eager set, disabling torch.compile, CUDAGraphs, and JIT kernel warmup.", None),
        ("nobody knows this line", None),
        ("", None),
    ],
)  # fmt: skip
def test_a_line_tells_its_phase(line, seen):
    assert phase_of(line) == seen


def timed_lines(name):
    """The lines of a log, each with the last time of day that was told, in seconds."""
    now = None
    lines = LogLines().feed((LOGS / name).read_bytes())
    for line in lines:
        if found := _CLOCK.search(line):
            hours, minutes, seconds = map(int, found.groups())
            now = 3600.0 * hours + 60 * minutes + seconds
        if now is not None:
            yield line, now


def timeline_of(name):
    lines = list(timed_lines(name))
    timeline = Timeline(lines[0][1])
    for line, now in lines:
        timeline.read(line, now)
    timeline.begin("first token", lines[-1][1] + 1)
    timeline.end(lines[-1][1] + 3)
    return timeline


@pytest.mark.parametrize(
    ("log", "stretches"),
    [
        ("gpu-vllm0.26-cold.log",
         [("imports", 0, 0), ("configuration", 0, 37), ("engine core", 37, 40),
          ("weights", 40, 51), ("compilation", 51, 64), ("KV cache", 64, 64),
          ("warm-up", 64, 64), ("CUDA graphs", 64, 69), ("warm-up", 69, 173),
          ("API server", 173, 174), ("first token", 174, 176)]),
        ("cpu-vllm0.32-default.log",
         [("imports", 0, 0), ("configuration", 0, 14), ("engine core", 14, 22),
          ("weights", 22, 23), ("compilation", 23, 49), ("KV cache", 49, 52),
          ("API server", 52, 53), ("first token", 53, 55)]),
    ],
)  # fmt: skip
def test_the_timeline_of_a_real_start(log, stretches):
    assert timeline_of(log).stretches == tuple(Stretch(*stretch) for stretch in stretches)


def test_a_phase_that_comes_back_counts_with_all_its_stretches():
    timeline = Timeline(100.0)
    timeline.read(CONFIGURATION, 103.0)
    timeline.read(MEASURING, 104.0)
    # What was captured to be measured does not end in a warm-up.
    assert timeline.read(CAPTURED, 106.0) is None
    timeline.read(KV_CACHE, 107.0)
    timeline.read(CAPTURING.format(0), 110.0)
    timeline.read(CAPTURED, 115.0)
    assert timeline.phase == "warm-up"
    assert timeline.phase_began_s == 15.0
    assert timeline.durations(117.0) == {
        "imports": 3.0,
        "configuration": 1.0,
        "CUDA graphs": 3.0 + 5.0,
        "KV cache": 3.0,
        "warm-up": 2.0,
    }


def test_a_line_tells_only_what_is_new():
    timeline = Timeline(0.0)
    lines = [CONFIGURATION, CONFIGURATION, *(WEIGHTS.format(n) for n in (0, 25, 25)), "nobody's"]
    assert [timeline.read(line, 1.0) for line in lines] == [
        PhaseSeen("configuration"),
        None,
        PhaseSeen("weights", "0 %"),
        PhaseSeen("weights", "25 %"),
        None,
        None,
    ]
    assert timeline.detail == "25 %"


def test_a_phase_is_overdue_after_its_limit_without_progress():
    limits = {"weights": 10.0}
    timeline = Timeline(1000.0)
    timeline.read(WEIGHTS.format(0), 1001.0)
    assert timeline.overdue(1011.0, limits) is None
    assert timeline.overdue(1011.5, limits) == Overdue("weights", 10.5, 10.0)
    timeline.read("a line that is no progress", 1012.0)
    timeline.read(WEIGHTS.format(0), 1012.0)
    assert timeline.overdue(1012.0, limits) == Overdue("weights", 11.0, 10.0)
    timeline.read(WEIGHTS.format(25), 1012.0)
    assert timeline.overdue(1022.0, limits) is None
    assert timeline.overdue(1023.0, limits) == Overdue("weights", 11.0, 10.0)
    timeline.read(KV_CACHE, 1023.0)
    assert timeline.overdue(9999.0, limits) is None


def test_a_ready_engine_is_never_overdue_and_its_lines_begin_no_phase():
    timeline = Timeline(0.0)
    timeline.begin("first token", 5.0)
    assert timeline.read("INFO [launcher.py:37] Available routes are:", 6.0) is None
    timeline.end(7.0)
    timeline.end(8.0)
    assert timeline.read(CONFIGURATION, 9.0) is None
    assert timeline.overdue(9999.0, PHASE_TIMEOUTS_S) is None
    assert timeline.stretches == (Stretch("imports", 0.0, 5.0), Stretch("first token", 5.0, 7.0))


def test_any_line_ends_the_silence():
    timeline = Timeline(50.0)
    assert timeline.silent_s(90.0) == 40.0
    assert timeline.read("nobody knows this line", 91.0) is None
    assert timeline.silent_s(93.5) == 2.5
    assert timeline.phase == "imports"


def test_every_phase_has_a_limit():
    assert set(PHASE_TIMEOUTS_S) == set(PHASES)


_PARTS = [
    "KV cache size:",
    "checkpoint shards:",
    "Capturing CUDA graphs",
    " 7%",
    "Available routes",
]


@given(st.lists(st.one_of(st.text(), st.lists(st.sampled_from(_PARTS)).map("".join))))
def test_no_line_upsets_a_timeline(lines):
    timeline = Timeline(0.0)
    for now, line in enumerate(lines):
        timeline.read(line, float(now))
    stretches = timeline.stretches
    assert {stretch.phase for stretch in stretches} <= set(PHASES)
    assert [s.ended_s for s in stretches] == [*(s.began_s for s in stretches[1:]), None]
    assert sum(timeline.durations(float(len(lines))).values()) == len(lines)
