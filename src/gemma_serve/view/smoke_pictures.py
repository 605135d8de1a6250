"""The smoke test's streams as pictures: where each mark goes, and what the picture shows.

Lengths are shares of the picture's width, from 0 to `WIDTH`; times are in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gemma_serve.planning.smoke.report import CheckResult, SmokeReport
from gemma_serve.view.smoke_captions import (
    lane_said,
    pair_said,
    together_said,
    waits_said,
    why_no_picture,
)
from gemma_serve.view.smoke_streams import Stream, streams_of, took_s
from gemma_serve.view.smoke_words import one_line, seconds

WIDTH = 1000
_LABEL = 60
_MOST_AXIS_MARKS = 6
# Shorter than this share of the axis, single tokens can't be told apart.
_ENLARGE_BELOW = 0.4


@dataclass(frozen=True)
class AxisMark:
    """A time on the axis."""

    x: float
    label: str


@dataclass(frozen=True)
class Lane:
    """One stream: the wait, then the writing, with a mark for each token, all as one path."""

    label: str
    description: str
    wait_x: float
    wait_width: float
    written_x: float
    written_width: float
    tokens: str


@dataclass(frozen=True)
class Panel:
    """The streams of one group, a lane each."""

    title: str
    lanes: tuple[Lane, ...]


@dataclass(frozen=True)
class Picture:
    """Panels over one common axis, and what they show; without panels, why there are none."""

    title: str
    says: str
    panels: tuple[Panel, ...] = ()
    axis: tuple[AxisMark, ...] = ()


@dataclass(frozen=True)
class Bar:
    """One time to first token."""

    kind: Literal["alone", "together"]
    width: float
    text: str


@dataclass(frozen=True)
class BarLane:
    """The times to first token of one prompt."""

    label: str
    description: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class BarPicture:
    """The times to first token of all prompts; without lanes, why there are none."""

    title: str
    says: str
    lanes: tuple[BarLane, ...] = ()
    axis: tuple[AxisMark, ...] = ()


def together_pictures(report: SmokeReport) -> tuple[Picture, ...]:
    """The same prompts asked one after another and at once, and where it helps, enlarged."""
    title = "Asked one after another, and asked at once"
    check = _check(report, "together")
    streams = streams_of(check, "answers")
    if check is None or not streams:
        return (Picture(title, why_no_picture("together", check)),)
    alone = streams_of(check, "alone")
    end = max(_end(streams), _end(alone))
    panels = [_panel(f"Asked at once: {seconds(took_s(streams))}", streams, end)]
    if alone:
        title_alone = f"Asked one after another: {seconds(took_s(alone))}"
        panels.insert(0, _panel(title_alone, alone, end))
    says = together_said(streams, alone, check)
    pictures = [Picture(title, says, tuple(panels), _axis(end))]
    if alone and _end(streams) < _ENLARGE_BELOW * end:
        end = _end(streams)
        closer = _panel("Asked at once, enlarged", streams, end)
        pictures.append(
            Picture(
                "Asked at once, enlarged",
                "The lower half of the picture above on an axis of its own: each mark is a token.",
                (closer,),
                _axis(end),
            )
        )
    return tuple(pictures)


def staggered_picture(report: SmokeReport) -> Picture:
    """A request that comes while another is answered."""
    title = "A second request while the first still runs"
    check = _check(report, "staggered")
    streams = streams_of(check, "answers")
    if len(streams) < 2:
        return Picture(title, why_no_picture("staggered", check))
    end = _end(streams)
    return Picture(title, pair_said(*streams[:2]), (_panel("", streams, end),), _axis(end))


def first_token_picture(report: SmokeReport) -> BarPicture:
    """How long each stream waited for its first token, alone and among the others."""
    title = "Time to first token"
    check = _check(report, "together")
    together, alone = streams_of(check, "answers"), streams_of(check, "alone")
    waits = [s.ttft_s for s in (*alone, *together) if s.ttft_s is not None]
    if not waits:
        return BarPicture(title, why_no_picture("together", check))
    end = _stretched(max(waits))
    says = waits_said({"alone": alone, "at once with the others": together})
    return BarPicture(title, says, _bar_lanes(alone, together, end), _axis(end))


def _check(report: SmokeReport, id: str) -> CheckResult | None:
    return next((check for check in report.checks if check.id == id), None)


def _end(streams: Sequence[Stream]) -> float:
    """The end of an axis that holds all of `streams`; more than 0."""
    ends = [(stream.times_s or (stream.started_s,))[-1] for stream in streams]
    return _stretched(max(ends, default=0.0))


def _stretched(end: float) -> float:
    """A little more, so that the last mark is not on the edge."""
    return max(end * 1.01, 1e-6)


def _axis(end: float) -> tuple[AxisMark, ...]:
    step = _round_step(end / _MOST_AXIS_MARKS)
    marks = range(math.floor(end / step) + 1)
    return tuple(AxisMark(_x(i * step, end), f"{i * step:g} s" if i else "0") for i in marks)


def _round_step(at_least: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50 ... and of their tenths."""
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= at_least * 0.999)


def _x(time_s: float, end: float) -> float:
    return round(WIDTH * (time_s / end), 1)


def _panel(title: str, streams: Sequence[Stream], end: float) -> Panel:
    return Panel(title, tuple(_lane(stream, end) for stream in streams))


def _lane(stream: Stream, end: float) -> Lane:
    first_s, last_s = (stream.times_s[0], stream.times_s[-1]) if stream.times_s else (end, end)
    start, first, last = (_x(time, end) for time in (stream.started_s, first_s, last_s))
    return Lane(
        label=_label(stream),
        description=lane_said(stream),
        wait_x=start,
        wait_width=round(first - start, 1),
        written_x=first,
        written_width=round(last - first, 1),
        tokens="".join(f"M{_x(time, end):g} 1V9" for time in stream.times_s),
    )


def _label(stream: Stream) -> str:
    return one_line(stream.prompt, _LABEL) or "(no prompt)"


def _bar_lanes(
    alone: Sequence[Stream], together: Sequence[Stream], end: float
) -> tuple[BarLane, ...]:
    by_prompt = {stream.prompt: stream for stream in alone}
    lanes = []
    for stream in together or alone:
        pair = {"alone": by_prompt.get(stream.prompt), "together": stream if together else None}
        bars = []
        for kind, one in pair.items():
            if one is not None and one.ttft_s is not None:
                width = _x(one.ttft_s, end)
                bars.append(Bar(kind, width, seconds(one.ttft_s)))  # type: ignore[arg-type]
        told = ", ".join(f"{_KINDS[bar.kind]} {bar.text}" for bar in bars)
        lanes.append(BarLane(_label(stream), told or "no token came", tuple(bars)))
    return tuple(lanes)


_KINDS = {"alone": "alone", "together": "at once"}
