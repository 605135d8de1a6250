# ruff: noqa: E501  # log lines are as long as they are
"""What the engine's log says: its phases, its lines as they come, and the error that ended it."""

import os

import pytest

from gemma_serve.engine.log import LogLines, LogReader, tail_lines
from gemma_serve.engine.timeline import PhaseSeen, phase_of

CORE = "(EngineCore pid=20534) "
API = "(APIServer pid=20441) "


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        (API + "INFO 11-22 10:51:10 [model.py:733] Resolved architecture: GemmaForCausalLM",
         PhaseSeen("configuration")),
        (CORE + "INFO 11-22 10:51:16 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='x'",
         PhaseSeen("engine core")),
        ("(Worker pid=20621) INFO 11-22 10:51:23 [cpu_model_runner.py:68] Starting to load model /models/tiny-gemma...",
         PhaseSeen("weights")),
        ("Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:00<00:00, 352.76it/s]",
         PhaseSeen("weights", "50 %")),
        ("Multi-thread loading shards:  25% Completed | 1/4 [00:00<00:00, 1.76it/s]",
         PhaseSeen("weights", "25 %")),
        (CORE + "INFO 11-22 09:50:13 [backends.py:1105] Dynamo bytecode transform time: 3.2 s",
         PhaseSeen("compilation")),
        (CORE + "INFO 11-22 10:51:24 [kv_cache_utils.py:2327] CPU KV cache size: 4,194,304 tokens, Maximum",
         PhaseSeen("KV cache")),
        (CORE + "INFO 11-22 09:50:13 [gpu_worker.py:440] Available KV cache memory: 108.13 GiB",
         PhaseSeen("KV cache")),
        ("Capturing CUDA graphs (decode, FULL):  50%|█████     | 18/35",
         PhaseSeen("CUDA graphs", "50 %")),
        ("Capturing CUDA graphs:   6%|▌         | 3/51", PhaseSeen("CUDA graphs", "6 %")),
        (CORE + "INFO 11-22 10:40:25 [model_runner.py:747] Graph capturing finished in 4 secs, took 1.03 GiB",
         PhaseSeen("warm-up")),
        (CORE + "INFO 11-22 10:51:24 [kernel_warmup.py:176] JIT kernel warmup starting.",
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


def test_lines_come_out_whole_however_they_arrive():
    data = "one\ntwo ▌10%\rtwo 20%\r\nthree\nrest".encode()
    for size in (1, 2, 5, 100):
        lines = LogLines()
        found = [x for i in range(0, len(data), size) for x in lines.feed(data[i : i + size])]
        assert found == ["one", "two ▌10%", "two 20%", "three"]


@pytest.fixture
def log(tmp_path):
    return tmp_path / "engine.log"


@pytest.fixture
def reader(log):
    reader = LogReader(log)
    yield reader
    reader.close()


def append(path, text):
    with path.open("a") as file:
        file.write(text)


def rotate(path, rest=""):
    """Move the log away as its writer does, who may have written `rest` just before."""
    append(path, rest)
    path.rename(f"{path}.1")


def test_a_log_that_is_not_there_yet_is_read_from_its_start_once_it_is(log, reader):
    assert reader.new_lines() == []
    append(log, "one\ntw")
    assert reader.new_lines() == ["one"]
    assert reader.new_lines() == []
    append(log, "o\rthree\r\n\nfo")
    assert reader.new_lines() == ["two", "three"]


def test_the_rest_of_a_rotated_log_comes_before_the_new_one(log, reader):
    append(log, "one\n")
    assert reader.new_lines() == ["one"]
    rotate(log, "two\nthr")
    assert reader.new_lines() == ["two"]
    append(log, "ee\nfour\n")
    assert reader.new_lines() == ["three", "four"]
    rotate(log, "five\n")
    append(log, "six\n")
    assert reader.new_lines() == ["five", "six"]


def test_a_removed_log_is_read_to_its_end_and_the_next_one_from_its_start(log, reader):
    append(log, "one\n")
    assert reader.new_lines() == ["one"]
    append(log, "two\n")
    log.unlink()
    assert reader.new_lines() == ["two"]
    append(log, "three\n")
    assert reader.new_lines() == ["three"]


def test_a_truncated_log_starts_again(log, reader):
    append(log, "one\ntwo\nthr")
    assert reader.new_lines() == ["one", "two"]
    os.truncate(log, 0)
    append(log, "four\n")
    assert reader.new_lines() == ["four"]


def test_one_call_reads_a_mebibyte_at_most(log, reader):
    lines = [f"{number:08} {'x' * 90}" for number in range(30_000)]
    append(log, "\n".join(lines) + "\n")
    calls = [reader.new_lines() for _ in range(4)]
    assert [line for call in calls for line in call] == lines
    assert [len(call) for call in calls] == [10485, 10486, 9029, 0]


@pytest.mark.parametrize("present", [0, 5_000, 20_000])
def test_a_reader_far_behind_goes_on_with_the_last_mebibyte_in_whole_lines(log, reader, present):
    lines = [f"{number:08} {'x' * 90}" for number in range(100_000)]
    append(log, "before\n")
    assert reader.new_lines() == ["before"]
    older, newer = lines[: len(lines) - present], lines[len(lines) - present :]
    rotate(log, "\n".join(older) + "\n")
    append(log, "".join(f"{line}\n" for line in newer))
    # 2**20 bytes hold 10485 lines of 100 bytes and a part of one.
    assert reader.new_lines() == lines[-10485:]
    append(log, "after\n")
    assert reader.new_lines() == ["after"]


def test_the_last_lines_of_a_log(log):
    assert tail_lines(log, 3) == []
    assert tail_lines(log, 3, older=True) == []
    append(log, "one\ntwo 1%\rtwo 2%\r\n\nthree")
    assert tail_lines(log, 0) == []
    assert tail_lines(log, 2) == ["two 2%", "three"]
    assert tail_lines(log, 9) == ["one", "two 1%", "two 2%", "three"]


@pytest.mark.parametrize("count", [1, 2, 655, 656, 657, 1_311, 2_000, 2_001])
def test_the_last_lines_are_whole_over_the_blocks_that_are_read(log, count):
    lines = [f"{number:06} {'é' * 46}" for number in range(2_000)]
    append(log, "\n".join(lines) + "\n")
    assert tail_lines(log, count) == lines[-count:]


def test_the_last_lines_go_back_over_older_logs_only_when_asked(log, reader):
    for age, text in enumerate(["six\nseven\n", "four\nfive\n", "two\nthree\n", "one\n"]):
        append(log.with_name(f"engine.log.{age}") if age else log, text)
    assert tail_lines(log, 5) == ["six", "seven"]
    assert tail_lines(log, 5, older=True) == ["three", "four", "five", "six", "seven"]
    assert tail_lines(log, 99, older=True) == [
        "one", "two", "three", "four", "five", "six", "seven",
    ]  # fmt: skip
    # In the middle of a rotation one of the names is free.
    log.unlink()
    assert tail_lines(log, 3, older=True) == ["three", "four", "five"]
    assert tail_lines(log, 3) == []


def test_a_log_that_cannot_be_read_has_no_lines(log, reader):
    log.mkdir()
    assert reader.new_lines() == []
    assert tail_lines(log, 3) == []


def test_a_line_may_be_longer_than_one_call_reads(log, reader):
    append(log, "x" * (3 * 2**20) + "\n")
    assert [line for _ in range(4) for line in reader.new_lines()] == ["x" * (3 * 2**20)]


def test_the_last_lines_are_found_without_reading_the_rest(log, monkeypatch):
    log.write_bytes(b"a line of the log\n" * 500_000)
    read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: read.append(args[1]) or pread(*args))
    assert tail_lines(log, 2) == ["a line of the log"] * 2
    assert sum(read) <= 2 * 2**16
