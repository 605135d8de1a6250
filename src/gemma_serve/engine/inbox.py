"""Where the main loop waits: for a signal, for a process to end, or for a while."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType, TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

_CAUGHT = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Inbox:
    """Collects SIGINT, SIGTERM and SIGHUP while it is open, and wakes whoever waits on it.

    A handler only notes its signal; the loop acts on it. Handlers write to a pipe, which is
    safe at any moment, where setting a threading.Event in a handler can deadlock. On leaving,
    the former handlers are back. Main thread only.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Inbox:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        for signum in _CAUGHT:
            # What is ignored stays so: `nohup` does that with SIGHUP, shells with SIGINT behind &.
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._former[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._former.items():
            signal.signal(signum, handler)
        os.close(self._read)
        os.close(self._write)
        self._read = self._write = -1

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signals.append(signum)
        self.wake()

    def wake(self) -> None:
        """End the current or the next `wait` at once. Any thread may call it."""
        try:
            os.write(self._write, b"\0")
        except OSError:
            return  # full: the wait ends anyway; closed: nobody waits any more

    def wait(self, timeout_s: float) -> None:
        """Return when woken, when a signal came, or after `timeout_s`."""
        if select.select([self._read], [], [], timeout_s)[0]:
            os.read(self._read, 65536)

    def wait_until(self, happened: Callable[[], bool], *, timeout_s: float, tick_s: float) -> bool:
        """Wait for `happened`, looking at every wake-up and tick; False if time ran out."""
        from time import monotonic

        deadline = monotonic() + timeout_s
        while not happened():
            left = deadline - monotonic()
            if left <= 0:
                return False
            self.wait(min(left, tick_s))
        return True

    def during(self, work: Callable[[], T], look: Callable[[], None], tick_s: float) -> T:
        """What `work` gives or raises, done in a thread; `look` at every wake-up and tick.

        What `look` raises ends the wait, and nobody waits for the thread then.
        """
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:  # whatever it is, the main loop raises it
                done.set_exception(error)
            self.wake()

        # Not from a pool: a request that hangs must not keep the program from ending.
        threading.Thread(target=run, daemon=True).start()
        while not done.done():
            look()
            self.wait(tick_s)
        look()
        return done.result()
