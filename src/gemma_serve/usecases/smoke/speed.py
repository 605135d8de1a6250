"""The limits that the user gave: nothing is too slow without one."""

from __future__ import annotations

from statistics import median

from gemma_serve.planning.smoke.questions import together_tokens
from gemma_serve.planning.smoke.verdicts import Fault
from gemma_serve.usecases.smoke.session import Outcome, Session, pace, rounded

_ASKED = 3
_TOKENS = 8
_SLOW = "another client may load the engine, or the limit asks for more than this machine has"


async def first_token(session: Session) -> Outcome:
    """Begin a few streams, one after another; the middle one counts."""
    limit_s = session.options.max_ttft_s
    if limit_s is None:
        return Outcome.skipped("no --max-ttft was given")
    replies = [await session.stream_on(question, _TOKENS) for question in session.many(_ASKED)]
    ttft_s = median(reply.ttft_s or reply.duration_s for reply in replies)
    fault = None
    if ttft_s > limit_s:
        fault = Fault(f"the first token came after {ttft_s:.3f} s, not within {limit_s:g} s", _SLOW)
    return Outcome.of(fault, {"ttft_s": rounded(ttft_s), "max_ttft_s": limit_s})


async def throughput(session: Session) -> Outcome:
    """Take the pace of the requests at once, or of one where no more are sent."""
    least = session.options.min_tokens_per_second
    if least is None:
        return Outcome.skipped("no --min-tokens-per-second was given")
    found = session.together_tokens_per_second
    if found is None:
        (question,) = session.many(1)
        found = pace(await session.stream_on(question, together_tokens(session.max_model_len)))
    fault = None
    if (found or 0.0) < least:
        fault = Fault(f"{found or 0.0:.0f} tokens came in a second, not {least:g}", _SLOW)
    figures = {"tokens_per_second": rounded(found, 1), "min_tokens_per_second": least}
    return Outcome.of(fault, figures)
