"""The engine's log: read as it grows, whatever becomes of its file, and cut into lines."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from itertools import count as count_from
from pathlib import Path

from gemma_serve.engine.log_file import rotated

# `up` still finds it here.
from gemma_serve.engine.timeline import phase_of as phase_of

# What one call reads at most, and what may wait before a reader gives up on the middle.
_PER_CALL = 2**20
_MOST_WAITING = 8 * 2**20
_BLOCK = 2**16

_LINE_END = re.compile(rb"[\r\n]")
_TEXT = re.compile(rb"[^\r\n]+")


class LogLines:
    """Cuts a growing log into lines; progress bars end theirs with a carriage return."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._begun: list[str] = []

    def feed(self, data: bytes) -> list[str]:
        """The lines that `data` completes, without empty ones."""
        first, *others = re.split(r"[\r\n]+", self._decoder.decode(data))
        self._begun.append(first)
        if not others:
            return []
        lines = ["".join(self._begun), *others[:-1]]
        self._begun = [others[-1]]
        return [line for line in lines if line]


class LogReader:
    """The engine's log as it grows, over rotations, removals and truncations of its file.

    A reader that is more than 8 MiB behind goes on with the last 1 MiB. Close it in the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._lines = LogLines()
        self._mid_line = False

    def new_lines(self) -> list[str]:
        """The lines that were completed since the last call, out of at most 1 MiB.

        What is left comes with the next call. None where the file is missing or unreadable.
        """
        data = bytearray()
        with suppress(OSError):
            self._read_into(data)
        return self._lines.feed(self._whole_lines(bytes(data)))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read_into(self, data: bytearray) -> None:
        # Looked for before the old file is read to its end: once there is a newer one, nobody
        # writes to the old one.
        newer = self._newer()
        if self._file is not None:
            self._start_over_if_truncated(self._file)
            newer = self._skip_ahead(self._file, newer)
            data += self._file.read(_PER_CALL)
            if newer is None or _bytes_left(self._file):
                return
        elif newer is None:
            return
        file = self._go_over()
        if not data:
            self._skip_ahead(file, None)
        data += file.read(_PER_CALL - len(data))

    def _newer(self) -> os.stat_result | None:
        """The file at the path, if it is not the open one."""
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return None
        if self._file is not None and os.path.samestat(there, os.fstat(self._file.fileno())):
            return None
        return there

    def _go_over(self) -> FileIO:
        """Open the file at the path instead of the present one."""
        file = FileIO(self.path)
        self.close()
        self._file = file
        return file

    def _start_over_if_truncated(self, file: FileIO) -> None:
        if _bytes_left(file) < 0:
            file.seek(0)
            self._lines = LogLines()
            self._mid_line = False

    def _skip_ahead(self, file: FileIO, newer: os.stat_result | None) -> os.stat_result | None:
        """Leave out the middle if too much is waiting; the newer file that is still to come."""
        newer_size = newer.st_size if newer else 0
        if _bytes_left(file) + newer_size <= _MOST_WAITING:
            return newer
        if newer_size >= _PER_CALL:
            file, newer, newer_size = self._go_over(), None, 0
        left = _bytes_left(file)
        file.seek(max(left - (_PER_CALL - newer_size), 0), os.SEEK_CUR)
        self._lines = LogLines()
        self._mid_line = True
        return newer

    def _whole_lines(self, data: bytes) -> bytes:
        """`data` without the end of a line whose begin was skipped."""
        if not self._mid_line:
            return data
        end = _LINE_END.search(data)
        if end is None:
            return b""
        self._mid_line = False
        return data[end.end() :]


def tail_lines(path: Path, count: int, *, older: bool = False) -> list[str]:
    """The last `count` lines of the log at `path`, in order and without empty ones.

    With `older` it goes back over the files that the log was rotated to, the last run's among
    them. None where nothing is there or readable.
    """
    blocks: list[bytes] = []
    wanted = count
    for block in _blocks_from_end(path, older=older):
        if wanted < 0 or count <= 0:
            break
        blocks.append(block)
        # A line over two blocks counts in both, and the first of the lines may not be whole.
        wanted -= len(_TEXT.findall(block)) - (len(blocks) > 1)
    text = b"".join(reversed(blocks)).decode(errors="replace")
    lines = [line for line in re.split(r"[\r\n]+", text) if line]
    return lines[-count:] if count > 0 else []


def _blocks_from_end(path: Path, *, older: bool) -> Iterator[bytes]:
    """What is in the log, the last bytes first; a file that is rotated meanwhile is read once."""
    seen: set[tuple[int, int]] = set()
    gaps = 0
    for age in count_from() if older else (0,):
        try:
            file = FileIO(rotated(path, age) if age else path)
        except OSError:
            gaps += 1
            # A rotation in progress leaves one name free.
            if gaps > 1:
                return
            continue
        with file:
            state = os.fstat(file.fileno())
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            for end in range(state.st_size, 0, -_BLOCK):
                start = max(end - _BLOCK, 0)
                yield os.pread(file.fileno(), end - start, start)


def _bytes_left(file: FileIO) -> int:
    return os.fstat(file.fileno()).st_size - file.tell()
