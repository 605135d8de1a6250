"""Logs as they come: bytes of any kind, in pieces of any size, with what others put around them.

Messages are looked for in text without whitespace ("squeezed"). So a line that a terminal wrapped
and two that were glued together still have their messages, and one search through a block is as
quick for a broken log as for a good one.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

# How much is searched at a time, and how much of it once more as the begin of the next: what
# belongs to a message, before and after it, is never further away.
_BLOCK = 2**20
_SHARED = 2**15

_WHITESPACE = b" \t\r\n\v\f"
_WITHIN_LINES = b" \t\r\v\f"
_LONGEST_LINE = 400
# No line of a log that was written by line.
_ENDLESS = 20_000

_ESCAPE = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")
# What collectors put before each line: CRI and `docker logs -t`, compose, `kubectl --prefix`,
# syslog and journald.
_COLLECTOR = re.compile(
    rb"^(?:"
    rb"\[pod/\S+\] |"
    rb"[\w.-]+ +\| ?|"
    rb"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[.,\d]*(?:Z|[+-]\d\d:?\d\d)? (?:std(?:out|err) [FP] )?|"
    rb"[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \S+ [\w./@-]+(?:\[\d+\])?: "
    rb"){1,2}",
    re.MULTILINE,
)
_SAMPLE = 4096


def squeezed(text: bytes) -> bytes:
    """The text without its whitespace."""
    return text.translate(None, _WHITESPACE)


@dataclass(frozen=True)
class Place:
    """A line of the log, counted from 1, and what stands in it."""

    line: int
    text: str


class Block:
    """A stretch of a log, with the end of the one before and the begin of the one after.

    `searched` are the positions in `squeezed` that are this block's own to search.
    """

    def __init__(self, before: bytes, own: bytes, after: bytes, first_line: int) -> None:
        parts = [_cleaned(part) for part in (before, own, after)]
        without = [squeezed(part) for part in parts]
        self.text = b"".join(parts)
        self.squeezed = b"".join(without)
        self.searched = range(len(without[0]), len(without[0]) + len(without[1]))
        self.first_line = first_line

    @cached_property
    def lines(self) -> list[bytes]:
        """The lines, as they are in the log but for colours and collectors' prefixes."""
        return self.text.split(b"\n")

    @cached_property
    def _ends(self) -> list[int]:
        """Where each line ends in the squeezed text."""
        lines = self.text.translate(None, _WITHIN_LINES).split(b"\n")
        return list(accumulate(map(len, lines)))

    def line_at(self, position: int) -> int:
        """The index in `lines` of what stands at `position` of the squeezed text."""
        return min(bisect_right(self._ends, position), len(self.lines) - 1)

    def line_until(self, position: int) -> bytes:
        """What stands before `position` in its line, squeezed."""
        index = self.line_at(position)
        return self.squeezed[self._ends[index - 1] if index else 0 : position]

    def passage(self, start: int, end: int) -> str:
        """The text of the lines that hold `start` to `end` of the squeezed text.

        Of lines without an end, that of no more than those bytes, squeezed.
        """
        start = max(start, 0)
        lines = self.lines[self.line_at(start) : self.line_at(end) + 1]
        if sum(map(len, lines)) > _ENDLESS:
            return self.squeezed[start:end].decode("utf-8", errors="replace")
        return b"\n".join(lines).decode("utf-8", errors="replace")

    def last_place(self) -> Place | None:
        """The last line with anything in it."""
        indices = range(len(self.lines) - 1, -1, -1)
        return next((self.place(index) for index in indices if self.lines[index].strip()), None)

    def place(self, index: int) -> Place:
        """A line, as evidence: of a long one, the begin."""
        return Place(self.first_line + index, _shown(self.lines[index]))

    def places(self, start: int, end: int) -> tuple[Place, ...]:
        """The lines that hold `start` to `end` of the squeezed text, four at most."""
        first, last = self.line_at(start), self.line_at(end - 1)
        if len(self.lines[first]) > _ENDLESS:
            return (Place(self.first_line + first, _shown(self.squeezed[start:])),)
        indices = range(first, min(last, first + 3) + 1)
        return tuple(self.place(index) for index in indices if self.lines[index].strip())


class Blocks:
    """Cuts a log that comes in pieces into blocks, in constant memory."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0
        self._before = b""
        self._first_line = 1

    def feed(self, data: bytes) -> Iterator[Block]:
        """The blocks that `data` completes."""
        for begin in range(0, len(data), _BLOCK):
            piece = data[begin : begin + _BLOCK]
            self._pieces.append(piece)
            self._size += len(piece)
            if self._size >= _BLOCK + _SHARED:
                yield self._cut(_SHARED)

    def finish(self) -> Block:
        """What is left."""
        return self._cut(0)

    def _cut(self, kept: int) -> Block:
        text = b"".join(self._pieces)
        own = text[: len(text) - kept]
        # Where it can be had, a block ends with a line.
        end = own.rfind(b"\n", len(own) - _SHARED) if kept else -1
        own = own[: end + 1] if end > 0 else own
        after = text[len(own) :]
        block = Block(self._before, own, after, self._first_line)
        together = self._before + own
        shared = together[-_SHARED:]
        shared = shared[shared.find(b"\n") + 1 :]
        self._first_line += together.count(b"\n", 0, len(together) - len(shared))
        self._before, self._pieces, self._size = shared, [after], len(after)
        return block


def _shown(line: bytes) -> str:
    text = line[: 4 * _LONGEST_LINE].decode("utf-8", errors="replace").strip()
    shown = "".join(c if c.isprintable() else " " for c in text)
    return shown if len(shown) <= _LONGEST_LINE else shown[:_LONGEST_LINE] + " ..."


def _cleaned(text: bytes) -> bytes:
    if b"\x1b" in text:
        text = _ESCAPE.sub(b"", text)
    # Its form seldom changes within a log, so a look at both ends tells.
    looked_at = text[:_SAMPLE] + b"\n" + text[-_SAMPLE:]
    return _COLLECTOR.sub(b"", text) if _COLLECTOR.search(looked_at) else text
