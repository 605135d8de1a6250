"""The smoke test's report as text and as JSON."""

from io import StringIO

from rich.console import Console

from gemma_serve.planning.smoke import PROMISES, CheckResult, SmokeReport
from gemma_serve.view.smoke import (
    check_view,
    smoke_data,
    smoke_problems,
    smoke_title,
    verdict_line,
)


def check(id, status="passed", **more):
    return CheckResult(id, PROMISES[id], status, **more)


FACTS = {"prompt": "The capital of France is", "answer": "Paris.", "prompt_tokens": 6, "tokens": 2}
COMPLETION = check("completion", figures={**FACTS, "tokens_per_second": 103.4}, duration_s=0.02)
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
EIGHT = check(
    "eight-together",
    figures={
        "speedup": 5.25,
        "in_progress_at_once": 8,
        "tokens": 512,
        "tokens_per_second": 1200.0,
        "answers": [
            {"prompt": "What is the capital of France?", "answer": "Paris."},
            {"prompt": "What is the capital of Italy?", "answer": "R" * 80},
        ],
    },
)
MODELS = check("models", figures={"models": ["demo"], "max_model_len": 1024})
REPORT = SmokeReport(
    "http://127.0.0.1:8000", "demo", (MODELS, COMPLETION, STOP, CHAT, SYSTEM, EIGHT)
)


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
FAIL  stop-sequence      stopped at '[23],' · 2 tokens
      The capital of France is → {"word " * 12}word
      {"word " * 6}word
      the answer goes on past the stop sequence '[23],'
      hint: the engine's log may say why
skip  chat               a base model: it has no chat template
      hint: serve an -it
pass  chat-system        6 prompt tokens, 4 without · 2 tokens · first after 0.012 s
      [Answer in one word.] The capital of France is → Paris.
pass  eight-together     5.2 times as quick as one by one · 8 in progress at once · 1200 tokens/s
      What is the capital of France? → Paris.
      What is the capital of Italy? → {"R" * 57}…

the endpoint breaks its promises: 4 passed, 1 failed, 1 skipped
"""
    )


def test_a_good_report_says_so():
    report = SmokeReport("http://x", "demo", (MODELS, CHAT))
    assert drawn(verdict_line(report)) == "\nthe endpoint keeps its promises: 1 passed, 1 skipped\n"


def test_a_report_without_a_single_pass_is_no_good_one():
    assert not SmokeReport("http://x", "", ()).ok
    assert not SmokeReport("http://x", "", (CHAT,)).ok


def test_the_data_are_these_keys():
    data = smoke_data(REPORT)
    assert set(data) == {"url", "model", "checks"}
    assert data["checks"][2] == {
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
