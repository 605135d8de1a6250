"""What only the engine's own counts show: freed places and the prefix cache."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter

from gemma_serve.adapters.metrics import EngineMetrics
from gemma_serve.adapters.openai_api import Sampling
from gemma_serve.planning.smoke.questions import Question, long_prompt
from gemma_serve.planning.smoke.verdicts import LOGS, PROXY, Fault
from gemma_serve.usecases.smoke.session import Outcome, Session, rounded

_NO_METRICS = "the server shows no /metrics of vLLM's"
_ATTEMPTS = 3
_READINGS = 3
_READ_TOKENS = 32
_LONG_ANSWER = 2048
_LEAST_PATIENCE_S = 0.5
_PATIENCE_S = 5.0
_END_S = 15.0
_MOST_ENGINES = 16
_TICK_S = 0.05


async def cancelled_stream(session: Session) -> Outcome:
    """Begin a long stream, leave it, and see how soon the engine has one request less."""
    for _ in range(_ATTEMPTS):
        outcome = await _leave_a_stream(session)
        if not outcome.look_again:
            break
    await session.lives_on()
    return outcome


async def _leave_a_stream(session: Session) -> Outcome:
    (question,) = session.many(1)
    asked = {"messages": list(question.messages)} if question.messages else {}
    tokens = min(_LONG_ANSWER, (session.max_model_len or _LONG_ANSWER) * 3 // 4)
    loads: list[int] = []

    async def look() -> None:
        loads.extend([load for _ in range(_READINGS) if (load := await _load(session)) is not None])

    read, seconds = await session.endpoint.leave_stream(
        session.model,
        asked or {"prompt": question.prompt},
        Sampling(tokens, ignore_eos=True),
        after_tokens=min(_READ_TOKENS, tokens // 4),
        meanwhile=look,
    )
    left_at = perf_counter()
    if not loads:
        return Outcome.skipped(_NO_METRICS)
    goes_on_s = (tokens - read) * seconds / max(read, 1)
    # Unread, and when others have ended, it may go on faster than it began.
    patience_s = min(max(goes_on_s / 10, _LEAST_PATIENCE_S), _PATIENCE_S)
    if max(loads) > 1:  # the requests of others come and go: their number tells less, and later
        patience_s = _PATIENCE_S
    freed = await _until(session, lambda now: _requests(now) < max(loads), patience_s)
    freed_s = perf_counter() - left_at
    figures = {"tokens_read": read, "freed_s": rounded(freed_s, 2)}
    if freed:
        return Outcome("passed", figures)
    fault = Fault(f"{freed_s:.1f} s after its client had left, it was still written on", PROXY)
    # Another look only when it has ended: its end must not be taken for that of the next one.
    ended = await _until(session, lambda now: _requests(now) < max(loads), _END_S)
    return Outcome.of(fault, figures, look_again=ended)


async def _load(session: Session) -> int | None:
    now = await session.metrics()
    return None if now is None else _requests(now)


def _requests(now: EngineMetrics) -> int:
    """All that the engine has taken: others may wait for the place that is freed."""
    return now.requests_running + now.requests_waiting


async def prefix_cache(session: Session) -> Outcome:
    """Send a prompt of several blocks again, until it is found."""
    first = await session.metrics()
    if first is None or first.cache is None:
        return Outcome.skipped(_NO_METRICS)
    if not first.cache.prefix_caching:
        return Outcome.skipped("prefix caching is off")
    question = Question(long_prompt(first.cache.block_size, session.max_model_len))
    reply = await session.ask_with(question, Sampling(1))
    if (reply.prompt_tokens or 0) <= first.cache.block_size:
        return Outcome.skipped("the longest sequence holds no prompt of a whole block")
    before = await session.metrics() or first
    hits = 0
    # Of several engines (data parallel) each has a cache of its own, and they take turns.
    for _ in range(_MOST_ENGINES):
        await session.ask_with(question, Sampling(1))
        found = await _until(
            session, lambda now: now.prefix_cache_hits > before.prefix_cache_hits, _TICK_S
        )
        if found:
            after = await session.metrics() or before
            hits = round(after.prefix_cache_hits - before.prefix_cache_hits)
            break
    fault = None
    if not hits:
        fault = Fault(
            f"none of its {reply.prompt_tokens} prompt tokens were found when it came again", LOGS
        )
    return Outcome.of(fault, {"prompt_tokens": reply.prompt_tokens, "hit_tokens": hits})


async def _until(
    session: Session, reached: Callable[[EngineMetrics], bool], patience_s: float
) -> bool:
    """Whether the engine's counts get there in time: they follow the answers."""
    until = perf_counter() + patience_s
    while True:
        now = await session.metrics()
        if now is not None and reached(now):
            return True
        if perf_counter() > until:
            return False
        await asyncio.sleep(_TICK_S)
