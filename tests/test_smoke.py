"""The smoke test: its verdicts, and that it passes what is right and fails what is not."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fake_engine import serving
from gemma_serve.adapters.package_data import data_path
from gemma_serve.cli.app import main
from gemma_serve.errors import GemmaServeError
from gemma_serve.planning.smoke import (
    PROMISES,
    Question,
    answer_tokens,
    parse_answers,
    questions,
    staggered_tokens,
    together_tokens,
    with_needs,
)
from gemma_serve.planning.smoke_verdicts import (
    judge_answer,
    judge_history,
    judge_models,
    judge_own_answers,
    judge_staggered,
    judge_stop,
    judge_stream,
    judge_together,
    mean_in_progress,
    overlap_s,
    peak_in_progress,
    stop_string,
)
from gemma_serve.usecases.smoke import run_smoke

ANSWERS = parse_answers(data_path("answers.json").read_text(encoding="utf-8"))
SCRIPTS = Path(__file__).parent.parent / "scripts"
ONE_ANSWER = {"prompt", "answer", "prompt_tokens", "tokens", "tokens_per_second"}
STREAMED = ONE_ANSWER | {"ttft_s", "events"}
SEVERAL = {"ttft_s", "tokens", "tokens_per_second", "answers"}
FIGURES = {
    "models": {"models", "max_model_len"},
    "completion": ONE_ANSWER,
    "completion-stream": STREAMED,
    "stop-sequence": ONE_ANSWER | {"stop"},
    "chat": ONE_ANSWER,
    "chat-multi-turn": STREAMED | {"prompt_tokens_alone"},
    "chat-system": ONE_ANSWER | {"system", "prompt_tokens_alone"},
    "two-staggered": SEVERAL | {"stagger_s", "first_ttft_s", "overlap_s"},
    "eight-together": SEVERAL
    | {"speedup", "one_after_another_s", "together_s", "in_progress_at_once", "in_progress_mean"},
}


@dataclass
class Reply:
    text: str = "Paris."
    finish_reason: str | None = "stop"
    prompt_tokens: int | None = 5
    completion_tokens: int | None = 3
    model: str = "demo"
    started_at: float = 0.0
    token_times_s: tuple[float, ...] = (0.1, 0.2, 0.3)
    events: int = 3
    done: bool = True


def smoke(url, only=tuple(PROMISES), **options):
    seen = []
    options = {"timeout_s": 20.0, **options}
    report = run_smoke(url=url, on_event=seen.append, only=only, **options)
    assert tuple(seen) == report.checks
    assert tuple(check.id for check in report.checks) == with_needs(only)
    assert all(bool(check.reason) == (check.status != "passed") for check in report.checks)
    return report


def by_status(report, status):
    return {check.id: check for check in report.checks if check.status == status}


# What a right endpoint looks like.


def test_a_good_endpoint_keeps_every_promise():
    with serving() as url:
        report = smoke(url)
    assert report.ok
    assert (report.url, report.model) == (url, "demo")
    assert not by_status(report, "failed")
    assert not by_status(report, "skipped")
    assert {check.id: set(check.figures) for check in report.checks} == FIGURES
    figures = {check.id: check.figures for check in report.checks}
    assert figures["chat"]["answer"] == "The capital of France is Paris."
    assert figures["eight-together"]["answers"][1]["answer"] == "The capital of Italy is Rome."
    assert figures["eight-together"]["tokens"] == 8 * 64
    assert all(check.duration_s > 0 for check in report.checks)


@pytest.mark.parametrize(
    "way",
    [
        {"crlf": True, "comments": True, "split_bytes": 7},
        {"slow_first_token_s": 0.05, "token_delay_s": 0.004},
        {"max_model_len": 110},
    ],
)
def test_harmless_ways_pass(way):
    with serving(way) as url:
        assert smoke(url).ok


def test_another_model_needs_no_known_answers():
    with serving(None, "--served-model-name", "other") as url:
        report = smoke(url)
        assert report.ok
        assert report.model == "other"
        wrong = smoke(url, answers=ANSWERS, only=["completion", "chat"])
    assert set(by_status(wrong, "failed")) == {"completion", "chat"}


def test_a_base_model_is_not_asked_to_chat():
    with serving({"no_chat_template": True}, "--served-model-name", "gemma-2b") as url:
        report = smoke(url)
    assert report.ok
    skipped = by_status(report, "skipped")
    assert set(skipped) == {"chat", "chat-multi-turn", "chat-system"}
    assert {check.reason for check in skipped.values()} == {"a base model: it has no chat template"}


# What is wrong is found by the check that owns the promise.


@pytest.mark.parametrize(
    ("faults", "id", "reason"),
    [
        ({"answer": "<pad>"}, "completion", "holds only special tokens"),
        ({"answer": ""}, "completion", "the answer is empty"),
        ({"answer": "!"}, "completion", "one character over and over"),
        ({"answer": " London"}, "completion", "is right"),
        ({"no_usage": True}, "completion", "counted prompt_tokens as None"),
        ({"wrong_usage": True}, "completion-stream", "completion_tokens is 10 streamed, but 7"),
        ({"one_chunk": True}, "completion-stream", "7 tokens came in 1 event"),
        ({"no_done": True}, "completion-stream", "did not end with [DONE]"),
        ({"drop_event": True}, "completion-stream", "streamed it reads"),
        ({"double_event": True}, "completion-stream", "streamed it reads"),
        ({"cut_stream": True}, "completion-stream", "before its answer was whole"),
        ({"half_json": True}, "completion-stream", "a JSON object was wanted"),
        ({"error_in_stream": True}, "completion-stream", "EngineCore died"),
        ({"ignore_stop": True}, "stop-sequence", "goes on past the stop sequence"),
        ({"echo_stop": True}, "stop-sequence", "repeats the stop sequence"),
        ({"drop_history": True}, "chat-multi-turn", "where 'Sunlight is"),
        ({"refuse_system": True}, "chat-system", "400: System role not supported"),
        ({"drop_system": True}, "chat-system", "where 'Paris' is right"),
        ({"serial": True, "max_model_len": 64}, "two-staggered", "the second request waited"),
        ({"serial": True, "max_model_len": 64}, "eight-together", "one after another"),
        ({"crossed": True}, "eight-together", "is right"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_broken_promise_is_found_by_its_check(faults, id, reason):
    with serving(faults) as url:
        report = smoke(url, only=[id])
    assert not report.ok
    failed = by_status(report, "failed")
    assert id in failed
    assert reason in failed[id].reason


@pytest.mark.parametrize(
    ("faults", "id", "reason"),
    [
        ({"answer": "<pad>"}, "completion", "holds only special tokens"),
        ({"drop_history": True}, "chat-multi-turn", "prompt tokens with the earlier turns"),
        ({"drop_system": True}, "chat-system", "prompt tokens with the system message"),
        ({"crossed": True}, "eight-together", "got the answer of request"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_it_is_found_with_unknown_answers_too(faults, id, reason):
    with serving(faults, "--served-model-name", "other") as url:
        failed = by_status(smoke(url, only=[id]), "failed")
    assert id in failed
    assert reason in failed[id].reason


def test_the_wrong_model_is_found_and_nothing_more_is_asked():
    with serving({"wrong_model": "gemma-2b"}) as url:
        report = smoke(url, model="demo")
    assert by_status(report, "failed")["models"].reason == "'demo' is not served here, but gemma-2b"
    skipped = by_status(report, "skipped")
    assert len(skipped) == len(PROMISES) - 1
    assert {check.reason for check in skipped.values()} == {"`models` failed"}


def test_nobody_there():
    report = smoke("http://127.0.0.1:9")
    assert "cannot reach http://127.0.0.1:9" in by_status(report, "failed")["models"].reason
    assert len(by_status(report, "skipped")) == len(PROMISES) - 1
    assert not report.ok


def test_a_dead_engine_behind_a_healthy_front():
    with serving({"health_only": True}) as url:
        report = smoke(url)
    assert "EngineDeadError" in by_status(report, "failed")["models"].reason


def test_a_hang_ends_with_the_time_limit():
    with serving({"hang": "completion"}) as url:
        report = smoke(url, timeout_s=0.5)
    assert "within 0.5 s" in by_status(report, "failed")["completion"].reason
    skipped = by_status(report, "skipped")
    assert skipped["stop-sequence"].reason == "`completion` failed"
    assert "eight-together" not in skipped  # chats go on


def test_a_death_on_the_way():
    with serving({"die_after_requests": 3}) as url:
        report = smoke(url)
    assert "stop-sequence" in by_status(report, "failed")
    assert "could not be reached any more" in by_status(report, "skipped")["eight-together"].reason


def test_a_key_is_needed_and_never_told():
    with serving(None, VLLM_API_KEY="sk-secret") as url:
        refused = smoke(url, api_key="sk-other-secret")
        assert "401" in by_status(refused, "failed")["models"].reason
        assert "secret" not in repr(refused)
        assert smoke(url, api_key="sk-secret", only=["chat-multi-turn"]).ok


# The command.


def test_the_command_prints_the_envelope(capsys):
    with serving() as url:
        assert main(["smoke-test", "--url", f"{url}/v1/", "--json"]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert set(answer) == {"schema", "command", "ok", "data", "problems"}
    assert (answer["command"], answer["ok"], answer["problems"]) == ("smoke-test", True, [])
    assert set(answer["data"]) == {"url", "model", "checks"}
    assert (answer["data"]["url"], answer["data"]["model"]) == (url, "demo")
    for check in answer["data"]["checks"]:
        assert set(check) == {
            *("id", "promise", "status", "reason", "figures", "hint", "duration_s")
        }
    assert err == ""


def test_the_command_says_no_with_exit_1(capsys):
    with serving({"status": 500}) as url:
        assert main(["smoke-test", "--url", url]) == 1
        text, _ = capsys.readouterr()
        assert main(["smoke-test", "--url", url, "--json"]) == 1
    assert "FAIL  models" in text
    assert text.rstrip().endswith("the endpoint breaks its promises: 1 failed, 8 skipped")
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["code"] == "smoke.models"
    assert "answered 500" in problem["message"]


def test_the_command_reads_its_environment(capsys, monkeypatch, tmp_path):
    key_file = tmp_path / "key"
    key_file.write_text("sk-secret\n")
    with serving(None, VLLM_API_KEY="sk-secret") as url:
        monkeypatch.setenv("GEMMA_SERVE_URL", url)
        monkeypatch.setenv("GEMMA_SERVE_API_KEY_FILE", str(key_file))
        assert main(["smoke-test", "--model", "other"]) == 1
    assert "'other' is not served here, but demo" in capsys.readouterr().out


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


# The verdicts, one by one.


def test_a_check_brings_those_that_it_needs():
    assert with_needs(PROMISES) == tuple(PROMISES)
    assert with_needs(["chat-system"]) == ("models", "chat", "chat-system")
    assert with_needs(["eight-together"]) == ("models", "completion", "chat", "eight-together")
    assert with_needs([]) == ()


def test_the_questions_carry_answers_only_where_they_are_known():
    known, unknown = questions(ANSWERS, known=True), questions(ANSWERS, known=False)
    assert known.chat.known == "The capital of France is Paris."
    assert unknown.chat == Question(known.chat.prompt, known.chat.messages)
    assert known.second_turn.last_turn_alone().prompt == "Tell me another one."
    assert known.chat.as_completion() == Question("What is the capital of France?")
    assert len({one.prompt for one in known.eight}) == 8


@pytest.mark.parametrize("text", ["", "[]", '{"completions": []}', '{"chats": 1}'])
def test_answers_that_are_none(text):
    with pytest.raises(GemmaServeError, match="known answers"):
        parse_answers(text)


def test_answers_that_lack_one():
    with pytest.raises(GemmaServeError, match="lack 'capital-of-france'"):
        questions(parse_answers('{"completions": [], "chats": []}'), known=True)


def test_the_tokens_asked_for_leave_room_for_the_question():
    plain, known = Question("x"), Question("x", known="y")
    assert [answer_tokens(plain, None), answer_tokens(known, None)] == [64, 256]
    assert [answer_tokens(known, 100), together_tokens(100), together_tokens(None)] == [50, 50, 64]
    paces = (None, 10.0, 100.0, 5000.0)
    assert [staggered_tokens(pace, None, attempt=0) for pace in paces] == [64, 64, 300, 512]
    assert [staggered_tokens(25.0, None, attempt=attempt) for attempt in range(3)] == [75, 300, 512]
    assert staggered_tokens(5000.0, 256, attempt=1) == 128


@pytest.mark.parametrize(
    ("served", "wanted", "reason"),
    [
        (["a", "b"], "b", None),
        (["a"], None, None),
        ([], None, "lists no model"),
        (["a", "b"], "c", "'c' is not served here, but a, b"),
    ],
)
def test_models(served, wanted, reason):
    fault = judge_models(served, wanted)
    assert (fault and fault.reason) == reason or reason in fault.reason


@pytest.mark.parametrize(
    ("reply", "known", "open_ended", "reason"),
    [
        (Reply(), None, False, None),
        (Reply("2"), None, False, None),
        (Reply("..."), None, False, None),
        (Reply(" Paris<end_of_turn>"), None, False, None),
        (Reply("<b>Paris</b>"), None, False, None),
        (Reply("  \n"), None, False, "empty"),
        (Reply("<pad><pad>\n<eos>"), None, False, "special tokens"),
        (Reply("<unused7><|turn>"), None, False, "special tokens"),
        (Reply("! ! ! !"), None, False, "one character"),
        (Reply("....."), None, False, "one character"),
        (Reply(), "Paris.", False, None),
        (Reply("Paris. And"), "Paris.", False, "is right"),
        (Reply("Paris. And", "length"), "Paris.", True, None),
        (Reply("Par", "length"), "Paris.", False, None),
        (Reply("Par", "stop"), "Paris.", False, "'Par' where 'Paris.' is right"),
        (Reply("Paris!"), "Paris.", True, "is right"),
        (Reply(prompt_tokens=None), None, False, "prompt_tokens as None"),
        (Reply(completion_tokens=0), None, False, "completion_tokens as 0"),
        (Reply(model="other"), None, False, "'other' answered"),
        (Reply(model=""), None, False, None),
    ],
)
def test_an_answer(reply, known, open_ended, reason):
    question = Question("x", known=known)
    fault = judge_answer(reply, question, ["demo", "b"], open_ended=open_ended)
    assert (fault is None) == (reason is None)
    assert fault is None or reason in fault.reason


@pytest.mark.parametrize(
    ("streamed", "reason"),
    [
        (Reply(), None),
        (Reply(events=1), None),
        (Reply(text="Pari"), "'Pari' where the plain answer has 'Paris.'"),
        (Reply(prompt_tokens=6), "prompt_tokens is 6 streamed, but 5"),
        (Reply(done=False), "[DONE]"),
    ],
)
def test_a_stream(streamed, reason):
    fault = judge_stream(Reply(), streamed)
    assert (fault is None) == (reason is None)
    assert fault is None or reason in fault.reason


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("one two three four five", "four"),
        (" one one one two", "two"),
        ("Paris", "i"),
        ("a b", "b"),
        ("aaaa", None),
        ("x", None),
        ("", None),
    ],
)
def test_the_stop_sequence_is_a_word_from_the_middle(text, stop):
    assert stop_string(text) == stop


@pytest.mark.parametrize(
    ("stopped", "reason"),
    [
        (Reply("one two "), None),
        (Reply("one two three"), "repeats the stop sequence 'three'"),
        (Reply("one two three four"), "goes on past"),
        (Reply("one "), "before the stop sequence it reads 'one '"),
        (Reply("one two ", "length"), "finish_reason is 'length'"),
    ],
)
def test_a_stop(stopped, reason):
    fault = judge_stop("one two three four", "three", stopped)
    assert (fault is None) == (reason is None)
    assert fault is None or reason in fault.reason


def test_history():
    assert judge_history(Reply(prompt_tokens=9), Reply("Hm?")) is None
    assert "never reached" in judge_history(Reply(), Reply("Hm?")).reason
    assert "the same" in judge_history(Reply(prompt_tokens=9), Reply()).reason


def spread(started_at, first_s, last_s, events=10, text="Paris."):
    step = (last_s - first_s) / (events - 1)
    times = tuple(first_s + step * index for index in range(events))
    return Reply(text, started_at=started_at, token_times_s=times)


def test_overlap_in_time():
    first, second = spread(100.0, 1.0, 3.0), spread(101.0, 1.0, 3.0)
    assert overlap_s(first, second) == pytest.approx(1.0)
    assert peak_in_progress([first, second]) == 2
    assert mean_in_progress([first, second]) == pytest.approx(4 / 3)
    assert mean_in_progress([first, spread(110.0, 1.0, 3.0)]) == pytest.approx(1.0)
    assert (mean_in_progress([]), peak_in_progress([])) == (0.0, 0)
    assert overlap_s(first, Reply(token_times_s=())) == 0.0


def test_staggered():
    assert judge_staggered(spread(0.0, 0.1, 1.0), spread(0.5, 0.1, 1.0)) is None
    waited = judge_staggered(spread(0.0, 0.1, 1.0), spread(0.5, 0.5, 1.0))
    assert "0 of the first one's 10 tokens came after" in waited.reason
    # One token of the first is read late: still one after the other.
    assert judge_staggered(spread(0.0, 0.1, 1.0), spread(0.5, 0.45, 1.0)) is not None


def test_together():
    texts = ["Paris in France", "Rome in Italy", "Madrid in Spain"]
    alone = [Reply(text) for text in texts]
    side_by_side = [spread(0.0, 0.1, 1.0, text=text) for text in texts]
    serial = [spread(0.0, 1.0 * i, 1.0 * i + 0.9, text=text) for i, text in enumerate(texts)]
    assert judge_together(side_by_side) is None
    assert "at most 1 at a time" in judge_together(serial).reason
    assert judge_own_answers(alone, side_by_side) is None
    swapped = [side_by_side[i] for i in (1, 0, 2)]
    assert judge_own_answers(alone, swapped).reason == "request 1 got the answer of request 2"


def test_batched_arithmetic_may_turn_an_answer_but_not_most_of_them():
    alone = [Reply(text) for text in ("The city is Paris.", "The city is Rome.", "It is Oslo.")]
    turned = [Reply("The city is lovely Paris."), Reply("Well, Rome."), Reply("It is Oslo.")]
    assert judge_own_answers(alone, turned) is None
    garbled = [Reply("xx"), Reply("yy"), Reply("It is Oslo.")]
    assert "only 1 of 3" in judge_own_answers(alone, garbled).reason
