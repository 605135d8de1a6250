"""Whether an answer's length, its end and its counts are what was asked for."""

from __future__ import annotations

from gemma_serve.planning.smoke.verdicts import LOGS, PROXY, Fault, Reply, parting, where_they_part

_BILLING = "clients bill and limit by these counts"
_MISCOUNT = f"{_BILLING}; {PROXY}"
# A token is at least a byte of the prompt; the rest is room for what a template adds.
_ADDED_TOKENS = 64


def judge_usage(reply: Reply, what: str) -> Fault | None:
    """The tokens were counted, and the counts add up."""
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        count = getattr(reply, name)
        if count is None or count <= 0:
            return Fault(f"{what}, the server counted {name} as {count}", _BILLING)
    prompt, completion = reply.prompt_tokens or 0, reply.completion_tokens or 0
    if prompt + completion != reply.total_tokens:
        return Fault(
            f"{what}, {prompt} prompt and {completion} completion tokens are counted as "
            f"{reply.total_tokens} in all",
            _MISCOUNT,
        )
    return None


def judge_same_counts(plain: Reply, streamed: Reply) -> Fault | None:
    """A streamed answer costs what the same plain one does."""
    for name in ("prompt_tokens", "completion_tokens"):
        counted, wanted = getattr(streamed, name), getattr(plain, name)
        if counted != wanted:
            return Fault(
                f"{name} is {counted} streamed, but {wanted} in the plain answer", _MISCOUNT
            )
    return None


def judge_plausible(reply: Reply, prompt: str, tokenized: int | None) -> Fault | None:
    """The counts can be those of these texts; `tokenized` is what the tokenizer itself counts."""
    counted = reply.prompt_tokens or 0
    if tokenized is not None and counted != tokenized:
        return Fault(
            f"prompt_tokens is {counted}, but the server's own tokenizer counts {tokenized}",
            _MISCOUNT,
        )
    most = len(prompt.encode()) + _ADDED_TOKENS
    if counted > most:
        return Fault(f"prompt_tokens is {counted} for {prompt!r}", _MISCOUNT)
    return None


def judge_count_at_limit(reply: Reply, limit: int) -> Fault | None:
    """An answer that ended at its limit is counted as having that many tokens."""
    if reply.finish_reason != "length" or reply.completion_tokens == limit:
        return None
    return Fault(
        f"completion_tokens is {reply.completion_tokens} for an answer that ended at {limit}",
        _MISCOUNT,
    )


def judge_length(reply: Reply, limit: int, *, ends_by_itself: bool) -> Fault | None:
    """The answer has at most `limit` tokens and says rightly why it ended.

    One that does not end by itself (`ignore_eos`) can only have met its limit.
    """
    tokens, reason = reply.completion_tokens, reply.finish_reason
    if tokens is None:
        return Fault("the server did not count the answer's tokens", _BILLING)
    if tokens > limit:
        return Fault(f"the answer has {tokens} tokens, where max_tokens is {limit}", PROXY)
    if tokens < limit and reason != "stop":
        said = f"finish_reason is {reason!r} after {tokens} of {limit} tokens"
        return Fault(f"{said}, not 'stop'", PROXY)
    met = ("length", "stop") if ends_by_itself else ("length",)
    if tokens == limit and reason not in met:
        return Fault(f"finish_reason is {reason!r} at max_tokens, not 'length'", PROXY)
    return None


def judge_beginning(whole: Reply, short: Reply) -> Fault | None:
    """The `short` answer is the beginning of the `whole` one, and not all of it."""
    text = short.text.rstrip("\N{REPLACEMENT CHARACTER}")  # its last character may be cut
    more = (whole.completion_tokens or 0) > 2 * (short.completion_tokens or 0)
    if more and len(text) >= len(whole.text):
        return Fault(f"{short.completion_tokens} tokens bring the text of the whole answer", PROXY)
    shared = min(len(text), len(whole.text))
    if text[:shared] != whole.text[:shared]:
        found, wanted = where_they_part(text, whole.text)
        said = f"cut short it reads {found!r}, but whole {wanted!r}"
        return Fault(said, PROXY, parting(text[:shared], whole.text[:shared]))
    return None


def stop_string(text: str) -> str | None:
    """The word nearest to the middle of `text` whose first occurrence has text before it.

    Without such a word, a single character; None where even that can't be had.
    """
    middle = len(text) / 2
    for parts in (text.split(), "".join(text.split())):
        usable = {part for part in parts if text[: text.find(part)].strip()}
        if usable:
            return min(usable, key=lambda part: (abs(text.find(part) - middle), part))
    return None


def judge_stop(whole: str, stop: str, stopped: Reply) -> Fault | None:
    """With `stop`, the answer is what came before it in the `whole` one, and says why it ended."""
    wanted = whole[: whole.find(stop)]
    if stop in stopped.text:
        went_on = not stopped.text.endswith(stop)
        what = "the answer goes on past" if went_on else "the answer repeats"
        return Fault(f"{what} the stop sequence {stop!r}", PROXY)
    if stopped.text != wanted:
        found, expected = where_they_part(stopped.text, wanted)
        said = f"before the stop sequence it reads {found!r}, not {expected!r}"
        return Fault(said, LOGS, parting(stopped.text, whole))
    if stopped.finish_reason != "stop":
        return Fault(f"finish_reason is {stopped.finish_reason!r}, not 'stop'", LOGS)
    return None


def judge_history(whole: Reply, alone: Reply) -> Fault | None:
    """The earlier turns were read: they cost tokens, and the answer is another without them."""
    if (whole.prompt_tokens or 0) <= (alone.prompt_tokens or 0):
        return Fault(
            f"{whole.prompt_tokens} prompt tokens with the earlier turns, "
            f"{alone.prompt_tokens} without: they never reached the model",
            "the chat template or a proxy drops them",
        )
    if whole.text == alone.text:
        return Fault("the answer is the same without the earlier turns", LOGS)
    return None


def judge_system(whole: Reply, alone: Reply) -> Fault | None:
    """The system message was read: it costs tokens."""
    if (whole.prompt_tokens or 0) <= (alone.prompt_tokens or 0):
        return Fault(
            f"{whole.prompt_tokens} prompt tokens with the system message, {alone.prompt_tokens} "
            "without: it never reached the model",
            "the chat template drops it",
        )
    return None
