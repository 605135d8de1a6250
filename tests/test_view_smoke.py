"""The smoke test's report as text, as a live table, as JSON and as JUnit XML."""

from io import StringIO

import junitparser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from gemma_serve.errors import Problem
from gemma_serve.planning.smoke.promises import PROMISES
from gemma_serve.planning.smoke.report import CheckResult, SmokeReport
from gemma_serve.view.smoke import (
    check_view,
    smoke_data,
    smoke_problems,
    smoke_title,
    verdict_line,
)
from gemma_serve.view.smoke_junit import junit_of_problems, junit_xml
from gemma_serve.view.smoke_table import SmokeTable, can_show_table
from gemma_serve.view.smoke_words import seen


def check(id, status="passed", **more):
    return CheckResult(id, PROMISES[id].text, status, **more)


FACTS = {"prompt": "The capital of France is", "answer": "Paris.", "prompt_tokens": 6, "tokens": 2}
COMPLETION = check("completion", figures={**FACTS, "tokens_per_second": 103.4}, duration_s=0.02)
STREAM = check("completion-stream", figures={**FACTS, "ttft_s": 0.0123, "events": 2})
STOP = check(
    "stop-sequence",
    "failed",
    reason="the answer goes on past the stop sequence '[23],'",
    hint="the engine's log may say why",
    figures={**FACTS, "answer": "word " * 20, "tokens_per_second": None, "stop": "[23],"},
)
CHAT = check("chat", "skipped", reason="a base model: it has no chat template", hint="serve an -it")
SYSTEM = check(
    "chat-system",
    figures={**FACTS, "system": "Answer in one word.", "prompt_tokens_alone": 4, "ttft_s": 0.0123},
)
TOGETHER = check(
    "together",
    figures={
        "concurrency": 8,
        "speedup": 5.25,
        "in_progress_at_once": 8,
        "engine_running": None,
        "tokens": 512,
        "tokens_per_second": 1200.0,
        "answers": [
            {
                "prompt": "What is the capital of France?",
                "answer": "Paris.\n\n",
                "started_s": 0.0,
                "token_times_s": [0.123456],
            },
            {"prompt": "What is the capital of Italy?", "answer": "R" * 80},
        ],
    },
)
MODELS = check("models", figures={"models": ["demo"], "max_model_len": 1024})
REPORT = SmokeReport(
    "http://127.0.0.1:8000",
    "demo",
    (MODELS, COMPLETION, STREAM, STOP, CHAT, SYSTEM, TOGETHER),
    started_at=1767225600.25,
    duration_s=9.5,
    engine_version="0.32.0",
)
ANY_TEXT = st.text(st.characters(), max_size=40)  # lone surrogates and control characters, too


def drawn(renderable, width=100):
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def test_the_report_fits_on_a_hundred_columns():
    assert (
        "".join(
            drawn(part)
            for part in (
                smoke_title(REPORT.url, REPORT.model),
                *map(check_view, REPORT.checks),
                verdict_line(REPORT),
            )
        )
        == f"""\
smoke test of demo at http://127.0.0.1:8000

pass  models             demo, up to 1024 tokens
pass  completion         2 tokens · 103 tokens/s
      The capital of France is → Paris.
pass  completion-stream  2 tokens in 2 events · first after 0.012 s
FAIL  stop-sequence      stop sequence '[23],' · 2 tokens
      The capital of France is → {"word " * 12}word
      {"word " * 6}word
      the answer goes on past the stop sequence '[23],'
      hint: the engine's log may say why
skip  chat               a base model: it has no chat template
      hint: serve an -it
pass  chat-system        6 prompt tokens, 4 without · 2 tokens · first after 0.012 s
      [Answer in one word.] The capital of France is → Paris.
pass  together           8 of 8 at once · 5.2 times as quick as one by one · 1200 tokens/s
      What is the capital of France? → Paris.
      What is the capital of Italy? → {"R" * 57}…

the endpoint breaks its promises: 5 passed, 1 failed, 1 skipped
"""
    )


@pytest.mark.parametrize(
    ("id", "figures", "words"),
    [
        ("reachable", {"status": 200, "version": "0.32.0"}, "version 0.32.0"),
        ("authenticated", {"refused": ["/a without a key"] * 6}, "6 requests refused with 401"),
        ("unknown-model", {"status": 404}, "refused with 404"),
        ("unknown-model", {"status": 200}, "answered with 200"),
        (
            "usage",
            {"prompt_tokens": 6, "tokens": 2, "total_tokens": 8},
            "6 prompt tokens · 2 tokens · 8 in all",
        ),
        ("max-tokens", {"tokens": 1, "max_tokens": 5}, "1 token · at most 5 asked for"),
        ("malformed-body", {"refused": ["a list", "no prompt"]}, "refused: a list, no prompt"),
        ("language", {"answers_read": 12, "tokens": 300}, "12 answers read · 300 tokens"),
        ("staggered", {"stagger_s": 0.5, "overlap_s": 0.0}, "0.50 s apart, 0 s side by side"),
        ("together", {"in_progress_at_once": 1, "concurrency": 8}, "1 of 8 at once"),
        ("cancelled-stream", {"tokens_read": 4, "freed_s": 0.01}, "freed after 0.010 s"),
        ("cancelled-stream", {"tokens_read": 4, "freed_s": None}, "left after 4 tokens"),
        (
            "prefix-cache",
            {"prompt_tokens": 640, "hit_tokens": 512},
            "512 of 640 prompt tokens from the cache",
        ),
        (
            "first-token",
            {"ttft_s": 0.021, "max_ttft_s": 2.0},
            "first after 0.021 s · at most 2 s asked for",
        ),
        (
            "throughput",
            {"tokens_per_second": 1200.4, "min_tokens_per_second": 100.0},
            "1200 tokens/s · at least 100 asked for",
        ),
    ],
)
def test_each_check_has_its_words(id, figures, words):
    assert " · ".join(seen(check(id, figures=figures))) == words


@pytest.mark.parametrize("value", [None, "x", [], float("nan"), 10**400, {}])
def test_figures_that_are_no_figures_are_left_out(value):
    keys = "status refused models max_model_len tokens speedup overlap_s stagger_s answers stop"
    figures = dict.fromkeys(keys.split(), value) | {"stop": None}
    for id in PROMISES:
        assert drawn(check_view(check(id, "failed", figures=figures))).startswith(f"FAIL  {id}")


def test_what_a_server_says_does_not_control_the_terminal():
    figures = {**FACTS, "answer": "\x1b[2J\x00\ud800 two\nlines"}
    assert drawn(check_view(check("completion", figures=figures))) == (
        "pass  completion         2 tokens\n"
        "      The capital of France is → \ufffd[2J\ufffd\ufffd two lines\n"
    )


@pytest.mark.parametrize(
    ("checks", "said"),
    [
        ((MODELS, CHAT), "the endpoint keeps its promises: 1 passed, 1 skipped"),
        ((CHAT,), "no promise of the endpoint was tried: 1 skipped"),
        ((), "no promise of the endpoint was tried: 0 checks"),
    ],
)
def test_the_verdict_says_what_was_shown(checks, said):
    assert drawn(verdict_line(SmokeReport("http://x", "demo", checks))) == f"\n{said}\n"


def test_the_data_are_these_keys():
    data = smoke_data(REPORT)
    checks = data.pop("checks")
    assert data == {
        "url": "http://127.0.0.1:8000",
        "model": "demo",
        "started_at": "2026-01-01T00:00:00+00:00",
        "duration_s": 9.5,
        "engine_version": "0.32.0",
    }
    assert checks[3] == {
        "id": "stop-sequence",
        "promise": "A stop sequence ends the answer and is left out of it",
        "status": "failed",
        "reason": "the answer goes on past the stop sequence '[23],'",
        "figures": dict(STOP.figures),
        "hint": "the engine's log may say why",
        "duration_s": 0.0,
    }


def test_every_broken_promise_is_a_problem():
    (problem,) = smoke_problems(REPORT)
    assert problem.code == "smoke.stop-sequence"
    assert problem.message == f"{STOP.promise}: {STOP.reason}"
    assert problem.hint == STOP.hint


# The live table.


def terminal(width=60, height=14):
    return Console(
        file=StringIO(), width=width, height=height, force_terminal=True, color_system=None
    )


def after_the_display(console):
    """What stays on the terminal: all after the cursor was given back and the display erased."""
    return console.file.getvalue().rpartition("\x1b[?25h")[2].rpartition("\x1b[2K")[2]


def test_the_table_stays_and_the_failures_are_told_below_it():
    console = terminal()
    with SmokeTable([c.id for c in REPORT.checks[1:4]], "title", console=console) as table:
        for result in REPORT.checks[1:4]:
            table.began(result.id)
            table.ended(result)
    assert console.file.getvalue().startswith("title\n")
    lines = after_the_display(console).splitlines()
    assert [line.rstrip() for line in lines] == [
        "pass  completion          0.02 s  2 tokens · 103 tokens/s",
        "pass  completion-stream   0.00 s  2 tokens in 2 events ·",
        "                                  first after 0.012 s",
        "FAIL  stop-sequence       0.00 s  stop sequence '[23],' · 2",
        "                                  tokens",
        "",
        "FAIL  stop-sequence",
        "      The capital of France is → word word word word word",
        "      word word word word word word word word word word word",
        "      word word word word",
        "      the answer goes on past the stop sequence '[23],'",
        "      hint: the engine's log may say why",
    ]


def interrupted(table):
    table.ended(MODELS)
    table.began("completion")
    raise KeyboardInterrupt


def test_an_exception_leaves_the_cursor_and_the_table():
    console = terminal()
    with (
        pytest.raises(KeyboardInterrupt),
        SmokeTable(["models", "completion"], "title", console=console) as table,
    ):
        interrupted(table)
    written = console.file.getvalue()
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    lines = after_the_display(console).splitlines()
    assert [line.rstrip() for line in lines] == [
        "pass  models              0.00 s  demo, up to 1024 tokens",
        "      completion",
    ]


def test_a_short_terminal_shows_the_checks_around_the_one_that_runs():
    ids = tuple(PROMISES)
    table = SmokeTable(ids, "", console=terminal())
    assert table.window(27) == ids
    assert table.window(5) == ids[:5]
    for id in ids[:10]:
        table.ended(check(id))
    assert table.window(5) == ids[7:12]
    for id in ids[10:]:
        table.ended(check(id))
    assert table.window(5) == ids[22:]


def test_a_narrow_terminal_cuts_the_words_off_and_not_the_ids():
    console = terminal(width=50)
    table = SmokeTable(["completion-stream"], "", console=console)
    table.ended(STREAM)
    console.print(table.table(["completion-stream"], whole=False))
    assert console.file.getvalue().rstrip() == "pass  completion-stream   0.00 s  2 tokens in 2 e…"


def test_a_pipe_gets_no_table_whatever_the_colours(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not can_show_table(Console(file=StringIO()))


# JUnit XML, as a pipeline's own parser reads it.


def test_junit_has_a_case_for_each_check():
    suite = next(iter(junitparser.JUnitXml.fromstring(junit_xml(REPORT).encode())))
    assert (suite.name, suite.tests, suite.failures, suite.errors, suite.skipped) == (
        "gemma-serve smoke-test",
        7,
        1,
        0,
        1,
    )
    assert (suite.time, suite.timestamp) == (9.5, "2026-01-01T00:00:00+00:00")
    assert {p.name: p.value for p in suite.properties()} == {
        "url": "http://127.0.0.1:8000",
        "model": "demo",
        "engine_version": "0.32.0",
    }
    cases = {case.name: case for case in suite}
    assert list(cases) == [c.id for c in REPORT.checks]
    assert {case.classname for case in suite} == {"gemma-serve.smoke"}
    assert cases["completion"].time == 0.02
    (failure,) = cases["stop-sequence"].result
    assert (failure.message, failure.type) == (STOP.reason, "smoke.stop-sequence")
    assert failure.text == f"{STOP.promise}\n{STOP.reason}\nhint: {STOP.hint}"
    (skipped,) = cases["chat"].result
    assert skipped.message == CHAT.reason
    assert cases["together"].system_out == (
        "concurrency: 8\nspeedup: 5.25\nin_progress_at_once: 8\ntokens: 512\n"
        "tokens_per_second: 1200.0\nanswers: What is the capital of France? → Paris.\n"
        f"answers: What is the capital of Italy? → {'R' * 80}"
    )


def test_junit_tells_of_a_start_that_failed():
    problems = (Problem("engine.oom", "no memory", "use less"), Problem("other", "and more"))
    suite = next(
        iter(junitparser.JUnitXml.fromstring(junit_of_problems(problems, started_at=0.0).encode()))
    )
    (case,) = suite
    (error,) = case.result
    assert (suite.tests, suite.failures, suite.errors) == (1, 0, 1)
    assert (case.name, error.message, error.type) == ("start", "no memory", "engine.oom")
    assert error.text == "no memory\nhint: use less\nand more"


@settings(deadline=None, max_examples=50)  # other tests take the cores
@given(reason=ANY_TEXT, answer=ANY_TEXT, hint=ANY_TEXT)
def test_junit_holds_whatever_a_server_says(reason, answer, hint):
    failed = check("chat", "failed", reason=reason, hint=hint, figures={"answer": answer})
    skipped = check("greedy", "skipped", reason=reason)
    report = SmokeReport("http://x", reason, (failed, skipped))
    problems = [Problem("some.code", reason, hint)]
    for text in (junit_xml(report), junit_of_problems(problems, started_at=0.0)):
        (suite,) = junitparser.JUnitXml.fromstring(text.encode())
        assert suite.tests == len(list(suite))
