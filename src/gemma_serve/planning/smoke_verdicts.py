"""What makes an answer right or wrong: each verdict is None, or the fault that was found.

Speed is never a fault. What counts is the text, the counts, and what came while what else ran.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from gemma_serve.planning.smoke import Question

REPEATED_CHARS = 4
# Tokens of the first answer after the second began: one or two may merely be read late.
SHARED_TOKENS = 3
# Streams in progress on average: one by one gives 1, eight together nearly 8.
TOGETHER = 1.5

_SPECIAL_TOKEN = re.compile(
    r"<\|?(?:pad|eos|bos|unk|mask|s|turn|unused\d+|(?:start|end)_of_(?:turn|image|audio)"
    r"|image_soft_token|audio_soft_token|image|audio|video|channel)\|?>|\[multimodal\]|</s>"
)
_LOGS = "the engine's log may say why; `gemma-serve up` tells where it is"
_SERIAL = "one request is taken at a time: is `--max-num-seqs` 1, or a proxy in between?"
_GARBAGE = (
    "the weights or their type are wrong: Gemma 2 and later break in float16, "
    "serve them with `--dtype bfloat16`"
)


@dataclass(frozen=True)
class Fault:
    """Why a promise counts as broken, and what to do about it."""

    reason: str
    hint: str = ""


class Reply(Protocol):
    """What the verdicts look at in an answer."""

    @property
    def text(self) -> str: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def prompt_tokens(self) -> int | None: ...
    @property
    def completion_tokens(self) -> int | None: ...
    @property
    def model(self) -> str: ...


class StreamedReply(Reply, Protocol):
    """An answer in events. Times are seconds since `started_at`, on a clock that all share."""

    @property
    def started_at(self) -> float: ...
    @property
    def token_times_s(self) -> tuple[float, ...]: ...
    @property
    def events(self) -> int: ...
    @property
    def done(self) -> bool: ...


def judge_models(served: Sequence[str], wanted: str | None) -> Fault | None:
    """Some model is listed, and the wanted one if one is."""
    if not served:
        return Fault("the endpoint lists no model", _LOGS)
    if wanted is not None and wanted not in served:
        names = ", ".join(served)
        return Fault(f"{wanted!r} is not served here, but {names}", f"use `--model {served[0]}`")
    return None


def judge_answer(
    reply: Reply, question: Question, served: Collection[str], *, open_ended: bool = False
) -> Fault | None:
    """The answer is language, right where that is known, and its tokens were counted.

    An `open_ended` answer goes on after its end (`ignore_eos`), so it must only begin right.
    """
    return (
        _judge_language(reply)
        or _judge_known(reply, question.known, open_ended=open_ended)
        or _judge_usage(reply)
        or _judge_model(reply, served)
    )


def judge_stream(plain: Reply, streamed: StreamedReply) -> Fault | None:
    """Streamed and plain are one answer, and the stream was one."""
    if streamed.text != plain.text:
        found, wanted = _where_they_part(streamed.text, plain.text)
        return Fault(f"streamed it reads {found!r} where the plain answer has {wanted!r}", _LOGS)
    for what in ("prompt_tokens", "completion_tokens"):
        counted, wanted_count = getattr(streamed, what), getattr(plain, what)
        if counted != wanted_count:
            return Fault(f"{what} is {counted} streamed, but {wanted_count} in the plain answer")
    return judge_pieces(streamed)


def judge_pieces(streamed: StreamedReply) -> Fault | None:
    """The answer came in several events and ended with [DONE]."""
    if streamed.events < 2 and (streamed.completion_tokens or 0) >= 4:
        return Fault(
            f"{streamed.completion_tokens} tokens came in {streamed.events} event, not one by one",
            "something gathers the answer up: a buffering proxy, or a large `--stream-interval`",
        )
    if not streamed.done:
        return Fault("the stream did not end with [DONE]", "clients wait for it, or report a loss")
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
        return Fault(f"{what} the stop sequence {stop!r}", _LOGS)
    if stopped.text != wanted:
        found, expected = _where_they_part(stopped.text, wanted)
        return Fault(f"before the stop sequence it reads {found!r}, not {expected!r}", _LOGS)
    if stopped.finish_reason != "stop":
        return Fault(f"finish_reason is {stopped.finish_reason!r}, not 'stop'", _LOGS)
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
        return Fault("the answer is the same without the earlier turns", _LOGS)
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


def judge_staggered(first: StreamedReply, second: StreamedReply) -> Fault | None:
    """The second answer began while the first was still being written."""
    begun = second.started_at + (second.token_times_s or (0.0,))[0]
    later = sum(first.started_at + time_s > begun for time_s in first.token_times_s)
    if later >= SHARED_TOKENS:
        return None
    return Fault(
        f"the second request waited for the first: {later} of the first one's "
        f"{len(first.token_times_s)} tokens came after the second began",
        _SERIAL,
    )


def judge_own_answers(alone: Sequence[Reply], together: Sequence[Reply]) -> Fault | None:
    """Asked at once, every question got its own answer.

    Batched arithmetic rounds differently, so it may differ from the answer given alone.
    """
    # Past its end an answer is free text, which the least rounding turns elsewhere.
    texts = [_first_line(reply.text) for reply in alone]
    for index, reply in enumerate(together):
        if (owner := _owner(_first_line(reply.text), texts, index)) != index:
            return Fault(f"request {index + 1} got the answer of request {owner + 1}", _LOGS)
    pairs = zip(together, texts, strict=True)
    same = sum(_first_line(reply.text)[:8] == text[:8] for reply, text in pairs)
    if same < len(together) / 2:
        return Fault(f"only {same} of {len(together)} answers begin as they do alone", _LOGS)
    return None


def judge_together(together: Sequence[StreamedReply]) -> Fault | None:
    """The answers were written side by side."""
    if mean_in_progress(together) >= TOGETHER:
        return None
    peak = peak_in_progress(together)
    return Fault(f"the answers came one after another, at most {peak} at a time", _SERIAL)


def peak_in_progress(replies: Sequence[StreamedReply]) -> int:
    """The greatest number of answers that were being written at one moment."""
    spans = _spans(replies)
    return max((sum(begin <= at <= end for begin, end in spans) for at, _ in spans), default=0)


def mean_in_progress(replies: Sequence[StreamedReply]) -> float:
    """How many answers were being written at a time, on average over the time any was."""
    spans = sorted(_spans(replies))
    busy, reached = 0.0, float("-inf")
    for begin, end in spans:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return sum(end - begin for begin, end in spans) / busy if busy else 0.0


def overlap_s(first: StreamedReply, second: StreamedReply) -> float:
    """For how many seconds both answers were being written."""
    spans = _spans((first, second))
    if len(spans) < 2:
        return 0.0
    return max(0.0, min(end for _, end in spans) - max(begin for begin, _ in spans))


def _spans(replies: Sequence[StreamedReply]) -> list[tuple[float, float]]:
    """From the first text of each answer to its last, on the clock that all share."""
    return [
        (reply.started_at + reply.token_times_s[0], reply.started_at + reply.token_times_s[-1])
        for reply in replies
        if reply.token_times_s
    ]


def _judge_language(reply: Reply) -> Fault | None:
    if not reply.text.strip():
        return Fault(f"the answer is empty, of {reply.completion_tokens} tokens", _GARBAGE)
    visible = "".join(_SPECIAL_TOKEN.sub("", reply.text).split())
    if not visible:
        return Fault(f"the answer holds only special tokens: {_head(reply.text)!r}", _GARBAGE)
    if len(visible) >= REPEATED_CHARS and len(set(visible)) == 1:
        return Fault(f"the answer is one character over and over: {_head(reply.text)!r}", _GARBAGE)
    return None


def _judge_known(reply: Reply, known: str | None, *, open_ended: bool) -> Fault | None:
    if known is None or reply.text == known:
        return None
    cut_short = reply.finish_reason == "length" and known.startswith(reply.text)
    if cut_short or (open_ended and reply.text.startswith(known)):
        return None
    found, wanted = _where_they_part(reply.text, known)
    return Fault(f"the answer reads {found!r} where {wanted!r} is right", _LOGS)


def _judge_usage(reply: Reply) -> Fault | None:
    for what in ("prompt_tokens", "completion_tokens"):
        count = getattr(reply, what)
        if count is None or count <= 0:
            return Fault(f"the server counted {what} as {count}", "billing and limits need them")
    return None


def _judge_model(reply: Reply, served: Collection[str]) -> Fault | None:
    if reply.model and reply.model not in served:
        return Fault(f"{reply.model!r} answered, which the endpoint does not list", _LOGS)
    return None


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _owner(text: str, answers: Sequence[str], index: int) -> int:
    """Whose answer `text` is: the same one's, or that with most of the words that only it has.

    Where no other has more, it is that of `index`, who asked.
    """
    if text in answers:
        return index if text == answers[index] else answers.index(text)
    words = [set(re.findall(r"\w+", answer)) for answer in answers]
    found = set(re.findall(r"\w+", text))
    scores = []
    for position, own in enumerate(words):
        others = set().union(*words[:position], *words[position + 1 :])
        scores.append(len((own - others) & found))
    best = max(range(len(answers)), key=lambda position: scores[position])
    return best if scores[best] > scores[index] else index


def _where_they_part(found: str, wanted: str) -> tuple[str, str]:
    """Both texts from a little before their first difference."""
    pairs = zip(found, wanted, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(wanted)))
    start = max(0, same - 12)
    return _head(found[start:]), _head(wanted[start:])


def _head(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"
