"""Whether requests at the same time were answered at the same time, each with its own answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gemma_serve.planning.smoke.verdicts import LOGS, Fault, Reply, StreamedReply, common_length

# Tokens of an answer while another was written: one or two may merely be read late.
SHARED_TOKENS = 3
# The part of the first answer that must still come then: the second is sent in its first quarter.
# Also the part of the time in which all must be in progress before one of them is looked at.
_SHARED_PART = 0.25
# Streams in progress on average: one by one gives 1, eight together nearly 8.
TOGETHER = 1.5
# How far apart, in nats, two tokens may stand and still change places. Batches of other sizes
# add up in another order; in bfloat16 that moves a logit by a few hundredths.
TIE = 0.5
# Fewer readings of the engine's load may all have come too early or too late.
_READINGS = 4
_SERIAL = "one request is taken at a time: is `--max-num-seqs` 1, or a proxy in between?"


@dataclass(frozen=True)
class EngineLoad:
    """The most requests that the engine itself counted at one moment of a check.

    `running` were being answered, `waiting` had no place yet, by so many `readings`.
    """

    running: int
    waiting: int
    readings: int = 1


@dataclass(frozen=True)
class Token:
    """A token of an answer, and how far it stood above the second best, in nats."""

    text: str
    margin: float


def judge_staggered(first: StreamedReply, second: StreamedReply) -> Fault | None:
    """The second answer began while the first was still being written."""
    begun = second.started_at + (second.token_times_s or (0.0,))[0]
    later = sum(first.started_at + time_s > begun for time_s in first.token_times_s)
    if later >= max(SHARED_TOKENS, _SHARED_PART * len(first.token_times_s)):
        return None
    return Fault(
        f"the second request waited for the first: {later} of the first one's "
        f"{len(first.token_times_s)} tokens came after the second began",
        _SERIAL,
    )


def judge_own_answers(alone: Sequence[Reply], together: Sequence[Reply]) -> Fault | None:
    """No answer is that of another question, by the words that only one has."""
    texts = [first_line(reply.text) for reply in alone]
    for index, reply in enumerate(together):
        if (owner := _owner(first_line(reply.text), texts, index)) != index:
            return Fault(f"request {index + 1} got the answer of request {owner + 1}", LOGS)
    return None


def parted(alone: Sequence[Reply], together: Sequence[Reply]) -> tuple[int, ...]:
    """Which answers read otherwise than alone, as far as both go."""
    return tuple(
        index
        for index, (one, other) in enumerate(zip(alone, together, strict=True))
        # One may be cut earlier: its last character may be half of one.
        if common_length(one.text, other.text) < min(len(one.text), len(other.text)) - 1
    )


def parts_at_a_tie(text: str, tokens: Sequence[Token]) -> bool:
    """Whether `text` leaves the answer of `tokens` only where two tokens were about as likely.

    That is what arithmetic in another order may do to a greedy answer, and nothing else.
    """
    whole = "".join(token.text for token in tokens)
    at = common_length(text, whole)
    if at == len(text) or at == len(whole):
        return True
    end = 0
    for token in tokens:
        end += len(token.text)
        if end > at:
            return token.margin <= TIE
    return False


def judge_beginnings(alone: Sequence[Reply], together: Sequence[Reply]) -> Fault | None:
    """At least half of the answers begin as they do alone: all that texts without margins tell."""
    pairs = zip(together, alone, strict=True)
    same = sum(first_line(a.text)[:8] == first_line(b.text)[:8] for a, b in pairs)
    if same < len(together) / 2:
        return Fault(f"only {same} of {len(together)} answers begin as they do alone", LOGS)
    return None


def judge_together(together: Sequence[StreamedReply], load: EngineLoad | None) -> Fault | None:
    """All answers were written side by side.

    Where the engine has no place for all (`load` says that some wait), those that run must
    still run together.
    """
    count, peak = len(together), peak_in_progress(together)
    full = load is not None and load.waiting > 0 and load.running >= count
    if mean_in_progress(together) < TOGETHER:
        return Fault(f"the answers came one after another, at most {peak} at a time", _SERIAL)
    if peak < count and not full:
        return Fault(
            f"at most {peak} of {count} answers were written at a time",
            f"the engine takes no more (`--max-num-seqs`), or a proxy holds requests back; "
            f"`--concurrency {peak}` tests with fewer",
        )
    if load is not None and load.readings >= _READINGS and load.running < TOGETHER:
        return Fault(f"the engine itself ran at most {load.running} request at a time", _SERIAL)
    if (late := _standing_still(together)) is not None:
        return Fault(f"request {late + 1} stood still while the others were answered", LOGS)
    return None


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


def first_line(text: str) -> str:
    """The answer proper: what comes after it, past its end, is free text."""
    return text.strip().partition("\n")[0]


def _standing_still(together: Sequence[StreamedReply]) -> int | None:
    """The answer that got no tokens in the time in which all were being written, if one did.

    A short time of that kind tells nothing: tokens may be read late.
    """
    spans = _spans(together)
    begin, end = max(begin for begin, _ in spans), min(end for _, end in spans)
    busy_s = max(end for _, end in spans) - min(begin for begin, _ in spans)
    if end - begin < _SHARED_PART * busy_s:
        return None
    for index, reply in enumerate(together):
        times = (reply.started_at + time_s for time_s in reply.token_times_s)
        if sum(begin <= at <= end for at in times) < SHARED_TOKENS:
            return index
    return None


def _spans(replies: Sequence[StreamedReply]) -> list[tuple[float, float]]:
    """From the first text of each answer to its last, on the clock that all share."""
    return [
        (reply.started_at + reply.token_times_s[0], reply.started_at + reply.token_times_s[-1])
        for reply in replies
        if reply.token_times_s
    ]


def _owner(text: str, answers: Sequence[str], index: int) -> int:
    """Whose answer `text` is: the same one's, or that with most of the words that only it has.

    Where no other has more, it is that of `index`, who asked.
    """
    if text == answers[index]:
        return index
    if text in answers:
        return answers.index(text)
    words = [set(re.findall(r"\w+", answer)) for answer in answers]
    found = set(re.findall(r"\w+", text))
    scores = []
    for position, own in enumerate(words):
        others = set().union(*words[:position], *words[position + 1 :])
        scores.append(len((own - others) & found))
    best = max(range(len(answers)), key=lambda position: scores[position])
    return best if scores[best] > scores[index] else index
