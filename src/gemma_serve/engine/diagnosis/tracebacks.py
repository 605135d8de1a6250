"""Python's tracebacks in a log: what was raised, where, and by which process."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from gemma_serve.engine.diagnosis.text import Block
from gemma_serve.engine.diagnosis.texts import Found

# The type of an exception that is not told: its traceback breaks off.
BROKEN_OFF = ""
TRACEBACK = b"Traceback(mostrecentcalllast)"
_MOST_PER_BLOCK = 24
_MOST_LINES = 400

# Both forms of vLLM's prefix: "(EngineCore pid=12) ERROR 11-25 10:00:00 [core.py:1] " since 0.11,
# "ERROR 03-12 07:11:39 engine.py:389] " before.
_PREFIX = re.compile(
    r"^\s*(?P<process>\([\w -]+ ?(?:pid|rank)=?\d+[^)]*\) ?|\[rank\d+\]:\s?)?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d "
    r"(?:\[[^\]]*\]|\S+\.py:\d+\]) ?)?"
)
_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_EXCEPTION = re.compile(r"^(?P<type>[A-Za-z_][\w.]*)(?::\s?(?P<message>.*))?$")
_CAUSED = "The above exception was the direct cause"
_WHILE = "During handling of the above exception"


@dataclass(frozen=True)
class Raised:
    """An exception that was printed with its traceback.

    `place` is where it was raised ("core.py:12, in run"). `follows` says whether it was raised
    from, or while handling, the one before it. `line` is the log's.
    """

    type: str
    message: str
    place: str
    process: str
    level: str
    line: int
    position: int
    follows: Literal["from", "while"] | None

    def __str__(self) -> str:
        name = self.type.rpartition(".")[2]
        return f"{name}: {self.message}" if self.message else name


def raised_in(block: Block, found: Found, offset: int) -> Iterator[Raised]:
    """The exceptions whose tracebacks begin in the block's own part.

    The first and the last ones of a block, if there are very many.
    """
    begins = found.get(TRACEBACK, ())
    if len(begins) > 2 * _MOST_PER_BLOCK:
        begins = [*begins[:_MOST_PER_BLOCK], *begins[-_MOST_PER_BLOCK:]]
    for at in begins:
        yield _read(block, block.line_at(at), offset + at - block.searched.start)


def _read(block: Block, first: int, position: int) -> Raised:
    lines = block.lines[first : first + _MOST_LINES]
    head = _split(lines[0])
    place = ""
    for number, line in enumerate(lines[1:], start=1):
        process, _, text = _split(line)
        if process != head[0]:
            continue  # another process speaks in between
        if frame := _FRAME.match(text):
            file = frame["file"].replace("\\", "/").split("/")[-1]
            place = f"{file}:{frame['line']}, in {frame['function']}"
        elif text and not text.startswith((" ", "\t")) and (error := _EXCEPTION.match(text)):
            message = (error["message"] or "").strip()
            says_nothing = error["message"] == "" or message.startswith("1 validation error")
            if says_nothing or message.endswith(":"):
                message = _with_next(message, lines[number + 1 : number + 4], head[0])
            follows = _follows(block.lines[max(0, first - 4) : first])
            where = block.first_line + first + number
            return Raised(error["type"], message, place, head[0], head[1], where, position, follows)
    begin = block.first_line + first
    return Raised(BROKEN_OFF, "", place, head[0], head[1], begin, position, None)


def _with_next(message: str, lines: Sequence[bytes], process: str) -> str:
    """What an exception says whose first line says nothing yet."""
    for line in lines:
        other, _, text = _split(line)
        if other == process and text.strip() and not text.lstrip().startswith("For further"):
            if text.startswith("Traceback") or _CAUSED in text or _WHILE in text:
                break
            said = text.strip().removeprefix("Value error, ")
            if "[type=" in said:
                return said.partition(" [type=")[0]
            if re.search(r"\s", said):
                return f"{message} {said}".strip()
    return message


def _split(line: bytes) -> tuple[str, str, str]:
    """The process, the level and the rest of a line."""
    text = line.decode("utf-8", errors="replace").rstrip()
    match = _PREFIX.match(text)
    assert match is not None
    found = (match["process"] or "").strip()
    # Only what is no prefix at all keeps its indentation.
    rest = text[match.end() :] if found or match["level"] else text
    return found, match["level"] or "", rest


def _follows(before: Sequence[bytes]) -> Literal["from", "while"] | None:
    for line in reversed(before):
        text = line.decode("utf-8", errors="replace")
        if _CAUSED in text:
            return "from"
        if _WHILE in text:
            return "while"
    return None
