"""Bring a model's files to this disk, whole and as the Hub promises them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event as Flag
from threading import Lock, Thread
from time import monotonic

from gemma_serve.adapters.checkpoint import read_checkpoint, shards_of_index
from gemma_serve.adapters.checksums import FileState, Manifest, read_manifest, write_manifest
from gemma_serve.adapters.hub.access import Repository
from gemma_serve.adapters.hub.cache import cached_repo, forget_file, remember_revision
from gemma_serve.adapters.hub.client import download_timeout_s, is_offline, set_up_for_downloads
from gemma_serve.adapters.hub.errors import Asked, offline_missing, problem_for, stalled
from gemma_serve.adapters.hub.transfer import (
    CancelledError,
    Reporting,
    begun_bytes,
    fetch_to_cache,
    fetch_to_folder,
    only_writer,
)
from gemma_serve.engine.inbox import Inbox
from gemma_serve.errors import GemmaServeError, Problem, Stopped, UsageError
from gemma_serve.planning.model.repo_files import (
    RepoFile,
    files_to_serve,
    with_shards_of_index,
)
from gemma_serve.usecases.access import AccessReport, check_access
from gemma_serve.usecases.events import (
    CheckingFiles,
    DownloadBegan,
    DownloadEnded,
    DownloadProgress,
    FileDamaged,
    Noticed,
    OnEvent,
)
from gemma_serve.usecases.local_files import (
    LocalFiles,
    cached_bytes,
    check_files,
    find_cached,
    problems_of_cached,
)
from gemma_serve.usecases.model_facts import as_folder

_TICK_S = 0.2
# Files at a time. One connection seldom fills a fast line.
_AT_ONCE = 4
# Over which the rate is taken.
_WINDOW_S = 10.0


@dataclass(frozen=True)
class DownloadRequest:
    """What to bring and where to.

    `to` is a plain folder, None for the local cache at `cache_dir` (None for the Hub client's
    own). With `refresh` the Hub is asked what `revision` is by now; without, what is here and
    whole is taken as it is.
    """

    model: str
    revision: str | None = None
    cache_dir: Path | None = None
    to: Path | None = None
    refresh: bool = True


@dataclass(frozen=True)
class DownloadResult:
    """A model's files on this disk, all whole. `fetched_bytes` came over the network just now.

    `commit` is None for a folder that did not come from the Hub. `damaged` were here, were not
    right, and were fetched again.
    """

    model: str
    folder: Path
    commit: str | None
    files: tuple[RepoFile, ...] = ()
    fetched_bytes: int = 0
    duration_s: float = 0.0
    damaged: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """All files together."""
        return sum(file.size_bytes for file in self.files)


def download(
    request: DownloadRequest, *, on_event: OnEvent, access: AccessReport | None = None
) -> DownloadResult:
    """Make sure that every file that vLLM needs is on this disk and is right.

    What is missing or damaged is fetched, from where it broke off. After an interruption, all
    that came is kept for the next time. A folder is only compared with its manifest. `access` is
    what the Hub said a moment ago, where somebody asked.

    Raises:
        GemmaServeError: it can't be had, with every reason that is known.
        Stopped: SIGINT, SIGTERM or SIGHUP came.
    """
    set_up_for_downloads()
    try:
        with Inbox() as inbox:
            return _Download(request, inbox, on_event).run(access)
    except OSError as error:
        raise GemmaServeError.of([problem_for(error, Asked(request.model))]) from error


@dataclass(frozen=True)
class _Ways:
    """How files get to one place: `begun` is how many bytes of some are left of an earlier try."""

    fetch: Callable[[RepoFile, Reporting], None]
    forget: Callable[[FileState], None]
    begun: Callable[[Sequence[RepoFile]], int]


class _Download:
    """One run, as the main loop sees it; the reading and fetching is done in threads."""

    def __init__(self, request: DownloadRequest, inbox: Inbox, on_event: OnEvent) -> None:
        self.request = request
        self.inbox = inbox
        self.on_event = on_event
        self.begun = monotonic()
        self.cancelled = Flag()
        self.damaged: list[str] = []
        self.has_token = False

    def run(self, access: AccessReport | None) -> DownloadResult:
        request = self.request
        folder = as_folder(request.model)
        if folder is not None:
            return self._of_folder(folder)
        here = None
        if request.to is None:
            here = find_cached(request.model, request.revision, request.cache_dir)
        if is_offline():
            return self._offline(here)
        if here is not None and not request.refresh and self._is_right(here):
            return self._result(here.folder, here.commit, here.listing)
        report = access or self._ask()
        return self._by_report(report, here)

    def _offline(self, here: LocalFiles | None) -> DownloadResult:
        """Make do with the cache, also where it is to be copied to a folder."""
        request = self.request
        if request.to is None:
            return self._as_it_is(here, complete=False)
        cached = find_cached(request.model, request.revision, request.cache_dir)
        if cached is None or cached.commit is None:
            return self._as_it_is(None, complete=False)
        listed = Repository(
            request.model, cached.commit, gated=False, private=False, files=cached.listing
        )
        return self._alone_into(request.to, listed)

    def _alone_into(self, folder: Path, repository: Repository) -> DownloadResult:
        with only_writer(folder) as alone:
            if not alone:
                raise _busy(folder)
            return self._into_folder(repository, folder)

    def _ask(self) -> AccessReport:
        request = self.request
        return self.inbox.during(
            lambda: check_access(
                request.model, request.revision, cache_dir=request.cache_dir, to=request.to
            ),
            self._heed_signals,
            _TICK_S,
        )

    def _by_report(self, report: AccessReport, here: LocalFiles | None) -> DownloadResult:
        if not report.ok:
            raise GemmaServeError.of([p for p in report.problems if p.blocking])
        for problem in report.problems:
            self.on_event(Noticed(problem))
        self.has_token = report.token is not None and report.token.is_sent
        if report.repository is None or (here is not None and report.problems):
            # What is here can be served, and what little it may lack can't be had now.
            return self._as_it_is(here, complete=False)
        if self.request.to is None:
            return self._into_cache(report.repository)
        return self._alone_into(self.request.to, report.repository)

    def _of_folder(self, folder: Path) -> DownloadResult:
        """A folder that `download --to` made is compared with what was noted then."""
        manifest = read_manifest(folder)
        if manifest is None:
            return self._result(folder, None, ())
        here = LocalFiles(folder, manifest.commit, manifest)
        if not here.is_known_whole:
            self._refuse_damage(folder, self._check(folder, manifest.listing, manifest))
            write_manifest(folder, manifest.model, manifest.commit, manifest.listing)
        return self._result(folder, manifest.commit, manifest.listing)

    def _as_it_is(self, here: LocalFiles | None, *, complete: bool) -> DownloadResult:
        """What the cache holds, where the Hub can't be asked: right or refused."""
        if here is None:
            request = self.request
            raise GemmaServeError.of(
                [
                    offline_missing(request.model),
                    *problems_of_cached(request.model, request.revision, request.cache_dir),
                ]
            )
        if not self._is_right(here):
            listing = here.listing
            self._refuse_damage(here.folder, self._check(here.folder, listing, here.manifest))
            write_manifest(
                here.folder, self.request.model, here.folder.name, listing, complete=complete
            )
        return self._result(here.folder, here.commit, here.listing)

    def _is_right(self, here: LocalFiles) -> bool:
        """Whether all that was noted is there; what changed is read again."""
        if here.is_known_whole:
            return True
        manifest = here.manifest
        if manifest is None or not manifest.complete:
            return False
        states = self._check(here.folder, manifest.listing, manifest)
        if any(state.state != "whole" for state in states):
            return False
        write_manifest(here.folder, manifest.model, manifest.commit, manifest.listing)
        return True

    def _refuse_damage(self, folder: Path, states: Sequence[FileState]) -> None:
        bad = [state for state in states if state.state != "whole"]
        if bad:
            raise GemmaServeError.of([_damage(folder, state, self.request.model) for state in bad])

    def _into_cache(self, repository: Repository) -> DownloadResult:
        repo = cached_repo(repository.model, self.request.cache_dir)
        snapshot = repo.snapshot(repository.commit)

        def fetch(file: RepoFile, reporting: Reporting) -> None:
            fetch_to_cache(repo, repository.commit, file, reporting)

        def forget(state: FileState) -> None:
            forget_file(snapshot, state.file.name)

        def begun(files: Sequence[RepoFile]) -> int:
            cache_dir = self.request.cache_dir
            return sum(cached_bytes(repo.model, snapshot.name, files, cache_dir).values())

        result = self._complete(repository, snapshot, _Ways(fetch, forget, begun))
        remember_revision(repo, self.request.revision, repository.commit)
        return result

    def _into_folder(self, repository: Repository, folder: Path) -> DownloadResult:
        former = read_manifest(folder)
        if former is not None and former.model != repository.model:
            raise UsageError(
                f"{folder} holds {former.model}; a new or an empty folder is wanted",
                code="download.other_model",
                hint=f"give another one: `--to {folder.name}-{repository.model.split('/')[-1]}`",
            )
        if former is not None:
            # An index that the repository no longer has would be taken for this commit's.
            for name in former.files.keys() - {file.name for file in repository.files}:
                (folder / name).unlink(missing_ok=True)
        cached = cached_repo(repository.model, self.request.cache_dir).snapshot(repository.commit)

        def fetch(file: RepoFile, reporting: Reporting) -> None:
            there = cached / file.name
            fetch_to_folder(
                repository.model,
                repository.commit,
                file,
                folder,
                reporting,
                cached=there if there.is_file() else None,
            )

        def forget(state: FileState) -> None:
            (folder / state.file.name).unlink(missing_ok=True)

        def begun(files: Sequence[RepoFile]) -> int:
            return sum(begun_bytes(folder, file) for file in files)

        result = self._complete(repository, folder, _Ways(fetch, forget, begun))
        if former is not None:
            # Of an older commit: vLLM would load a weight file that is no longer of the model.
            for name in former.files.keys() - {file.name for file in result.files}:
                (folder / name).unlink(missing_ok=True)
        return result

    def _complete(
        self,
        repository: Repository,
        folder: Path,
        ways: _Ways,
    ) -> DownloadResult:
        """Fetch what is missing or damaged in `folder`, and show that it is a whole checkpoint."""
        wanted = files_to_serve(repository.files)
        manifest = read_manifest(folder)
        states = self._check(folder, wanted, manifest)
        for state in states:
            if state.state == "damaged":
                self.damaged.append(state.file.name)
                self.on_event(FileDamaged(state.file.name, state.found))
                ways.forget(state)
        missing = [state.file for state in states if state.state != "whole"]
        fetched = self._fetch(repository, folder, wanted, missing, ways)
        named = with_shards_of_index(wanted, repository.files, shards_of_index(folder))
        late = [file for file in named if file not in wanted]
        if late:
            fetched += self._fetch(repository, folder, named, late, ways)
        problems = [p for p in read_checkpoint(folder).problems if p.blocking]
        if problems:
            raise GemmaServeError.of(problems)
        write_manifest(folder, repository.model, repository.commit, named)
        result = self._result(folder, repository.commit, named, fetched)
        if missing or late:
            self.on_event(
                DownloadEnded(
                    repository.model,
                    repository.commit,
                    folder,
                    len(named),
                    result.total_bytes,
                    fetched,
                    result.duration_s,
                )
            )
        return result

    def _check(
        self, folder: Path, files: Sequence[RepoFile], manifest: Manifest | None
    ) -> tuple[FileState, ...]:
        """Compare files with their checksums, and show how far that is."""
        total = sum(file.size_bytes for file in files)
        read = _Sum()

        def on_bytes(count: int) -> None:
            if self.cancelled.is_set():
                raise CancelledError
            read.add(count)

        def look() -> None:
            self._heed_signals()
            if read.value:
                self.on_event(CheckingFiles(read.value, total))

        return self.inbox.during(
            lambda: check_files(folder, files, manifest, on_bytes), look, _TICK_S
        )

    def _fetch(
        self,
        repository: Repository,
        folder: Path,
        wanted: Sequence[RepoFile],
        missing: Sequence[RepoFile],
        ways: _Ways,
    ) -> int:
        """Fetch the `missing` files, several at once; how many bytes came."""
        if not missing:
            return 0
        transfers = _Transfers(wanted, missing, self.cancelled, self.inbox.wake)
        self.on_event(
            DownloadBegan(
                repository.model,
                repository.commit,
                folder,
                len(wanted),
                sum(file.size_bytes for file in wanted),
                sum(file.size_bytes for file in missing) - ways.begun(missing),
            )
        )
        transfers.start(ways.fetch)
        while not transfers.ended:
            self._heed_signals()
            self.on_event(transfers.progress())
            if transfers.is_stalled():
                self.cancelled.set()
                raise GemmaServeError.of([stalled(transfers.still_s())])
            self.inbox.wait(_TICK_S)
        self._heed_signals()
        if transfers.error is not None:
            self.cancelled.set()
            asked = Asked(repository.model, self.request.revision, has_token=self.has_token)
            raise GemmaServeError.of([problem_for(transfers.error, asked)]) from transfers.error
        self.on_event(transfers.progress())
        return transfers.fetched_bytes

    def _heed_signals(self) -> None:
        if self.inbox.signals:
            self.cancelled.set()
            raise Stopped(self.inbox.signals[0])

    def _result(
        self,
        folder: Path,
        commit: str | None,
        files: Sequence[RepoFile],
        fetched_bytes: int = 0,
    ) -> DownloadResult:
        return DownloadResult(
            self.request.model,
            folder,
            commit,
            tuple(files),
            fetched_bytes,
            monotonic() - self.begun,
            tuple(self.damaged),
        )


class _Sum:
    """A number that several threads add to."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.value += count


class _Transfers:
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
        self._has_bytes = False
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
                self._has_bytes = self._has_bytes or size > self._resumed[name]
            self._sizes[name] = size

    def _live(self) -> None:
        self._alive_at = monotonic()

    def _finish(self, file: RepoFile) -> None:
        with self._lock:
            self._sizes[file.name] = file.size_bytes
            self._finished.add(file.name)
            self._alive_at = monotonic()
            self._has_bytes = True
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

    def still_s(self) -> float:
        """For how long nothing has moved."""
        return monotonic() - self._alive_at

    def is_stalled(self) -> bool:
        """Whether nothing has come for longer than any Hub takes to answer."""
        first, later = download_timeout_s()
        return self.still_s() > (later if self._has_bytes else first)

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


def _busy(folder: Path) -> GemmaServeError:
    return GemmaServeError(
        f"another download writes to {folder}",
        code="download.busy",
        hint="wait for it to end, or give another folder with `--to`",
    )


def _damage(folder: Path, state: FileState, model: str) -> Problem:
    """A file that is wrong, where nobody can fetch it again."""
    code = "model.weights_missing" if state.state == "missing" else "model.weights_broken"
    found = "is missing" if state.state == "missing" else f"is damaged: {state.found}"
    hint = "copy the folder again from where it was made"
    if as_folder(model) is None:
        hint = f"where the Hub can be reached, `gemma-serve download --model {model}` mends it"
    return Problem(code, f"{folder / state.file.name} {found}", hint=hint)
