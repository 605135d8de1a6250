"""Where the messages of the catalogue stand in a log, and how they are meant there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from gemma_serve.engine.diagnosis.text import Block, Place
from gemma_serve.engine.diagnosis.texts import Found
from gemma_serve.planning.failures import Failure, MessagePart

# How far around a message its numbers and its company are looked for.
_BEFORE = 600
_AFTER = 1500
# So many of a message are looked at in a block; the last one always is.
_MOST_PER_BLOCK = 5
_QUOTE = 300

_LEVEL = re.compile(rb"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL)\d\d-\d\d\d\d:\d\d|\w+Warning:")
_RAISED = re.compile(rb"[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|NotFound)(?:\(.{0,80})?:")
_TRACEBACK = b"Traceback(mostrecentcalllast)"
# What clients sent stands in the log, too.
_QUOTED = re.compile(rb"Receivedrequest|prompt:['\"]|\"content\":")


class Strength(IntEnum):
    """How a message stands there: only mentioned, printed as an error, or raised."""

    MENTIONED = 1
    PRINTED = 2
    RAISED = 3


@dataclass(frozen=True)
class Sighting:
    """A message of `failure` in the log.

    `position` counts squeezed bytes from the begin of the log. `passage` is the text around it.
    """

    failure: Failure
    part: MessagePart
    strength: Strength
    position: int
    passage: str
    places: tuple[Place, ...]


class Messages:
    """The messages of `failures`, to be recognised where their texts are found."""

    def __init__(self, failures: Sequence[Failure]) -> None:
        self._parts = [
            (failure, part, part.text.encode()) for failure in failures for part in failure.parts
        ]

    @property
    def texts(self) -> list[bytes]:
        """What is to be looked for."""
        return [text for _, _, text in self._parts]

    def sightings(self, block: Block, found: Found, offset: int) -> Iterator[Sighting]:
        """All that stands in what is the block's own; `offset` is the log's length before it."""
        text, own = block.squeezed, block.searched
        for failure, part, wanted in self._parts:
            for at in _first_and_last(found.get(wanted, ())):
                if not _is_in_company(text, at, part):
                    continue
                yield Sighting(
                    failure,
                    part,
                    _strength(block, at, wanted),
                    offset + at - own.start,
                    block.passage(at - _BEFORE, at + _AFTER),
                    block.places(at, at + len(wanted)),
                )


def _first_and_last(positions: Sequence[int]) -> Sequence[int]:
    if len(positions) <= _MOST_PER_BLOCK:
        return positions
    return [*positions[: _MOST_PER_BLOCK - 1], positions[-1]]


def _is_in_company(text: bytes, at: int, part: MessagePart) -> bool:
    around = text[max(0, at - _BEFORE) : at + _BEFORE]
    if part.near is not None and part.near.encode() not in around:
        return False
    return part.without is None or part.without.encode() not in around


def _strength(block: Block, at: int, wanted: bytes) -> Strength:
    """By what stands before it: an exception's name, or the level of the message it is part of."""
    before = block.squeezed[max(0, at - _BEFORE) : at]
    levels = list(_LEVEL.finditer(before))
    since = before[levels[-1].end() :] if levels else before
    if _QUOTED.search(since[-_QUOTE:]) or is_quoted(block, at):
        return Strength.MENTIONED
    # vLLM begins each line of a message with its level; lines without one are no message of its.
    told = not levels or not _is_quiet(levels[-1]) or _TRACEBACK in since
    if not told and _LEVEL.search(block.line_until(at)[-_BEFORE:]):
        return Strength.MENTIONED
    return Strength.RAISED if told and _RAISED.search(since + wanted) else Strength.PRINTED


def is_quoted(block: Block, at: int) -> bool:
    """Whether it is in the words of a client, however far into them."""
    return _QUOTED.search(block.line_until(at)[:_QUOTE]) is not None


def _is_quiet(level: re.Match[bytes]) -> bool:
    return level["level"] not in (b"ERROR", b"CRITICAL")
