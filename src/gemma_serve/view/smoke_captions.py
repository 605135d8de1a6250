"""What the pictures of the smoke test show, in sentences that only the times decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gemma_serve.planning.smoke.report import CheckResult
from gemma_serve.view.smoke_streams import Stream, most_at_once, took_s
from gemma_serve.view.smoke_words import number, seconds

_NUMBERS = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)


def why_no_picture(id: str, check: CheckResult | None) -> str:
    """Why there are no streams of the check `id`, which ended as `check` if it ran at all."""
    if check is None:
        return f"No picture: the check `{id}` was not run."
    if check.status == "skipped":
        return f"No picture: the check `{id}` was skipped ({check.reason})."
    return f"No picture: the check `{id}` did not get far enough to measure its streams."


def together_said(streams: Sequence[Stream], alone: Sequence[Stream], check: CheckResult) -> str:
    """How long the streams took at once and alone, and whether they were side by side."""
    return " ".join(filter(None, (_compared(streams, alone), _manner(streams), _counted(check))))


def pair_said(first: Stream, second: Stream) -> str:
    """What the staggered pair shows."""
    came = f"The second request came {seconds(second.started_s - first.started_s)} after the first"
    if not second.times_s or not first.times_s:
        which = "second" if not second.times_s else "first"
        return f"{came}. The {which} got no token."
    waited = f"got its first token {seconds(second.times_s[0] - second.started_s)} later"
    both_s = min(first.times_s[-1], second.times_s[-1]) - max(first.times_s[0], second.times_s[0])
    if both_s > 0:
        return (
            f"{came} and {waited}, while the first was still being written. Both were written side "
            f"by side for {seconds(both_s)}."
        )
    if second.times_s[0] >= first.times_s[-1]:
        return f"{came} and {waited}, when the first had ended. They were never side by side."
    return f"{came} and {waited}. They were never written side by side."


def waits_said(groups: Mapping[str, Sequence[Stream]]) -> str:
    """The shortest and the longest time to first token of each group, by how it was asked for."""
    parts = []
    for how, streams in groups.items():
        waits = [s.ttft_s for s in streams if s.ttft_s is not None]
        if waits:
            low, high = seconds(min(waits)), seconds(max(waits))
            between = low if low == high else f"{low.removesuffix(' s')} to {high}"
            parts.append(f"{between} where it was asked for {how}")
    return f"The first token of an answer came after {', and after '.join(parts)}."


def lane_said(stream: Stream) -> str:
    """A lane in words, for who can't see it."""
    asked = f"asked at {seconds(stream.started_s)}"
    if stream.ttft_s is None:
        return f"{asked}, no token came"
    tokens = f"{len(stream.times_s)} token{'' if len(stream.times_s) == 1 else 's'}"
    return (
        f"{asked}, first token {seconds(stream.ttft_s)} later, {tokens} until "
        f"{seconds(stream.times_s[-1])}"
    )


def _compared(streams: Sequence[Stream], alone: Sequence[Stream]) -> str:
    came = [stream for stream in streams if stream.times_s]
    if not came:
        return f"Of {_answers(len(streams))} asked for at once, none came."
    if len(came) < len(streams):
        return (
            f"Of {_answers(len(streams))} asked for at once, {_count(len(came))} came, within "
            f"{seconds(took_s(streams))}."
        )
    at_once = f"{_answers(len(streams))} asked for at once took {seconds(took_s(streams))}"
    alone_came = [stream for stream in alone if stream.times_s]
    if len(alone_came) < len(alone) or not alone:
        return f"{_capital(at_once)}."
    who = "they" if len(alone) == len(streams) else _answers(len(alone))
    return f"{_capital(at_once)}; asked for one after another, {who} took {seconds(took_s(alone))}."


def _manner(streams: Sequence[Stream]) -> str:
    """Whether the answers were written side by side, as their tokens' times show it."""
    came = [stream for stream in streams if stream.times_s]
    written = [stream for stream in came if stream.times_s[-1] > stream.times_s[0]]
    if came and not written:
        return "No answer came over time, but in one piece: how it was written can't be seen."
    if len(written) < len(came):
        return f"Of these, {_count(len(came) - len(written))} came in one piece."
    if len(written) < 2:
        return ""
    peak = most_at_once(written)
    if peak == 1:
        return "They were written one after the other: no two were in progress at the same time."
    if peak < len(written):
        return f"At most {_count(peak)} of them were in progress at the same time."
    return _side_by_side(written, "" if len(written) == len(streams) else " that came")


def _side_by_side(written: Sequence[Stream], which: str) -> str:
    """For how long streams that all overlap did so."""
    firsts, lasts = [s.times_s[0] for s in written], [s.times_s[-1] for s in written]
    all_s, whole_s = max(0.0, min(lasts) - max(firsts)), max(lasts) - min(firsts)
    who = "Both" if len(written) == 2 else f"All {_count(len(written))}"
    for_s = f"for {seconds(all_s)} of the {seconds(whole_s)} that they took to write"
    if all_s < whole_s / 2:
        return f"{who}{which} were in progress at the same time, but only {for_s}."
    return f"{who}{which} were written side by side, {for_s}."


def _counted(check: CheckResult) -> str:
    running = number(check.figures.get("engine_running"))
    if running is None:
        return ""
    requests = f"{running:.0f} request{'' if running == 1 else 's'}"
    return f"The engine itself counted at most {requests} running, those of others included."


def _answers(count: int) -> str:
    return f"{_count(count)} answer{'' if count == 1 else 's'}"


def _count(count: int) -> str:
    return _NUMBERS[count] if count < len(_NUMBERS) else str(count)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
