"""The file that an engine's output goes to: bounded, and honest about what is missing in it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def rotated(path: Path, age: int) -> Path:
    """The file that was `path` before the last `age` rotations: engine.log.1 is the newest."""
    return path.with_name(f"{path.name}.{age}")


class RotatingLog:
    """A log file of about `max_bytes`, with the `keep` (at least 1) files before it.

    Nothing here raises, so that whoever reads an engine's output can go on reading whatever
    the disk does: an engine that nobody reads from stands still. For one thread.
    """

    def __init__(self, path: Path, *, max_bytes: int = 10 * 2**20, keep: int = 3) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._fd: int | None = None
        self._size = 0
        self._at_line_start = True
        self._lost = 0
        self._cause = ""
        self._in_trouble = False

    def write(self, data: bytes) -> OSError | None:
        """Append `data`; the error that kept it from being written, once as long as it lasts.

        Bytes that cannot be written are counted, and a line tells their number where they are
        missing as soon as the file can be written again.
        """
        if not data:
            return None
        error = self._write(data)
        told, self._in_trouble = self._in_trouble, error is not None
        return None if told else error

    def begin_anew(self) -> None:
        """Move what an earlier engine has written out of the way."""
        with suppress(OSError):
            if self.path.stat().st_size:
                self._move_away()

    def close(self) -> None:
        """Close the file, with a last line on what is missing in it if there is room for one."""
        if self._lost:
            with suppress(OSError):
                self._tell_loss(self._file_at_path())
        self._close()

    def _write(self, data: bytes) -> OSError | None:
        left = memoryview(data)
        trouble: OSError | None = None
        try:
            fd = self._file_at_path()
            self._tell_loss(fd)
            while left:
                span = self._span(left)
                if span == 0:
                    trouble = self._move_away() or trouble
                    fd = self._file_at_path()
                    span = self._span(left) or len(left)
                written = os.write(fd, left[:span])
                self._size += written
                self._at_line_start = left[written - 1] in b"\r\n"
                left = left[written:]
        except OSError as error:
            self._lose(len(left), error)
            return error
        return trouble

    def _span(self, data: memoryview) -> int:
        """How many bytes of `data` this file takes before the next one's turn; 0 if it is full.

        Files change at a line end. A line that is as long as a whole file is cut.
        """
        room = self._max_bytes - self._size
        if len(data) <= room:
            return len(data)
        if room > 0 and (end := _last_line_end(bytes(data[:room]))):
            return end
        if self._size and self._at_line_start:
            return 0
        rest = bytes(data[: max(room + self._max_bytes, 0)])
        return _first_line_end(rest, max(room, 0)) or len(rest)

    def _file_at_path(self) -> int:
        """The open file, opened anew if somebody removed or replaced it."""
        if self._fd is not None:
            with suppress(FileNotFoundError):
                there = self.path.stat()
                if os.path.samestat(there, os.fstat(self._fd)):
                    self._size = there.st_size
                    return self._fd
            self._close()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o600)
        self._size = os.fstat(self._fd).st_size
        self._at_line_start = self._size == 0
        return self._fd

    def _move_away(self) -> OSError | None:
        """Make room at the path; where that fails, the file just grows on."""
        try:
            for age in range(self._keep, 0, -1):
                with suppress(FileNotFoundError):
                    newer = rotated(self.path, age - 1) if age > 1 else self.path
                    newer.replace(rotated(self.path, age))
        except OSError as error:
            return error
        return None

    def _lose(self, count: int, error: OSError) -> None:
        if not self._lost:
            self._cause = error.strerror or str(error)
        self._lost += count

    def _tell_loss(self, fd: int) -> None:
        if not self._lost:
            return
        line = f"[gemma-serve: {self._lost} bytes of the log were lost: {self._cause}]\n".encode()
        if not self._at_line_start:
            line = b"\n" + line
        self._write_whole(fd, line)
        self._at_line_start = True
        self._lost = 0

    def _write_whole(self, fd: int, line: bytes) -> None:
        """Append all of `line` or nothing."""
        written = 0
        try:
            while written < len(line):
                written += os.write(fd, line[written:])
        except OSError:
            if written:
                with suppress(OSError):
                    os.ftruncate(fd, os.fstat(fd).st_size - written)
            raise
        self._size += len(line)

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):
                os.close(fd)


def _last_line_end(data: bytes) -> int:
    """Where the last line end in `data` is over; 0 where there is none."""
    return max(data.rfind(b"\n"), data.rfind(b"\r")) + 1


def _first_line_end(data: bytes, start: int) -> int:
    """Where the first line end from `start` is over; 0 where there is none."""
    ends = [end for mark in (b"\n", b"\r") if (end := data.find(mark, start)) >= 0]
    return min(ends) + 1 if ends else 0
