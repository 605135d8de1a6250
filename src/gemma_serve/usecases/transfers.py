"""Several files on their way at once, and how far they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from threading import Event as Flag
from threading import Lock, Thread
from time import monotonic

from gemma_serve.adapters.hub.client import download_timeout_s
from gemma_serve.adapters.hub.transfer import CancelledError, Reporting
from gemma_serve.planning.model.repo_files import RepoFile
from gemma_serve.usecases.events import DownloadProgress

# Files at a time. One connection seldom fills a fast line.
_AT_ONCE = 4
# Over which the rate is taken.
_WINDOW_S = 10.0


class Sum:
    """A number that several threads add to."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.value += count


class Transfers:
    """Files on their way, a few at a time; the first error ends them all."""

    def __init__(
        self,
        wanted: Sequence[RepoFile],
        missing: Sequence[RepoFile],
        cancelled: Flag,
        wake: Callable[[], None],
    ) -> None:
        self.error: Exception | None = None
        self.ended = False
        self._wanted = wanted
        self._waiting = deque(missing)
        self._missing = len(missing)
        self._cancelled = cancelled
        self._wake = wake
        names = {file.name for file in missing}
        self._sizes = {f.name: 0 if f.name in names else f.size_bytes for f in wanted}
        self._resumed: dict[str, int] = {}
        self._finished: set[str] = set()
        self._lock = Lock()
        self._alive_at = monotonic()
        self._in_flight: list[RepoFile] = []
        self._coming: set[str] = set()
        self._window: deque[tuple[float, int]] = deque()

    def start(self, fetch: Callable[[RepoFile, Reporting], None]) -> None:
        """Begin; `ended` says when all is over."""
        workers = [
            Thread(target=self._work, args=(fetch,), name="download", daemon=True)
            for _ in range(min(_AT_ONCE, self._missing))
        ]
        for worker in workers:
            worker.start()

    def _work(self, fetch: Callable[[RepoFile, Reporting], None]) -> None:
        while not self._cancelled.is_set():
            try:
                file = self._waiting.popleft()
            except IndexError:
                return
            with self._lock:
                self._in_flight.append(file)
            try:
                fetch(file, self._reporting(file))
            except Exception as error:
                self._fail(error)
                return
            self._finish(file)

    def _reporting(self, file: RepoFile) -> Reporting:
        return Reporting(
            on_size=lambda size: self._note(file.name, size),
            on_life=self._live,
            is_cancelled=self._cancelled.is_set,
        )

    def _note(self, name: str, size: int) -> None:
        with self._lock:
            # What was on the disk before is not what came, unless it was thrown away.
            self._resumed[name] = min(size, self._resumed.get(name, size))
            if size != self._sizes[name]:
                self._alive_at = monotonic()
                if size > self._resumed[name]:
                    self._coming.add(name)
            self._sizes[name] = size

    def _live(self) -> None:
        self._alive_at = monotonic()

    def _finish(self, file: RepoFile) -> None:
        with self._lock:
            self._sizes[file.name] = file.size_bytes
            self._finished.add(file.name)
            self._alive_at = monotonic()
            self._coming.discard(file.name)
            self._in_flight.remove(file)
            if len(self._finished) == self._missing:
                self.ended = True
        self._wake()

    def _fail(self, error: Exception) -> None:
        with self._lock:
            if self.error is None and not isinstance(error, CancelledError):
                self.error = error
            self.ended = True
        self._waiting.clear()
        self._wake()

    @property
    def fetched_bytes(self) -> int:
        """What came over the network: the files that are here now, less what was before."""
        names = self._finished
        return sum(self._sizes[name] - self._resumed.get(name, 0) for name in names)

    @property
    def in_flight(self) -> tuple[RepoFile, ...]:
        """The files that are being fetched at this moment."""
        return tuple(self._in_flight)

    def still_s(self) -> float:
        """For how long nothing has moved."""
        return monotonic() - self._alive_at

    def is_stalled(self) -> bool:
        """Whether nothing has come for longer than any Hub takes to answer."""
        first, later = download_timeout_s()
        return self.still_s() > (later if self._coming else first)

    def progress(self) -> DownloadProgress:
        """How far it is."""
        with self._lock:
            done = sum(self._sizes.values())
            files = len(self._wanted) - self._missing + len(self._finished)
        rate = self._rate(done)
        total = sum(file.size_bytes for file in self._wanted)
        left = (total - done) / rate if rate else None
        return DownloadProgress(done, total, files, len(self._wanted), rate, left)

    def _rate(self, done: int) -> float | None:
        now = monotonic()
        self._window.append((now, done))
        while now - self._window[0][0] > _WINDOW_S:
            self._window.popleft()
        since, before = self._window[0]
        if now - since < 1.0 or done <= before:
            return None
        return (done - before) / (now - since)
