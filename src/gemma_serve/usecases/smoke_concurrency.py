"""The checks that ask several things at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from time import perf_counter

from gemma_serve.adapters.openai_api import StreamedAnswer
from gemma_serve.planning.smoke import (
    STAGGER_ATTEMPTS,
    STAGGER_S,
    Question,
    staggered_tokens,
    together_tokens,
)
from gemma_serve.planning.smoke_verdicts import (
    Fault,
    judge_own_answers,
    judge_staggered,
    judge_together,
    mean_in_progress,
    overlap_s,
    peak_in_progress,
)
from gemma_serve.usecases.smoke_session import Outcome, Session, joint_figures, rounded


async def two_staggered(session: Session) -> Outcome:
    """Send a second request while the first is being answered."""
    asked = _questions(session)[:2]
    pace, limit = session.tokens_per_second, session.max_model_len
    for attempt in range(STAGGER_ATTEMPTS):
        outcome = await _staggered(session, asked, staggered_tokens(pace, limit, attempt=attempt))
        if not outcome.look_again:
            break
    return outcome


async def eight_together(session: Session) -> Outcome:
    """Ask eight questions one after another, then all of them at once."""
    asked = _questions(session)
    tokens = together_tokens(session.max_model_len)
    started_at = perf_counter()
    alone = [await session.stream_on(question, tokens) for question in asked]
    alone_s = perf_counter() - started_at
    if fault := _first_fault(session, asked, alone):
        return Outcome.of(fault, joint_figures(asked, alone, alone_s))
    outcome = await _together(session, asked, alone, alone_s)
    return await _together(session, asked, alone, alone_s) if outcome.look_again else outcome


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


async def _together(
    session: Session, asked: Sequence[Question], alone: Sequence[StreamedAnswer], alone_s: float
) -> Outcome:
    tokens = together_tokens(session.max_model_len)
    started_at = perf_counter()
    replies = await _all([session.stream_on(question, tokens) for question in asked])
    together_s = perf_counter() - started_at
    wrong = _first_fault(session, asked, replies) or judge_own_answers(alone, replies)
    waited = None if wrong else judge_together(replies)
    figures = {
        "speedup": rounded(alone_s / together_s, 2),
        "one_after_another_s": rounded(alone_s),
        "together_s": rounded(together_s),
        "in_progress_at_once": peak_in_progress(replies),
        "in_progress_mean": rounded(mean_in_progress(replies), 2),
        "ttft_s": rounded(max((reply.ttft_s or 0.0 for reply in replies), default=None)),
        **joint_figures(asked, replies, together_s),
    }
    return Outcome.of(wrong or waited, figures, look_again=waited is not None)


def _questions(session: Session) -> tuple[Question, ...]:
    """The eight, as chats where the model can chat."""
    eight = session.questions.eight
    return eight if session.can_chat else tuple(one.as_completion() for one in eight)


def _first_fault(
    session: Session, asked: Sequence[Question], replies: Sequence[StreamedAnswer]
) -> Fault | None:
    """What is wrong with the first wrong answer."""
    for question, reply in zip(asked, replies, strict=True):
        if fault := session.judge(reply, question, open_ended=True):
            return Fault(f"to {question.prompt!r}: {fault.reason}", fault.hint)
    return None


async def _either(
    task: asyncio.Task[StreamedAnswer], event: asyncio.Event, timeout_s: float
) -> None:
    """Wait until `task` ends, `event` is set or the time is over."""
    waiter = asyncio.create_task(event.wait())
    await asyncio.wait((task, waiter), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()


async def _all(requests: Sequence[Awaitable[StreamedAnswer]]) -> list[StreamedAnswer]:
    """Wait for every request, also when one fails, then raise the first error."""
    done = await asyncio.gather(*requests, return_exceptions=True)
    answers = []
    for outcome in done:
        if isinstance(outcome, BaseException):
            raise outcome
        answers.append(outcome)
    return answers
