"""One run of an engine, as its log tells it: how far it came, and what was seen on the way."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from gemma_serve.engine.diagnosis.sightings import Sighting, Strength, is_quoted
from gemma_serve.engine.diagnosis.text import Block, Place
from gemma_serve.engine.diagnosis.texts import Found
from gemma_serve.engine.diagnosis.tracebacks import Raised

T = TypeVar("T")
_Kind = Literal["start", "engine", "ready", "serves", "stop"]

# A container that is started again and again logs every run into one file. The first two are
# vLLM's from 0.4 on, in one start soon after another.
_STARTS = (b"vLLMAPIserverversion", b"non-defaultargs:")
_ENGINES = (b"InitializinganLLMengine", b"InitializingaV1LLMengine", b"InitializingaV0LLMengine")
_READY = (b"Applicationstartupcomplete", b"Uvicornrunningon")
# A log's tail has no start, but shows that it was ready.
_SERVES = (b'HTTP/1.1"200OK', b"Avgpromptthroughput:")
# What is printed once an ordinary stop has begun. uvicorn says "Shutting down" also when the
# engine died before; by then that has been told.
_STOPS = (
    b"APIserver:shutdowntriggered",
    b"INFO:Shuttingdown",
    b"KeyboardInterrupt:terminated",
    b"ReceivedSIGTERM",
    b"ReceivedSIGINT",
    b"ShuttingdownFastAPIHTTPserver",
    b"Gracefullystopping",
)
_TEXTS: Mapping[_Kind, Sequence[bytes]] = {
    "start": _STARTS,
    "engine": _ENGINES,
    "ready": _READY,
    "serves": _SERVES,
    "stop": _STOPS,
}
_MODEL = (
    re.compile(r"'model(?:_tag)?':\s*'([^']+)'"),
    re.compile(r"model='([^']+)'"),
)

MARKS = tuple(text for texts in _TEXTS.values() for text in texts)

# As a position: what is in the log came after it.
_BEFORE_THE_LOG = -1

# Of one message, or one kind of exception, this many from the begin of a run and from its end.
_MOST = 16


@dataclass(frozen=True)
class Mark:
    """A place where a run begins, shows its engine, is ready, or is told to stop.

    `position` as in `Sighting`, `at` in the block's own squeezed text.
    """

    kind: _Kind
    position: int
    at: int


@dataclass
class Run:
    """What was seen between one start and the next; positions as in `Sighting`.

    `last` is the last line of the log with anything in it, `end` the position after it.
    """

    model: str | None = None
    ready: int | None = None
    stop: int | None = None
    last: Place | None = None
    end: int = 0
    _marks: set[str] = field(default_factory=set)
    _sightings: dict[tuple[str, str, Strength], list[Sighting]] = field(default_factory=dict)
    _raised: list[Raised] = field(default_factory=list)

    @property
    def is_engines(self) -> bool:
        """Whether anything shows that vLLM wrote this."""
        return bool(self._marks)

    @property
    def is_whole(self) -> bool:
        """Whether the log has its begin."""
        return "start" in self._marks

    @property
    def has_begun(self) -> bool:
        """Whether it has come further than to its first lines."""
        return bool(self._marks - {"start"} or self._sightings or self._raised)

    @property
    def has_trouble(self) -> bool:
        """Whether anything may have gone wrong in it."""
        return bool(self._sightings or self._raised)

    def add_mark(self, mark: Mark) -> None:
        """Note how far it came; the first time counts."""
        self._marks.add(mark.kind)
        if mark.kind == "ready" and self.ready is None:
            self.ready = mark.position
        elif mark.kind == "serves" and self.ready is None:
            self.ready = mark.position if self.is_whole else _BEFORE_THE_LOG
        elif mark.kind == "stop" and self.stop is None:
            self.stop = mark.position

    def add_sighting(self, sighting: Sighting) -> None:
        """Keep it, if it is among the first or the last of its kind."""
        kind = (sighting.failure.id, sighting.part.text, sighting.strength)
        _keep(self._sightings.setdefault(kind, []), sighting)

    def add_raised(self, raised: Raised) -> None:
        """Keep it, if it is among the first or the last."""
        _keep(self._raised, raised)

    def sightings(self) -> list[Sighting]:
        """What was seen before an ordinary stop began, in order."""
        found = [one for kept in self._sightings.values() for one in kept]
        end = self.stop
        return sorted(
            (one for one in found if end is None or one.position < end),
            key=lambda one: one.position,
        )

    def raised(self) -> list[Raised]:
        """The exceptions that were printed before an ordinary stop began, in order."""
        return [one for one in self._raised if self.stop is None or one.position < self.stop]


def _keep(kept: list[T], one: T) -> None:
    if len(kept) == 2 * _MOST:
        del kept[_MOST]
    kept.append(one)


def marks_in(block: Block, found: Found, offset: int) -> Iterator[Mark]:
    """The marks in what is the block's own; `offset` is the log's length before it."""
    for kind, texts in _TEXTS.items():
        for text in texts:
            for at in _first_and_last(found.get(text, ())):
                if not is_quoted(block, at):
                    yield Mark(kind, offset + at - block.searched.start, at)


def _first_and_last(positions: Sequence[int]) -> Sequence[int]:
    """Those of a block that matter: a server prints some of them for every request."""
    if len(positions) <= 2 * _MOST:
        return positions
    return [*positions[:_MOST], *positions[-_MOST:]]


def model_in(passage: str) -> str | None:
    """The model that a start names in its first lines."""
    for pattern in _MODEL:
        if match := pattern.search(passage):
            # A terminal may have wrapped it.
            return match[1].replace("\n", "")
    return None
