"""Whether a stream was one: in order, in several events, over the time that the writing took."""

from __future__ import annotations

from gemma_serve.planning.smoke.verdicts import (
    LOGS,
    PROXY,
    Fault,
    Reply,
    StreamedReply,
    parting,
    where_they_part,
)

_EVENT_STREAM = "text/event-stream"
_GATHERED = "something gathers the answer up: a buffering proxy, or a large `--stream-interval`"
_FEW_TOKENS = 4
# The middle half of the events comes over half of the writing. Over less than this part of it, they
# were kept back: a client that is short of processor time reads some of them late, but not most.
_LEAST_SPREAD = 0.125


def judge_stream(streamed: StreamedReply) -> Fault | None:
    """The answer came in several events, in their order, and ended with [DONE]."""
    if streamed.out_of_order:
        return Fault(streamed.out_of_order, PROXY)
    if not streamed.done:
        return Fault("the stream did not end with [DONE]", "clients wait for it, or report a loss")
    if streamed.events < 2 and (streamed.completion_tokens or 0) >= _FEW_TOKENS:
        return Fault(
            f"{streamed.completion_tokens} tokens came in {streamed.events} event, not one by one",
            _GATHERED,
        )
    if _EVENT_STREAM not in streamed.content_type.lower():
        return Fault(
            f"the stream calls itself {streamed.content_type!r}, not {_EVENT_STREAM}", PROXY
        )
    return None


def judge_same(plain: Reply, streamed: Reply) -> Fault | None:
    """Streamed and plain are one answer."""
    if streamed.text != plain.text:
        found, wanted = where_they_part(streamed.text, plain.text)
        said = f"streamed it reads {found!r} where the plain answer has {wanted!r}"
        return Fault(said, LOGS, parting(streamed.text, plain.text))
    if streamed.finish_reason != plain.finish_reason:
        reasons = f"{streamed.finish_reason!r} streamed, but {plain.finish_reason!r}"
        return Fault(f"finish_reason is {reasons} in the plain answer", PROXY)
    return None


def judge_spread(short: StreamedReply, long: StreamedReply) -> Fault | None:
    """The events came while the answer was written, not all when it was whole.

    Where `writing_s` can't tell how long the writing took, there is nothing to judge.
    """
    took_s = writing_s(short, long)
    if took_s is not None and _middle_s(long) < _LEAST_SPREAD * took_s:
        return Fault(
            f"half of {_tokens(long)} tokens came within {_middle_s(long):.3f} s of the "
            f"{long.duration_s:.3f} s that the answer took",
            _GATHERED,
        )
    return None


def writing_s(short: StreamedReply, long: StreamedReply) -> float | None:
    """Seconds that the writing of the `long` answer took, without the wait for its beginning.

    That is what it takes longer than a `short` one: a slow first token delays both. None where
    they can't be told apart, as when the short one had to wait.
    """
    tokens = _tokens(long) - _tokens(short)
    seconds = long.duration_s - short.duration_s
    return seconds if tokens >= _FEW_TOKENS and seconds > 0 else None


def _middle_s(streamed: StreamedReply) -> float:
    """Seconds in which the middle half of the events came, without the first and the last ones."""
    times = streamed.token_times_s
    return times[len(times) * 3 // 4] - times[len(times) // 4] if times else 0.0


def _tokens(streamed: StreamedReply) -> int:
    """Its tokens, or where they were not counted, its events."""
    return streamed.completion_tokens or len(streamed.token_times_s)


def spread_s(streamed: StreamedReply) -> float:
    """Seconds from the first token to the last."""
    times = streamed.token_times_s
    return times[-1] - times[0] if times else 0.0
