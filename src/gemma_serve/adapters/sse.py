"""Server-sent events, from bytes as they arrive to the data of each event."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator


class SseDecoder:
    """Turns the bytes of an event stream, cut anywhere, into the data of its events.

    CR, LF and CRLF end a line, even when a chunk ends between CR and LF; a character may be cut
    too. Comments and fields other than `data` are passed over; several `data` lines of one event
    are joined by a newline. An event that the stream ends before its blank line is dropped.
    `feed` and `close` raise UnicodeDecodeError where the bytes are not UTF-8.
    """

    def __init__(self) -> None:
        utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
        self._at_start = True
        self._line = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The data of every event that `chunk` completes."""
        return self._take(self._decoder.decode(chunk))

    def close(self) -> Iterator[str]:
        """What the end of the stream completes: a last CR may still end an event."""
        return self._take(self._decoder.decode(b"", final=True))

    def _take(self, text: str) -> Iterator[str]:
        if self._at_start and text:
            text, self._at_start = text.removeprefix("\ufeff"), False
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if line:
                self._field(line)
            elif self._data:
                data, self._data = "\n".join(self._data), []
                yield data

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        if name == "data":  # a comment begins with a colon: its name is empty
            self._data.append(value.removeprefix(" "))
