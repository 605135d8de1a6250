"""The smoke test against an engine that can misbehave: what it passes, fails and skips."""

import json
import os
import subprocess
import sys
from pathlib import Path

import junitparser
import pytest

from fake_engine import serving
from gemma_serve.adapters.package_data import data_path
from gemma_serve.cli.app import main
from gemma_serve.planning.smoke.promises import PROMISES, with_needs
from gemma_serve.planning.smoke.questions import parse_answers
from gemma_serve.usecases.smoke.run import run_smoke
from gemma_serve.usecases.smoke.session import SmokeOptions

ANSWERS = parse_answers(data_path("answers.json").read_text(encoding="utf-8"))
SCRIPTS = Path(__file__).parent.parent / "scripts"
# What only vLLM itself has: they are tried on the real engine.
VLLM_ONLY = {"utf-8": "the server ignores structured outputs",
             "prefix-cache": "the server shows no /metrics of vLLM's"}  # fmt: skip
NOT_ASKED_FOR = {
    "authenticated": "no key was given, and the server asks for none",
    "first-token": "no --max-ttft was given",
    "throughput": "no --min-tokens-per-second was given",
}
CHATS = ("chat", "chat-stream", "chat-limits", "chat-multi-turn", "chat-system", "wrong-turns")
ONE_ANSWER = {"prompt", "answer", "prompt_tokens", "tokens", "tokens_per_second"}
STREAMED = ONE_ANSWER | {"ttft_s", "events"}
SEVERAL = {"ttft_s", "tokens", "tokens_per_second", "answers"}
FIGURES = {
    "reachable": {"status", "version"},
    "models": {"models", "max_model_len"},
    "unknown-model": {"status"},
    "completion": ONE_ANSWER,
    "completion-stream": STREAMED,
    "usage": {"prompt_tokens", "tokens", "total_tokens", "prompt_tokens_tokenized"},
    "max-tokens": ONE_ANSWER | {"max_tokens"},
    "stop-sequence": ONE_ANSWER | {"stop"},
    "greedy": ONE_ANSWER,
    "chat": ONE_ANSWER,
    "chat-stream": STREAMED,
    "chat-limits": ONE_ANSWER | {"stop"},
    "chat-multi-turn": STREAMED | {"prompt_tokens_alone"},
    "chat-system": ONE_ANSWER | {"system", "prompt_tokens_alone"},
    "wrong-turns": {"status"},
    "prompt-too-long": {"status", "max_model_len"},
    "malformed-body": {"refused"},
    "language": {"answers_read", "tokens"},
    "known-answers": {"answers_read"},
    "staggered": SEVERAL | {"stagger_s", "first_ttft_s", "overlap_s"},
    "together": SEVERAL
    | {"speedup", "one_after_another_s", "together_s", "in_progress_at_once", "in_progress_mean"}
    | {"concurrency", "engine_running", "engine_waiting", "alone"},
    "cancelled-stream": {"tokens_read", "freed_s"},
}


def smoke(url, only=tuple(PROMISES), *, check_timeout_s=20.0, **more):
    keywords = {key: more.pop(key) for key in ("model", "api_key", "answers") if key in more}
    seen, begun = [], []
    report = run_smoke(
        url=url,
        on_event=seen.append,
        on_begin=begun.append,
        only=only,
        options=SmokeOptions(check_timeout_s=check_timeout_s, **more),
        **keywords,
    )
    assert tuple(seen) == report.checks
    assert tuple(begun) == tuple(check.id for check in report.checks) == with_needs(only)
    assert all(bool(check.reason) == (check.status != "passed") for check in report.checks)
    return report


def by_status(report, status):
    return {check.id: check for check in report.checks if check.status == status}


def reasons(report, status):
    return {id: check.reason for id, check in by_status(report, status).items()}


# What a right endpoint looks like.


def test_a_good_endpoint_keeps_every_promise():
    with serving() as url:
        report = smoke(url)
    assert report.ok
    assert (report.url, report.model, report.engine_version) == (url, "demo", "0.32.0")
    assert reasons(report, "failed") == {}
    assert reasons(report, "skipped") == VLLM_ONLY | NOT_ASKED_FOR
    passed = by_status(report, "passed")
    assert {id: set(check.figures) for id, check in passed.items()} == FIGURES
    assert passed["chat"].figures["answer"] == "The capital of France is Paris."
    figures = passed["together"].figures
    assert figures["answers"][1]["answer"] == "The capital of Italy is Rome."
    assert (figures["concurrency"], figures["tokens"]) == (8, 8 * 64)
    for group in ("answers", "alone"):
        assert [len(stream["token_times_s"]) for stream in figures[group]] == [64] * 8
    assert all(check.duration_s > 0 for id, check in passed.items() if "ttft_s" in FIGURES[id])
    assert report.started_at > 1e9
    assert report.duration_s >= sum(check.duration_s for check in report.checks)


def test_a_small_context_and_another_number_of_requests_at_once():
    with serving({"max_model_len": 110}) as url:
        report = smoke(url, concurrency=3)
        alone = smoke(url, only=["staggered", "together"], concurrency=1)
    assert report.ok
    assert by_status(report, "passed")["together"].figures["concurrency"] == 3
    assert reasons(alone, "skipped") == dict.fromkeys(
        ["staggered", "together"], "--concurrency is 1"
    )


def test_another_model_needs_no_known_answers():
    with serving(None, "--served-model-name", "other") as url:
        report = smoke(url)
        wrong = smoke(url, answers=ANSWERS, only=["known-answers"])
    assert (report.ok, report.model) == (True, "other")
    unknown = {"known-answers": "what this model should answer is not known"}
    assert reasons(report, "skipped") == VLLM_ONLY | NOT_ASKED_FOR | unknown
    assert set(by_status(wrong, "failed")) == {"known-answers"}


def test_gemma_that_was_taught_to_chat_knows_the_capital_of_france():
    with serving(None, "--served-model-name", "google/gemma-3-1b-it") as url:
        report = smoke(url, only=["known-answers"])
    (reason,) = reasons(report, "failed").values()
    assert reason.startswith("to 'What is the capital of France?' it says ")
    assert reason.endswith(", without 'Paris'")


def test_a_base_model_is_not_asked_to_chat_unless_that_is_required():
    with serving({"no_chat_template": True}, "--served-model-name", "gemma-2b") as url:
        report = smoke(url)
        insisted = smoke(url, only=["chat", "chat-stream"], required=frozenset({"chat"}))
    assert report.ok
    no_template = "a base model: it has no chat template"
    skipped = reasons(report, "skipped")
    assert {id: skipped[id] for id in CHATS} == dict.fromkeys(CHATS, no_template)
    assert reasons(insisted, "failed") == {
        "chat": f"it is required, but was skipped: {no_template}"
    }
    assert reasons(insisted, "skipped") == {"chat-stream": "`chat` failed"}


def test_checks_are_chosen_by_their_ids():
    with serving() as url:
        report = smoke(url, only=["completion-stream"], left_out=frozenset({"reachable"}))
    assert reasons(report, "skipped") == {
        "reachable": "left out by --skip",
        "models": "it needs `reachable`, which was left out",
        "completion": "it needs `reachable`, which was left out",
        "completion-stream": "it needs `reachable`, which was left out",
    }
    assert not report.ok


def test_limits_of_the_user():
    limits = {"max_ttft_s": 10.0, "min_tokens_per_second": 1.0}
    only = ["first-token", "throughput"]
    with serving({"slow_first_token_s": 0.05}) as url:
        assert smoke(url, only=only, **limits).ok
        limits = {"max_ttft_s": 0.01, "min_tokens_per_second": 1e6}
        failed = reasons(smoke(url, only=only, **limits), "failed")
    assert set(failed) == set(only)
    assert failed["first-token"].endswith(", not within 0.01 s")
    assert failed["throughput"].endswith(" tokens came in a second, not 1e+06")


# What is wrong is found by the check that owns the promise. Those of a known model, and the
# proxy that breaks a real engine's promises, are in test_smoke_proof.py.


@pytest.mark.parametrize(
    ("faults", "id", "reason"),
    [
        ({"answer": "<pad>"}, "language", "holds only special tokens"),
        ({"answer": ""}, "language", "the answer is empty"),
        ({"answer": " word"}, "language", "repeats 'word' over and over"),
        ({"same_answer": True}, "language", "different questions got the same answer"),
        ({"ignore_stop": True}, "stop-sequence", "goes on past the stop sequence"),
        ({"echo_stop": True}, "stop-sequence", "repeats the stop sequence"),
        ({"no_usage": True}, "usage", "counted prompt_tokens as None"),
        ({"wrong_usage": True}, "usage", "are counted as"),
        ({"drop_event": True}, "completion-stream", "streamed it reads"),
        ({"drop_history": True}, "chat-multi-turn", "prompt tokens with the earlier turns"),
        ({"drop_system": True}, "chat-system", "prompt tokens with the system message"),
        ({"serial": True, "max_model_len": 64}, "staggered", "the second request waited"),
        ({"serial": True, "max_model_len": 64}, "together", "one after another"),
        ({"crossed": True}, "together", "got the answer of request"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_broken_promise_is_found_where_no_answer_is_known(faults, id, reason):
    with serving(faults, "--served-model-name", "other") as url:
        report = smoke(url, only=[id])
    assert not report.ok
    failed = reasons(report, "failed")
    assert list(failed) == [id]
    assert reason in failed[id]


def test_the_wrong_model_is_found_and_nothing_more_is_asked():
    with serving({"wrong_model": "gemma-2b"}) as url:
        report = smoke(url, model="demo")
    assert reasons(report, "failed") == {"models": "'demo' is not served here, but gemma-2b"}
    assert set(reasons(report, "skipped").values()) == {
        "no key was given, and the server asks for none",
        "`models` failed",
        "none passed of `completion`, `chat`",
        "none passed of `completion-stream`, `chat-stream`",
        "none passed of `together`, `completion-stream`, `chat-stream`",
    }


def test_nobody_there():
    report = smoke("http://127.0.0.1:9")
    assert list(by_status(report, "failed")) == ["reachable"]
    assert "cannot reach http://127.0.0.1:9" in reasons(report, "failed")["reachable"]
    assert set(reasons(report, "skipped").values()) == {"`reachable` failed"}
    assert not report.ok


def test_a_dead_engine_behind_a_healthy_front():
    with serving({"health_only": True}) as url:
        report = smoke(url)
    assert "EngineDeadError" in reasons(report, "failed")["models"]


def test_a_hang_ends_with_the_time_limit_and_is_not_waited_for_again():
    with serving({"hang_after": 3}) as url:
        report = smoke(url, check_timeout_s=0.5)
    assert reasons(report, "failed") == {"completion": "it was not over within 0.5 s"}
    assert by_status(report, "skipped")["chat"].reason == (
        "the endpoint stopped answering in `completion`"
    )


def test_a_hang_of_streams_alone_is_found_and_the_rest_goes_on():
    with serving({"hang": "completion-stream"}) as url:
        report = smoke(url, only=["stop-sequence", "chat-stream"], check_timeout_s=0.5)
    assert list(by_status(report, "failed")) == ["completion-stream"]
    assert reasons(report, "skipped") == {"stop-sequence": "`completion-stream` failed"}


def test_the_whole_test_has_an_end():
    with serving({"token_delay_s": 0.05}) as url:
        report = smoke(url, timeout_s=1.0)
    said = "the 1 s for the whole test were over"
    assert said in reasons(report, "failed").values()
    assert reasons(report, "skipped")["throughput"] == said


def test_a_death_on_the_way():
    with serving({"die_after_requests": 6}) as url:
        report = smoke(url)
    cut, *_, gone = by_status(report, "failed")  # whoever dies may still take a connection
    assert reasons(report, "failed")[cut].startswith(f"{url} closed the connection")
    assert reasons(report, "failed")[gone].startswith(f"cannot reach {url}")
    said = f"the endpoint could not be reached any more since `{gone}`"
    assert reasons(report, "skipped")["together"] == said


def test_a_key_is_needed_and_never_told():
    with serving(None, VLLM_API_KEY="sk-secret") as url:
        refused = smoke(url, api_key="sk-other-secret")
        nameless = smoke(url)
        report = smoke(url, api_key="sk-secret", only=["authenticated", "chat-multi-turn"])
    said = "{}: /v1/models answers 401"
    assert reasons(refused, "failed") == {"authenticated": said.format("the key is refused")}
    assert reasons(nameless, "failed") == {"authenticated": said.format("the server wants a key")}
    assert set(reasons(nameless, "skipped").values()) == {"`authenticated` failed"}
    assert "secret" not in repr((refused, nameless, report))
    assert report.ok
    assert len(by_status(report, "passed")["authenticated"].figures["refused"]) == 6


def test_a_key_that_is_not_asked_for():
    with serving() as url:
        report = smoke(url, api_key="sk-secret", only=["authenticated"])
    assert reasons(report, "failed") == {
        "authenticated": "/v1/models answers 200 without a key, not 401"
    }


# The command.


def test_the_command_prints_the_envelope(capsys):
    with serving() as url:
        assert main(["smoke-test", "--url", f"{url}/v1/", "--json", "--only", "chat"]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert set(answer) == {"schema", "command", "ok", "data", "problems"}
    assert (answer["command"], answer["ok"], answer["problems"]) == ("smoke-test", True, [])
    assert set(answer["data"]) == {
        *("url", "model", "started_at", "duration_s", "engine_version", "checks")
    }
    assert (answer["data"]["url"], answer["data"]["model"]) == (url, "demo")
    assert [check["id"] for check in answer["data"]["checks"]] == list(with_needs(["chat"]))
    for check in answer["data"]["checks"]:
        assert set(check) == {
            *("id", "promise", "status", "reason", "figures", "hint", "duration_s")
        }
    assert err == ""


def test_the_command_says_no_with_exit_1_and_writes_its_reports(capsys, tmp_path):
    junit, page = tmp_path / "out.xml", tmp_path / "out.html"
    reports = ["--junit", str(junit), "--html", str(page)]
    with serving({"status": 500}) as url:
        assert main(["smoke-test", "--url", url, *reports]) == 1
        text, _ = capsys.readouterr()
        assert main(["smoke-test", "--url", url, "--json"]) == 1
    assert "FAIL  authenticated" in text or "FAIL  models" in text
    assert "the endpoint breaks its promises: 1 passed, 1 failed, 25 skipped" in text
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["code"] == "smoke.models"
    assert "answered 500" in problem["message"]
    suite = next(iter(junitparser.JUnitXml.fromfile(str(junit))))
    assert (suite.tests, suite.failures, suite.skipped) == (27, 1, 25)
    assert "answered 500" in page.read_text()


def test_a_limit_is_judged_whatever_else_is_chosen(capsys):
    with serving() as url:
        assert main(["smoke-test", "--url", url, "--only", "models", "--max-ttft", "1e-6"]) == 1
    assert "FAIL  first-token" in capsys.readouterr().out


def test_a_key_that_the_server_quotes_is_in_no_report(capsys, monkeypatch, tmp_path):
    junit, page = tmp_path / "out.xml", tmp_path / "out.html"
    monkeypatch.setenv("GEMMA_SERVE_API_KEY", "sk-quoted-by-the-server")
    command = ["smoke-test", "--only", "chat", "--junit", str(junit), "--html", str(page)]
    with serving({"answer": "sk-quoted-by-the-server "}) as url:
        main([*command, "--url", url])
        main([*command, "--url", url, "--json"])
    out, err = capsys.readouterr()
    written = out + err + junit.read_text() + page.read_text()
    assert "sk-quoted" not in written
    assert "***" in written


def test_the_command_reads_its_environment(capsys, monkeypatch, tmp_path):
    key_file = tmp_path / "key"
    key_file.write_text("sk-secret\n")
    with serving(None, VLLM_API_KEY="sk-secret") as url:
        monkeypatch.setenv("GEMMA_SERVE_URL", url)
        monkeypatch.setenv("GEMMA_SERVE_API_KEY_FILE", str(key_file))
        assert main(["smoke-test", "--model", "other"]) == 1
    assert "'other' is not served here, but demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--only", "chat,chat-streams"], "--only chat-streams: there is no such check"),
        (["--skip", "eight"], "--skip eight: there is no such check"),
        (["--require", ","], "--require names no check"),
        (["--junit", "/nowhere/out.xml"], "--junit /nowhere/out.xml can't be written"),
        (["--junit", "one", "--html", "one"], "--junit and --html both name one"),
        (["--skip", "models"], "--skip models: what is to be tried needs it"),
        (["--only", "chat-stream", "--skip", "chat"], "--skip chat: what is to be tried needs it"),
        (["--only", "chat", "--skip", "chat"], "--skip chat: it is to be tried"),
        (["--only", "throughput"], "throughput has no limit to test"),
        (["--skip", "first-token", "--max-ttft", "1"], "--skip first-token: it is to be tried"),
        (["--html", "/dev/null"], "--html /dev/null can't be written"),
        (["--concurrency", "0"], "Input should be greater than or equal to 1"),
        (["--url", "ftp://x"], "ftp://x"),
    ],
)
def test_bad_usage_is_refused_with_exit_2(args, said, capsys, monkeypatch):
    monkeypatch.setenv("GEMMA_SERVE_URL", "http://127.0.0.1:9")
    assert main(["smoke-test", *args]) == 2
    assert said in capsys.readouterr().err


# The example clients.


@pytest.mark.parametrize(
    ("script", "lines"),
    [
        (
            "client_completions.py",
            [
                "plain:    The capital of France is Paris, a city on the river Seine.",
                "streamed: The capital of France is Paris, a city on the river Seine.",
            ],
        ),
        (
            "client_chat.py",
            [
                "user:  Tell me a fun fact about space.",
                f"model: {ANSWERS.chat('fun-fact').answer}",
                "user:  Tell me another one.",
                f"model: {ANSWERS.chat('second-fun-fact').answer}",
            ],
        ),
        (
            "client_openai.py",
            [
                "completion:     Paris, a city on the river Seine.",
                "chat:          The capital of France is Paris.",
                "streamed chat: Paris",
            ],
        ),
    ],
)
def test_example_clients(script, lines):
    with serving({"max_model_len": 1024}, VLLM_API_KEY="sk-secret") as url:
        good = run_script(script, url, "sk-secret")
        refused = run_script(script, url, "sk-wrong")
    gone = run_script(script, url, "sk-secret")
    assert (good.returncode, good.stdout.splitlines(), good.stderr) == (0, lines, "")
    assert (refused.returncode, refused.stderr) == (1, f"{url} answered 401\n")
    assert gone.returncode == 1
    assert gone.stderr.startswith(f"cannot reach {url}: ")
    assert gone.stderr.count("\n") == 1


def run_script(script, url, key):
    return subprocess.run(
        [sys.executable, SCRIPTS / script, "--url", url],
        env={**os.environ, "GEMMA_SERVE_API_KEY": key},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
