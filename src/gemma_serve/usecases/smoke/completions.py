"""Completions: plain, streamed, counted, and ended where they should end."""

from __future__ import annotations

from typing import Any

from gemma_serve.adapters.openai_api import Answer, EndpointError, Sampling, StreamedAnswer
from gemma_serve.planning.smoke.limits import (
    judge_beginning,
    judge_count_at_limit,
    judge_length,
    judge_plausible,
    judge_same_counts,
    judge_stop,
    judge_usage,
    stop_string,
)
from gemma_serve.planning.smoke.questions import (
    BEYOND_ASCII,
    FEW_TOKENS,
    Question,
    answer_tokens,
    together_tokens,
)
from gemma_serve.planning.smoke.streams import judge_same, judge_spread, judge_stream, writing_s
from gemma_serve.planning.smoke.verdicts import (
    LOGS,
    PROXY,
    Fault,
    common_length,
    parting,
    where_they_part,
)
from gemma_serve.usecases.smoke.session import Outcome, Session, answer_figures, pace

_MOST_SPREADS = 8
_FAULTY_SPREADS = 4
_LONG_TOKENS = 32
# What no answer holds, in front of the sequence that one does.
_NEVER_WRITTEN = "\u2063"
_NOT_TAKEN = (400, 422)


async def completion(session: Session) -> Outcome:
    """Continue a prompt."""
    question = session.questions.completion
    reply = await session.ask(question)
    return Outcome.of(session.judge(reply), answer_figures(question, reply))


async def completion_stream(session: Session) -> Outcome:
    """Continue the same prompt as a stream."""
    asked = session.questions
    return await stream_like_plain(session, asked.completion, longer=asked.count)


async def stream_like_plain(session: Session, question: Question, *, longer: Question) -> Outcome:
    """Ask plain and streamed, and for a stream that has a `longer` answer."""
    plain, streamed = await both(session, question)
    fault = judge_stream(streamed) or session.judge(streamed)
    if fault is None:
        fault = await session.unless_a_tie(judge_same(plain, streamed), question)
    if fault is None:
        session.tokens_per_second = pace(streamed)
        fault = await _judge_spread(session, streamed, question, longer)
    return Outcome.of(fault, answer_figures(question, streamed))


async def usage(session: Session) -> Outcome:
    """Compare what was counted: plain, streamed, and by the server's own tokenizer."""
    figures: dict[str, Any] = {}
    for question in _asked_both_ways(session):
        fault, figures = await _judge_counts(session, question)
        if fault is not None:
            return Outcome.of(fault, figures)
    return Outcome("passed", figures)


async def _judge_counts(
    session: Session, question: Question
) -> tuple[Fault | None, dict[str, Any]]:
    plain, streamed = await both(session, question)
    tokenized = None
    if not question.messages:
        tokenized = await session.endpoint.count_tokens(session.model, question.prompt)
    few = min(FEW_TOKENS, answer_tokens(question, session.max_model_len))
    short = await session.ask_with(question, Sampling(few, ignore_eos=True))
    fault = (
        judge_usage(plain, "plain")
        or judge_usage(streamed, "streamed")
        or judge_plausible(plain, question.prompt, tokenized)
        or judge_count_at_limit(short, few)
    )
    if fault is None and plain.text == streamed.text:
        fault = judge_same_counts(plain, streamed)
    return fault, {
        "prompt_tokens": plain.prompt_tokens,
        "tokens": plain.completion_tokens,
        "total_tokens": plain.total_tokens,
        "prompt_tokens_tokenized": tokenized,
    }


def _asked_both_ways(session: Session) -> tuple[Question, ...]:
    """The completion and the chat, as far as plain and streamed answers to them are there."""
    asked = {
        "completion-stream": session.questions.completion,
        "chat-stream": session.questions.chat,
    }
    return tuple(question for id, question in asked.items() if id in session.passed)


async def max_tokens(session: Session) -> Outcome:
    """Ask for a few tokens, plain and streamed, and look how a whole answer ended."""
    return await ends_at_its_limit(session, session.questions.completion)


async def ends_at_its_limit(session: Session, question: Question) -> Outcome:
    """The answer to `question` with few tokens is the beginning of the whole one."""
    limit = answer_tokens(question, session.max_model_len)
    few = min(FEW_TOKENS, limit)
    whole = await plain_answer(session, question)
    sampling = Sampling(few, ignore_eos=True)
    short = await session.ask_with(question, sampling)
    streamed = await session.stream_with(question, sampling)
    fault = judge_length(whole, limit, ends_by_itself=True)
    for reply in (short, streamed):
        fault = fault or judge_length(reply, few, ends_by_itself=False)
        if fault is None:
            fault = await session.unless_a_tie(judge_beginning(whole, reply), question)
    return Outcome.of(fault, {**answer_figures(question, short), "max_tokens": few})


async def stop_sequence(session: Session) -> Outcome:
    """Ask for the whole answer, and with a word from its middle as the stop sequence."""
    return await stops_at_its_sequence(session, session.questions.completion)


async def stops_at_its_sequence(session: Session, question: Question) -> Outcome:
    """With a stop sequence, the answer to `question` ends before it, plain and streamed."""
    whole = await plain_answer(session, question)
    stop = stop_string(whole.text)
    if stop is None:
        return Outcome(
            "skipped", answer_figures(question, whole), "the answer is too short to be cut"
        )
    # The second of two: both must be heeded.
    stops = (_NEVER_WRITTEN, stop)
    sampling = Sampling(answer_tokens(question, session.max_model_len), stop=stops)
    plain = await session.ask_with(question, sampling)
    streamed = await session.stream_with(question, sampling)
    fault = None
    for stopped in (plain, streamed):
        differs = judge_stop(whole.text, stop, stopped)
        fault = fault or await session.unless_a_tie(differs, question)
    return Outcome.of(fault, {**answer_figures(question, plain), "stop": stop})


async def greedy(session: Session) -> Outcome:
    """Ask the same thing again, for a part of the answer."""
    question = session.questions.completion
    first = await plain_answer(session, question)
    limit = min(_LONG_TOKENS, answer_tokens(question, session.max_model_len))
    second = await session.ask_with(question, Sampling(limit))
    fault = None
    shared = min(len(first.text), len(second.text.rstrip("\N{REPLACEMENT CHARACTER}")))
    if first.text[:shared] != second.text[:shared] or bool(first.text) != bool(second.text):
        found, before = where_they_part(second.text, first.text)
        said = f"asked again it reads {found!r} where it had {before!r}"
        fault = Fault(said, LOGS, parting(second.text, first.text))
        fault = await session.unless_a_tie(fault, question)
    return Outcome.of(fault, answer_figures(question, second))


async def utf_8(session: Session) -> Outcome:
    """Make the model write characters of two, three and four bytes."""
    outcome = Outcome.skipped("the server ignores structured outputs")
    for question in _asked_both_ways(session):
        outcome = await _write_beyond_ascii(session, question)
        if outcome.status != "passed":
            break
    return outcome


async def _write_beyond_ascii(session: Session, question: Question) -> Outcome:
    natural = await plain_answer(session, question)
    limit = answer_tokens(Question(question.prompt), session.max_model_len)
    sampling = Sampling(limit, choice=(BEYOND_ASCII,))
    try:
        plain = await session.ask_with(question, sampling)
    except EndpointError as error:
        if error.status not in _NOT_TAKEN:
            raise
        return Outcome.skipped("the server takes no structured outputs")
    if common_length(plain.text, natural.text) == min(len(plain.text), len(natural.text)):
        return Outcome.skipped("the server ignores structured outputs")
    streamed = await session.stream_with(question, sampling)
    fault = _judge_written(plain, "plain") or _judge_written(streamed, "streamed")
    return Outcome.of(fault, answer_figures(question, streamed))


async def plain_answer(session: Session, question: Question) -> Answer:
    """The whole answer to `question`, from an earlier check where there is one."""
    for asked, reply in session.answered:
        if asked.is_as(question) and isinstance(reply, Answer):
            return reply
    return await session.ask(question)


async def both(session: Session, question: Question) -> tuple[Answer, StreamedAnswer]:
    """The plain and the streamed answer to `question`, from an earlier check where there is one."""
    plain = await plain_answer(session, question)
    for asked, reply in session.answered:
        if asked.is_as(question) and isinstance(reply, StreamedAnswer):
            return plain, reply
    return plain, await session.stream(question)


async def _judge_spread(
    session: Session, streamed: StreamedAnswer, question: Question, longer: Question
) -> Fault | None:
    """Whether tokens come as they are written, by `streamed` if that is long enough.

    Where processor time is short, a server may send and a client read many at once: one such
    stream tells nothing, but what holds streams back does so each time.
    """
    faults: list[Fault] = []
    for attempt in range(_MOST_SPREADS):
        few = min(FEW_TOKENS, together_tokens(session.max_model_len))
        short = await session.stream_on(question, few)
        long = streamed
        if attempt or (streamed.completion_tokens or 0) < _LONG_TOKENS:
            tokens = together_tokens(session.max_model_len, attempt=2 * min(attempt, 1))
            long = await session.stream_on(longer, tokens)
        if fault := judge_stream(long):
            return fault
        if fault := judge_spread(short, long):
            faults.append(fault)
        elif writing_s(short, long) is not None:
            return None
        if len(faults) == _FAULTY_SPREADS:
            return fault
    return None


def _judge_written(reply: Answer | StreamedAnswer, what: str) -> Fault | None:
    if reply.text.strip() == BEYOND_ASCII:
        return None
    found, wanted = where_they_part(reply.text.strip(), BEYOND_ASCII)
    return Fault(f"{what}, {found!r} came where {wanted!r} was written", PROXY)
