"""What makes an answer of an endpoint right or wrong: each verdict by itself."""

from dataclasses import dataclass, replace

import pytest

from gemma_serve.adapters.package_data import data_path
from gemma_serve.errors import GemmaServeError
from gemma_serve.planning.smoke.concurrency import (
    EngineLoad,
    Token,
    judge_beginnings,
    judge_own_answers,
    judge_staggered,
    judge_together,
    mean_in_progress,
    overlap_s,
    parted,
    parts_at_a_tie,
    peak_in_progress,
)
from gemma_serve.planning.smoke.language import judge_language
from gemma_serve.planning.smoke.limits import (
    judge_beginning,
    judge_count_at_limit,
    judge_history,
    judge_length,
    judge_plausible,
    judge_same_counts,
    judge_stop,
    judge_usage,
    stop_string,
)
from gemma_serve.planning.smoke.promises import PROMISES, with_needs
from gemma_serve.planning.smoke.questions import (
    Question,
    answer_tokens,
    long_prompt,
    many_questions,
    of_instruction_tuned_gemma,
    parse_answers,
    questions,
    staggered_tokens,
    together_tokens,
    too_long_prompt,
)
from gemma_serve.planning.smoke.streams import judge_same, judge_spread, judge_stream
from gemma_serve.planning.smoke.verdicts import (
    judge_finish,
    judge_known,
    judge_model,
    judge_models,
)
from gemma_serve.usecases.smoke.checks import CHECKS

ANSWERS = parse_answers(data_path("answers.json").read_text(encoding="utf-8"))


@dataclass
class Reply:
    text: str = "Paris."
    finish_reason: str | None = "stop"
    prompt_tokens: int | None = 5
    completion_tokens: int | None = 3
    total_tokens: int | None = 8
    model: str = "demo"
    started_at: float = 0.0
    duration_s: float = 0.3
    token_times_s: tuple[float, ...] = (0.1, 0.2, 0.3)
    events: int = 3
    done: bool = True
    out_of_order: str = ""
    content_type: str = "text/event-stream; charset=utf-8"


def test_every_promise_has_its_check_and_needs_only_earlier_ones():
    assert list(CHECKS) == list(PROMISES)
    seen = set()
    for id, promise in PROMISES.items():
        assert {*promise.needs, *promise.needs_one_of} <= seen
        seen.add(id)


def test_a_check_brings_those_that_it_needs():
    assert with_needs(PROMISES) == tuple(PROMISES)
    assert with_needs(["chat-system"]) == ("reachable", "models", "chat", "chat-system")
    streams = ("completion", "completion-stream", "chat", "chat-stream")
    assert with_needs(["together"]) == ("reachable", "models", *streams, "together")
    assert with_needs([]) == ()


def test_the_questions_carry_answers_only_where_they_are_known():
    known, unknown = questions(ANSWERS, known=True), questions(ANSWERS, known=False)
    assert known.chat.known == "The capital of France is Paris."
    assert unknown.chat == Question(known.chat.prompt, known.chat.messages)
    assert known.second_turn.last_turn_alone().prompt == "Tell me another one."
    assert known.chat.as_completion() == Question("What is the capital of France?")
    assert len({one.prompt for one in many_questions(known, 24)}) == 24
    assert len(many_questions(known, 256)) == 256
    assert of_instruction_tuned_gemma(unknown).chat == replace(unknown.chat, holds="Paris")


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
    assert [together_tokens(None, attempt=attempt) for attempt in range(3)] == [64, 128, 256]
    assert len(long_prompt(128, None).split()) == 2 + 3 * 128 + 1
    assert len(long_prompt(128, 64).split()) == 2 + 32
    assert len(too_long_prompt(100).split()) > 100
    paces = (None, 10.0, 100.0, 5000.0)
    assert [staggered_tokens(pace, None, attempt=0) for pace in paces] == [64, 64, 120, 512]
    assert [staggered_tokens(25.0, None, attempt=attempt) for attempt in range(3)] == [64, 256, 512]
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
    ("text", "reason"),
    [
        ("Paris.", None),
        ("2", None),
        ("...", None),
        ("<b>Paris</b>, <s>Lyon</s>", None),
        ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12", None),
        ("very very very very good", None),
        ("zzz", None),
        ("half of the last character \ufffd", None),
        ("  \n", "the answer is empty, of 3 tokens"),
        ("<pad><pad>\n<eos>", "holds only special tokens"),
        ("<unused7><|turn>", "holds only special tokens"),
        (" Paris<end_of_turn>", "the special token <end_of_turn> stands in"),
        ("<|channel>thought Paris", "the special token <|channel> stands in"),
        ("! ! ! !", "one character"),
        (".....", "one character"),
        ("the the the the the the the the the", "repeats 'the' over and over"),
        ("It is so. " * 12, "repeats 'It is so.' over and over"),
        ("abab" * 16, "repeats 'ab' over and over"),
        ("caf\ufffd\ufffd in Paris", "characters are lost"),
    ],
)
def test_language(text, reason):
    fault = judge_language(Reply(text), is_chat=False)
    assert (fault is None) == (reason is None)
    assert fault is None or reason in fault.reason


def test_a_phrase_over_and_over_is_a_loop_only_where_the_model_was_taught_to_chat():
    looped = Reply("of the sea and " * 12)
    assert judge_language(looped, is_chat=False) is None
    said = "the answer repeats 'of the sea and' over and over"
    assert judge_language(looped, is_chat=True).reason == said


@pytest.mark.parametrize(
    ("reply", "known", "open_ended", "reason"),
    [
        (Reply(), None, False, None),
        (Reply(), "Paris.", False, None),
        (Reply("Paris. And"), "Paris.", False, "is right"),
        (Reply("Paris. And", "length"), "Paris.", True, None),
        (Reply("Par", "length"), "Paris.", False, None),
        (Reply("", "length"), "Paris.", False, "is right"),
        (Reply("Par", "stop"), "Paris.", False, "'Par' where 'Paris.' is right"),
        (Reply("Paris!"), "Paris.", True, "is right"),
    ],
)
def test_a_known_answer(reply, known, open_ended, reason):
    fault = judge_known(reply, Question("x", known=known), open_ended=open_ended)
    assert (fault is None) == (reason is None)
    assert fault is None or reason in fault.reason


def test_an_answer_that_must_hold_a_word():
    question = Question("Where?", holds="Paris")
    assert judge_known(Reply("It is **PARIS**."), question) is None
    assert judge_known(Reply("Rome."), question).reason == (
        "to 'Where?' it says 'Rome.', without 'Paris'"
    )


def test_the_model_that_answers_is_the_one_that_was_asked():
    assert judge_model(Reply(), ["demo"]) is None
    assert judge_model(Reply(model="b"), ["demo", "b"]) is None
    asked = "where 'demo' was asked"
    assert judge_model(Reply(model="other"), ["demo"]).reason == f"'other' answered, {asked}"
    assert judge_model(Reply(model=""), ["demo"]).reason == f"the answer names no model, {asked}"


def test_every_answer_says_why_it_ended():
    assert [judge_finish(Reply(finish_reason=one)) for one in ("stop", "length")] == [None, None]
    said = "finish_reason is None, not 'stop' or 'length'"
    assert judge_finish(Reply(finish_reason=None)).reason == said


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(), None),
        (Reply(prompt_tokens=None), "plain, the server counted prompt_tokens as None"),
        (Reply(completion_tokens=0), "plain, the server counted completion_tokens as 0"),
        (Reply(total_tokens=9), "plain, 5 prompt and 3 completion tokens are counted as 9 in all"),
    ],
)
def test_usage(reply, reason):
    fault = judge_usage(reply, "plain")
    assert (fault and fault.reason) == reason


def test_counts_that_cannot_be():
    assert judge_same_counts(Reply(), Reply()) is None
    other = judge_same_counts(Reply(), Reply(completion_tokens=4))
    assert other.reason == "completion_tokens is 4 streamed, but 3 in the plain answer"
    assert judge_plausible(Reply(), "Hello", 5) is None
    assert "tokenizer counts 4" in judge_plausible(Reply(), "Hello", 4).reason
    assert judge_count_at_limit(Reply(completion_tokens=5, finish_reason="length"), 5) is None
    assert judge_count_at_limit(Reply(completion_tokens=4), 5) is None
    assert judge_count_at_limit(Reply(completion_tokens=8, finish_reason="length"), 5).reason == (
        "completion_tokens is 8 for an answer that ended at 5"
    )
    assert judge_plausible(Reply(prompt_tokens=69), "Hello", None) is None
    assert judge_plausible(Reply(prompt_tokens=70), "Hello", None).reason == (
        "prompt_tokens is 70 for 'Hello'"
    )


@pytest.mark.parametrize(
    ("reply", "ends_by_itself", "reason"),
    [
        (Reply(completion_tokens=5, finish_reason="length"), True, None),
        (Reply(completion_tokens=5, finish_reason="stop"), True, None),
        (Reply(completion_tokens=5, finish_reason="stop"), False, "'stop' at max_tokens"),
        (Reply(completion_tokens=4, finish_reason="stop"), True, None),
        (Reply(completion_tokens=4, finish_reason="length"), True, "after 4 of 5 tokens"),
        (Reply(completion_tokens=6, finish_reason="length"), True, "has 6 tokens, where"),
        (Reply(completion_tokens=None), True, "did not count"),
    ],
)
def test_a_length(reply, ends_by_itself, reason):
    fault = judge_length(reply, 5, ends_by_itself=ends_by_itself)
    assert (fault is None) == (reason is None)
    assert fault is None or reason in fault.reason


@pytest.mark.parametrize(
    ("short", "reason"),
    [
        (Reply("one two ", completion_tokens=2), None),
        (Reply("one two \ufffd", completion_tokens=3), None),
        (Reply("one three", completion_tokens=2), "cut short it reads 'one three'"),
        (Reply("one two three four", completion_tokens=2), "2 tokens bring the text of the whole"),
    ],
)
def test_a_beginning(short, reason):
    whole = Reply("one two three four", completion_tokens=8)
    fault = judge_beginning(whole, short)
    assert (fault is None) == (reason is None)
    assert fault is None or reason in fault.reason


@pytest.mark.parametrize(
    ("streamed", "reason"),
    [
        (Reply(), None),
        (Reply(events=1), None),
        (Reply(events=1, completion_tokens=4), "4 tokens came in 1 event"),
        (Reply(done=False), "[DONE]"),
        (Reply(out_of_order="text came after finish_reason 'stop'"), "text came after"),
        (Reply(content_type="application/json"), "calls itself 'application/json'"),
    ],
)
def test_a_stream(streamed, reason):
    fault = judge_stream(streamed)
    assert (fault is None) == (reason is None)
    assert fault is None or reason in fault.reason


def test_streamed_and_plain_are_one_answer():
    assert judge_same(Reply(), Reply()) is None
    lost = judge_same(Reply(), Reply("Pari"))
    assert lost.reason == "streamed it reads 'Pari' where the plain answer has 'Paris.'"
    ended = judge_same(Reply(), Reply(finish_reason="length"))
    assert ended.reason == "finish_reason is 'length' streamed, but 'stop' in the plain answer"


@pytest.mark.parametrize(
    ("first_s", "last_s", "duration_s", "reason"),
    [
        (0.1, 1.0, 1.0, None),
        (2.1, 3.0, 3.0, None),  # a slow first token, here and there
        (0.99, 1.0, 1.0, "64 tokens came within 0.010 s"),
        (0.1, 0.1, 0.2, None),  # no longer than the short one: nothing to judge
    ],
)
def test_events_come_while_the_answer_is_written(first_s, last_s, duration_s, reason):
    slow_s = 2.0 if duration_s == 3.0 else 0.0
    short = Reply(completion_tokens=4, duration_s=0.2 + slow_s)
    long = Reply(completion_tokens=64, duration_s=duration_s, token_times_s=(first_s, last_s))
    fault = judge_spread(short, long)
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


def test_an_answer_that_parts_at_the_stop_sequence_may_do_so_at_a_tie():
    parted = judge_stop("one two three four", "three", Reply("one two eight nine", "length"))
    assert parted.texts == ("one two eight nine", "one two three four")
    assert judge_stop("one two three four", "three", Reply("one ")).texts is None
    assert judge_stop("one two three four", "three", Reply("one two three four")).texts is None


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
    assert judge_together(side_by_side, None) is None
    assert "at most 1 at a time" in judge_together(serial, None).reason
    assert judge_own_answers(alone, side_by_side) is None
    swapped = [side_by_side[i] for i in (1, 0, 2)]
    assert judge_own_answers(alone, swapped).reason == "request 1 got the answer of request 2"


def test_all_are_together_unless_the_engine_is_full():
    two_at_a_time = [spread(0.0, 1.0 * (i // 2), 1.0 * (i // 2) + 0.9) for i in range(4)]
    held_back = judge_together(two_at_a_time, EngineLoad(running=2, waiting=0, readings=9))
    assert held_back.reason == "at most 2 of 4 answers were written at a time"
    assert "--concurrency 2" in held_back.hint
    assert judge_together(two_at_a_time, EngineLoad(running=16, waiting=2, readings=9)) is None
    faked = judge_together([spread(0.0, 0.1, 1.0)] * 4, EngineLoad(1, 3, readings=9))
    assert faked.reason == "the engine itself ran at most 1 request at a time"
    assert judge_together([spread(0.0, 0.1, 1.0)] * 4, EngineLoad(1, 0, readings=2)) is None


def test_none_stands_still_while_the_others_are_answered():
    moving = [spread(0.0, 0.1, 1.0) for _ in range(3)]
    late = Reply(token_times_s=(0.1, 0.11, *(1.2 + 0.1 * i for i in range(8))))
    assert judge_together([*moving, late], None).reason == (
        "request 4 stood still while the others were answered"
    )
    # All at once for a short time only: tokens that were read late look alike.
    assert judge_together([*moving, spread(0.0, 0.95, 1.9)], None) is None


def test_an_answer_may_part_from_its_own_only_at_a_tie():
    alone = [Reply(text) for text in ("The city is Paris.", "The city is Rome.", "It is Oslo.")]
    turned = [Reply("The city is lovely Paris."), Reply("The city is Rome"), Reply("It is Oslo.")]
    assert judge_own_answers(alone, turned) is None
    assert parted(alone, turned) == (0,)
    assert parted([Reply("one two thr")], [Reply("one two three\nfour")]) == ()
    close = [Token("The", 9.0), Token(" city", 3.0), Token(" is", 5.0), Token(" Paris", 0.2)]
    sure = [*close[:3], Token(" Paris", 4.0)]
    assert parts_at_a_tie("The city is lovely Paris.", close)
    assert not parts_at_a_tie("The city is lovely Paris.", sure)
    assert not parts_at_a_tie("Rome", close)
    assert parts_at_a_tie("The city", sure)
    assert judge_beginnings(alone, turned) is None
    garbled = [Reply("xx"), Reply("yy"), Reply("It is Oslo.")]
    assert "only 1 of 3" in judge_beginnings(alone, garbled).reason
