"""The catalogue of failures: whole, consistent, true about our own program, and computed right."""

import re
import shlex
import string
from pathlib import Path

import pytest
import typer

from gemma_serve.adapters.package_data import load_failures
from gemma_serve.cli.app import app
from gemma_serve.errors import Problem
from gemma_serve.planning.config import ServeConfig
from gemma_serve.planning.failures import (
    Change,
    Explained,
    MessagePart,
    parse_failures,
    without_whitespace,
)

LOGS = Path(__file__).parent / "data" / "logs"
HEALTHY = [*LOGS.glob("*.log"), *(LOGS / "failures").glob("healthy.*.log")]
CATALOGUE = load_failures()
FAILURES = pytest.mark.parametrize("failure", CATALOGUE.failures, ids=lambda one: one.id)

# What the project promised to name; more may be added.
PROMISED = [
    "gated-no-token",
    "gated-no-licence",
    "repo-not-found",
    "offline-cache-miss",
    "download-silent",
    "disk-full",
    "transformers-too-old",
    "arch-unsupported",
    "arch-inspect-failed",
    "gemma4-transformers-515",
    "abi-mismatch",
    "flag-unknown",
    "wrong-parser-for-model",
    "driver-too-old",
    "cuda-803",
    "no-gpu-visible",
    "bf16-unsupported",
    "fp16-refused",
    "no-kernel-image",
    "python-headers",
    "nvcc-missing",
    "quant-capability",
    "wsl-uva",
    "weights-oom",
    "kv-none",
    "kv-too-small",
    "autofit-none",
    "gpu-busy",
    "profile-race",
    "host-oom",
    "orphan-engine",
    "tp-heads",
    "tp-too-big",
    "visible-devices",
    "shm-small",
    "nccl-hang",
    "wrapper",
    "ready-timeout",
    "compile-cache",
    "port-in-use",
    "mm-batch-too-small",
    "len-over-derived",
    "no-system-role",
    "alternate-roles",
    "no-chat-template",
    "ctx-exceeded",
    "tools-not-enabled",
    "alive-but-dead",
    "weights-truncated",
    "weights-missing",
    "tokenizer-missing",
    "cpu-memory-busy",
    "engine-killed",
]

# What a judge adds to the numbers of the log: the model, the signal, the process that is gone.
GIVEN = {"model", "hub_model", "model_folder", "deployment", "signal", "process", "port"}
COMMANDS = {
    name: {opt for parameter in command.params for opt in parameter.opts if opt.startswith("-")}
    for name, command in typer.main.get_command(app).commands.items()
}
# Flags of others that our sentences name.
OF_OTHERS = {"--ipc", "--shm-size", "--torch-backend", "--upgrade", "--help"}


def entry(**changes):
    whole = {
        "id": "a",
        "title": "it is broken",
        "kind": "start",
        "severity": "fatal",
        "match": ["the thing is broken"],
        "cause": ["{n} things are broken", "something is broken"],
        "fix": "mend it",
    }
    return {**whole, **changes}


def parse(*entries):
    return parse_failures({"failures": list(entries)})


def derived(name, **numbers):
    failure = parse(entry(derive=[name])).failures[0]
    return failure.with_derived(numbers).get(name)


def fields(template):
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def known_names(failure):
    groups = {name for text in failure.numbers for name in re.compile(text).groupindex}
    return groups | set(failure.derive) | GIVEN


def wrong_options(command):
    """What a command line of ours names that the program has not."""
    found = []
    for part in command.split(" && "):
        words = shlex.split(part)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            del words[0]
        if words[0] != "gemma-serve":
            continue
        if words[1] not in COMMANDS:
            found.append(words[1])
            continue
        options = [word.partition("=")[0] for word in words[2:] if word.startswith("-")]
        found += [option for option in options if option not in COMMANDS[words[1]]]
    return found


def test_every_failure_that_was_promised_is_there_once():
    assert len(PROMISED) == len(set(PROMISED)) == 53
    assert [id_ for id_ in PROMISED if id_ not in CATALOGUE] == []


@FAILURES
def test_its_sentences_name_only_what_can_be_known_and_the_last_needs_nothing(failure):
    for templates in (failure.causes, failure.fixes):
        used = set().union(*map(fields, templates))
        assert (used - known_names(failure), fields(templates[-1])) == (set(), set())
    used = set().union(*map(fields, failure.commands))
    assert used <= known_names(failure)
    assert not failure.commands or fields(failure.commands[-1]) <= {"model"}
    # One without a number would hide those after it.
    for templates in (failure.causes, failure.fixes, failure.commands):
        assert all(fields(template) for template in templates[:-1])


@FAILURES
def test_its_sentences_are_sentences_and_its_kind_is_one(failure):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", failure.id)
    assert failure.kind in ("start", "death", "request")
    assert failure.severity in ("fatal", "degraded", "request")
    for text in (failure.title, *failure.causes, *failure.fixes):
        assert text == text.strip()
        assert not text.endswith(".")
        assert "\n" not in text
    assert failure.remedy in (
        None, "shorten-context", "another-port", "purge-compile-cache", "wait-for-memory",
        "longer-ready-timeout",
    )  # fmt: skip


@FAILURES
def test_its_fix_is_one_that_the_program_knows(failure):
    numbers = dict.fromkeys(known_names(failure), "1")
    for command in failure.commands:
        assert wrong_options(command.format_map(numbers)) == []
    said = " ".join([*failure.causes, *failure.fixes])
    for quoted in re.findall(r"`(gemma-serve [^`]*)`", said):
        assert wrong_options(quoted.format_map(numbers)) == []
    flags = set(re.findall(r"`(--[a-z][a-z-]*)", said))
    assert flags <= set().union(*COMMANDS.values()) | OF_OTHERS
    if failure.change is not None:
        assert failure.change.settings.keys() <= ServeConfig.model_fields.keys()
        values = [*failure.change.settings.values(), *failure.change.environment.values()]
        assert set().union(*map(fields, values)) <= known_names(failure)


def test_no_advice_is_what_the_libraries_say_wrongly():
    """Transformers alone breaks vLLM's pin, float16 ruins Gemma, a longer length gives NaN."""
    commands = [command for failure in CATALOGUE.failures for command in failure.commands]
    assert [
        c for c in commands if "transformers" in c or "dtype half" in c or "dtype float16" in c
    ] == []
    changes = [failure.change for failure in CATALOGUE.failures if failure.change is not None]
    assert all("VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in change.environment for change in changes)
    assert "--gpu-memory-utilization" not in " ".join(CATALOGUE["kv-none"].commands)


def test_a_text_is_long_enough_and_all_of_them_are_few():
    parts = [part for failure in CATALOGUE.failures for part in failure.parts]
    assert [part.text for part in parts if len(part.text) < 12] == []
    assert all(part.rank in ("cause", "symptom", "notice", "wrapper") for part in parts)
    # One automaton looks for all of them at once: it must stay small to be made.
    assert len(parts) < 400


@pytest.mark.parametrize("log", HEALTHY, ids=lambda path: path.name)
def test_a_healthy_log_has_none_of_the_texts_but_notices(log):
    said = without_whitespace(log.read_text(errors="replace"))
    found = {
        part.text
        for failure in CATALOGUE.failures
        for part in failure.parts
        if part.rank != "notice" and part.text in said and (part.near is None or part.near in said)
    }
    # An engine that is stopped says so in the words of one that fails.
    assert found <= {without_whitespace(text) for text in ("EngineCore encountered an issue",)}


@pytest.mark.parametrize(
    ("heads", "wanted", "legal"),
    [("32", "3", "2"), ("16", "16", "8"), ("8", "7", "4"), ("7", "5", "1"), ("32", "1", "1"),
     ("0", "2", None), ("x", "2", None), ("32", "", None)],
)  # fmt: skip
def test_a_legal_tensor_parallel_size_divides_the_heads(heads, wanted, legal):
    name = "legal_tensor_parallel_size"
    assert derived(name, heads=heads, tensor_parallel_size=wanted) == legal
    assert derived(name, heads=heads) is None


@pytest.mark.parametrize(
    ("free", "total", "share"),
    [("31.44", "47.38", "0.64"), ("40", "40", "0.98"), ("0.5", "40", None), ("0", "0", None),
     ("1", "-4", None), ("nan of", "40", None)],
)  # fmt: skip
def test_a_utilization_that_fits_leaves_a_margin(free, total, share):
    assert derived("fitting_utilization", free_gib=free, total_gib=total) == share
    assert derived("fitting_utilization", free_gib=free) is None


@pytest.mark.parametrize(
    ("name", "number", "value", "expected"),
    [
        ("cuda_version", "cuda_number", "12080", "12.8"),
        ("cuda_version", "cuda_number", "11000", "11.0"),
        ("cuda_version", "cuda_number", "12.8", None),
        ("doubled_timeout_s", "timeout_s", "600", "1200"),
        ("doubled_timeout_s", "timeout_s", "1800", "3600"),
        ("doubled_timeout_s", "timeout_s", "1", "1200"),
        ("doubled_timeout_s", "timeout_s", "soon", None),
        ("needed_power_of_two", "needed_batched_tokens", "2496", "4096"),
        ("needed_power_of_two", "needed_batched_tokens", "4096", "4096"),
        ("needed_power_of_two", "needed_batched_tokens", "1", "1"),
        ("needed_power_of_two", "needed_batched_tokens", "0", "1"),
        ("needed_power_of_two", "needed_batched_tokens", "many", None),
        ("signal_name", "signal", "9", "SIGKILL"),
        ("signal_name", "signal", "11", "SIGSEGV"),
        ("signal_name", "signal", "200", "signal 200"),
        ("signal_name", "signal", "?", None),
    ],
)
def test_a_derived_number(name, number, value, expected):
    assert derived(name, **{number: value}) == expected
    assert derived(name) is None


def test_the_first_sentence_whose_numbers_are_known_is_said():
    failure = parse(
        entry(
            numbers=[r"broken: (?P<n>\d+(?:,\d{3})*)"],
            command=["gemma-serve up --model {model} --max-model-len {n}", "gemma-serve plan"],
            change={"max_model_len": "{n}", "env": {"A": "{n}"}},
        )
    ).failures[0]
    numbers = failure.find_numbers("the thing is broken: 1,024 pieces")
    assert numbers == {"n": "1024"}
    assert failure.explain(numbers) == Explained(
        "1024 things are broken",
        "mend it",
        "gemma-serve up --model MODEL --max-model-len 1024",
        Change({"max_model_len": "1024"}, {"A": "1024"}),
    )
    assert failure.explain({"model": "m"}) == Explained(
        "something is broken", "mend it", "gemma-serve plan", None
    )
    assert failure.problem(numbers) == Problem("a", "1024 things are broken", "mend it")


def test_a_problem_before_the_start_gets_the_failures_title():
    catalogue = parse(entry())
    titled = catalogue.titled(Problem("a", "two of three", "mend it"))
    assert titled == Problem("a", "it is broken: two of three", "mend it")
    assert catalogue.titled(titled) == titled
    assert catalogue.titled(Problem("b", "other")) == Problem("b", "other")


def test_a_part_is_read_without_its_whitespace():
    part = {"text": "no space", "with": "a b", "without": "c d", "rank": "notice", "times": 3}
    failure = parse(entry(match=["the thing", part])).failures[0]
    assert failure.parts == (
        MessagePart("thething"),
        MessagePart("nospace", "notice", "ab", "cd", 3),
    )


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ([entry(fixes=["x"])], "unknown keys fixes"),
        ([entry(), entry()], "an id stands twice"),
        ([entry(yields_to=["b"])], "a yields to b"),
        ([entry(derive=["nothing"])], "nothing"),
        ([{"id": "a"}], "title"),
    ],
)
def test_an_entry_that_is_wrong_is_refused(entries, error):
    with pytest.raises((KeyError, TypeError, ValueError), match=error):
        parse(*entries)
