"""The checks that ask several things at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from time import perf_counter
from typing import TypeVar

from gemma_serve.adapters.openai_api import Answer, Sampling, StreamedAnswer
from gemma_serve.planning.smoke.concurrency import (
    EngineLoad,
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
from gemma_serve.planning.smoke.questions import (
    STAGGER_S,
    Question,
    staggered_tokens,
    together_tokens,
)
from gemma_serve.planning.smoke.streams import judge_stream
from gemma_serve.planning.smoke.verdicts import LOGS, Fault, judge_known, where_they_part
from gemma_serve.usecases.smoke.session import (
    Outcome,
    Session,
    joint_figures,
    rounded,
    stream_figures,
)

_Reply = TypeVar("_Reply")
_ATTEMPTS = 3
_ONE_ALONE = "--concurrency is 1"
_LOAD_EVERY_S = 0.1
_WHOLE_TOKENS = 16
_MOST_ALONE = 8
_ALONE_PART = 0.25


async def staggered(session: Session) -> Outcome:
    """Send a second request while the first is being answered."""
    if session.options.concurrency < 2:
        return Outcome.skipped(_ONE_ALONE)
    asked = session.many(2)
    pace, limit = session.tokens_per_second, session.max_model_len
    for attempt in range(_ATTEMPTS):
        outcome = await _staggered(session, asked, staggered_tokens(pace, limit, attempt=attempt))
        if not outcome.look_again:
            break
    return outcome


async def together(session: Session) -> Outcome:
    """Ask several questions one after another, then all of them at once."""
    if session.options.concurrency < 2:
        return Outcome.skipped(_ONE_ALONE)
    asked = session.many(session.options.concurrency)
    for attempt in range(_ATTEMPTS):
        tokens = together_tokens(session.max_model_len, attempt=attempt)
        outcome = await _alone_and_together(session, asked, tokens)
        if not outcome.look_again:
            break
    return outcome


async def _staggered(session: Session, asked: Sequence[Question], tokens: int) -> Outcome:
    seen, quarter = 0, asyncio.Event()

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen >= tokens / 4:
            quarter.set()

    started_at = perf_counter()
    running = asyncio.create_task(session.stream_on(asked[0], tokens, count))
    # Where the answer would be over before, a quarter of it is waited for instead.
    await _either(running, quarter, STAGGER_S)
    stagger_s = perf_counter() - started_at
    first, second = await _all([running, session.stream_on(asked[1], tokens)])
    busy_s = perf_counter() - started_at
    if (first.completion_tokens or tokens) < tokens and first.finish_reason == "stop":
        return Outcome.skipped("the server ignores ignore_eos: the first answer is over too soon")
    wrong = _first_fault(session, asked, (first, second))
    waited = None if wrong else judge_staggered(first, second)
    figures = {
        "stagger_s": rounded(stagger_s),
        "ttft_s": rounded(second.ttft_s),
        "first_ttft_s": rounded(first.ttft_s),
        "overlap_s": rounded(overlap_s(first, second)),
        **joint_figures(asked, (first, second), busy_s),
    }
    return Outcome.of(wrong or waited, figures, look_again=waited is not None)


async def _alone_and_together(session: Session, asked: Sequence[Question], tokens: int) -> Outcome:
    few = _asked_alone(asked, session, tokens)
    started_at = perf_counter()
    alone = [await session.stream_on(question, tokens) for question in few]
    alone_s = perf_counter() - started_at
    before = {
        "concurrency": len(asked),
        "one_after_another_s": rounded(alone_s),
        "alone": stream_figures(few, alone),
    }
    if fault := _first_fault(session, few, alone):
        return Outcome.of(fault, before)
    async with _watched_load(session) as loads:
        started_at = perf_counter()
        replies = await _all([session.stream_on(question, tokens) for question in asked])
        together_s = perf_counter() - started_at
    whole = Sampling(min(tokens, _WHOLE_TOKENS), ignore_eos=True)
    plain = await _all([session.ask_with(question, whole) for question in asked])
    await session.lives_on()
    load = _most_of(loads)
    wrong = _first_fault(session, asked, replies) or session.judge(*plain)
    parted = None if wrong else await _judge_parted(session, few, alone, (replies, plain))
    waited = None if wrong or parted else judge_together(replies, load)
    joint = joint_figures(asked, replies, together_s)
    session.together_tokens_per_second = joint["tokens_per_second"]
    alone_pace = sum(reply.completion_tokens or 0 for reply in alone) / alone_s
    figures = {
        **before,
        "speedup": rounded((joint["tokens_per_second"] or 0.0) / (alone_pace or 1.0), 2),
        "together_s": rounded(together_s),
        "in_progress_at_once": peak_in_progress(replies),
        "in_progress_mean": rounded(mean_in_progress(replies), 2),
        "engine_running": load.running if load else None,
        "engine_waiting": load.waiting if load else None,
        "ttft_s": rounded(max((reply.ttft_s or 0.0 for reply in replies), default=None)),
        **joint,
    }
    return Outcome.of(wrong or parted or waited, figures, look_again=wrong is None)


def _asked_alone(asked: Sequence[Question], session: Session, tokens: int) -> tuple[Question, ...]:
    """The first questions, all different: as many as even a slow engine has the time for."""
    time_s = _ALONE_PART * session.options.check_timeout_s
    count = round(time_s * (session.tokens_per_second or 0.0) / tokens)
    return tuple(asked[: min(max(count, 2), _MOST_ALONE)])


@asynccontextmanager
async def _watched_load(session: Session) -> AsyncIterator[list[EngineLoad]]:
    """What the engine itself counts while the block runs, reading after reading."""
    loads: list[EngineLoad] = []

    async def watch() -> None:
        while (now := await session.metrics()) is not None:
            loads.append(EngineLoad(now.requests_running, now.requests_waiting))
            await asyncio.sleep(_LOAD_EVERY_S)

    # The first reading imports the parser, which would keep the streams from being read.
    if await session.metrics() is None:
        yield loads
        return
    watching = asyncio.create_task(watch())
    try:
        yield loads
    finally:
        watching.cancel()


def _most_of(loads: Sequence[EngineLoad]) -> EngineLoad | None:
    if not loads:
        return None
    running = max(load.running for load in loads)
    return EngineLoad(running, max(load.waiting for load in loads), len(loads))


async def _judge_parted(
    session: Session,
    asked: Sequence[Question],
    alone: Sequence[StreamedAnswer],
    at_once: Sequence[Sequence[StreamedAnswer | Answer]],
) -> Fault | None:
    """Whether the answers that read otherwise than alone do so only for their arithmetic."""
    for together in at_once:
        together = together[: len(asked)]
        others = parted(alone, together)
        if not others:
            continue
        # With known answers there is no doubt, and nothing to ask for.
        if asked[others[0]].known is not None:
            return _other_answer(asked, alone, together, others[0])
        # As they were asked: past the end too.
        ways = (Sampling(together[i].completion_tokens or 1, ignore_eos=True) for i in others)
        asking = (session.margins(asked[i], way) for i, way in zip(others, ways, strict=True))
        for index, tokens in zip(others, await asyncio.gather(*asking), strict=True):
            if not tokens:
                return judge_own_answers(alone, together) or judge_beginnings(alone, together)
            if not parts_at_a_tie(together[index].text, tokens):
                return _other_answer(asked, alone, together, index)
    return None


def _other_answer(
    asked: Sequence[Question],
    alone: Sequence[StreamedAnswer],
    together: Sequence[StreamedAnswer | Answer],
    index: int,
) -> Fault:
    found, wanted = where_they_part(together[index].text, alone[index].text)
    said = f"to {asked[index].prompt!r}: {found!r} among others, but {wanted!r} alone"
    return judge_own_answers(alone, together) or Fault(said, LOGS)


def _first_fault(
    session: Session, asked: Sequence[Question], replies: Sequence[StreamedAnswer]
) -> Fault | None:
    """What is wrong with the first wrong answer."""
    for question, reply in zip(asked, replies, strict=True):
        fault = (
            judge_stream(reply)
            or session.judge(reply)
            or judge_known(reply, question, open_ended=True)
        )
        if fault is not None:
            return fault
    return None


async def _either(
    task: asyncio.Task[StreamedAnswer], event: asyncio.Event, timeout_s: float
) -> None:
    """Wait until `task` ends, `event` is set or the time is over."""
    waiter = asyncio.create_task(event.wait())
    await asyncio.wait((task, waiter), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()


async def _all(requests: Sequence[Awaitable[_Reply]]) -> list[_Reply]:
    """Wait for every request, also when one fails, then raise the first error."""
    done = await asyncio.gather(*requests, return_exceptions=True)
    answers = []
    for outcome in done:
        if isinstance(outcome, BaseException):
            raise outcome
        answers.append(outcome)
    return answers
