"""Bring a model's files to this disk, whole and as the Hub promises them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event as Flag
from time import monotonic

from gemma_serve.adapters.checkpoint import shards_of_index
from gemma_serve.adapters.checksums import (
    CheckedFile,
    FileState,
    Manifest,
    read_manifest,
    stamp,
    write_manifest,
)
from gemma_serve.adapters.hub.access import Repository
from gemma_serve.adapters.hub.cache import cached_repo, forget_link, remember_revision
from gemma_serve.adapters.hub.client import (
    ask_side_by_side,
    cache_folder,
    is_offline,
    set_up_for_downloads,
)
from gemma_serve.adapters.hub.errors import (
    Asked,
    http_status,
    offline_missing,
    problem_for,
    stalled,
)
from gemma_serve.adapters.hub.transfer import (
    CancelledError,
    Reporting,
    ask_for_one_byte,
    fetch_to_cache,
    fetch_to_folder,
    only_writer,
)
from gemma_serve.engine.inbox import Inbox
from gemma_serve.errors import GemmaServeError, Problem, Stopped
from gemma_serve.planning.model.repo_files import RepoFile, files_to_serve, with_shards_of_index
from gemma_serve.usecases.access import (
    AccessReport,
    check_access,
    disk_problem,
    disk_space,
    is_filled_with,
    refuse_others,
    refuse_usage,
)
from gemma_serve.usecases.events import (
    CheckingFiles,
    DownloadBegan,
    DownloadEnded,
    FileDamaged,
    Noticed,
    OnEvent,
)
from gemma_serve.usecases.known_failures import named_as_known
from gemma_serve.usecases.local_files import (
    LocalFiles,
    broken_off_problem,
    cached_bytes,
    check_files,
    checkpoint_problems,
    code_of_damaged,
    code_of_missing,
    find_cached,
    folder_bytes,
    problems_of_cached,
    revision_to_ask,
)
from gemma_serve.usecases.model_facts import as_folder
from gemma_serve.usecases.transfers import Sum, Transfers

_TICK_S = 0.2
# For one more question, once nothing has come for long.
_WHY_S = 2.0


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
    with named_as_known():
        try:
            with Inbox() as inbox:
                return _Download(request, inbox, on_event).run(access)
        except OSError as error:
            raise GemmaServeError.of([problem_for(error, Asked(request.model))]) from error


@dataclass(frozen=True)
class _Place:
    """Where a repository's files are put, and how; `here` is how much of each is there by size."""

    repository: Repository
    folder: Path
    fetch: Callable[[RepoFile, Reporting], None]
    here: Callable[[Sequence[RepoFile]], dict[str, int]]


class _Download:
    """One run, as the main loop sees it; the reading and fetching is done in threads."""

    def __init__(self, request: DownloadRequest, inbox: Inbox, on_event: OnEvent) -> None:
        self.request = request
        self.inbox = inbox
        self.on_event = on_event
        self.begun = monotonic()
        self.cancelled = Flag()
        self.damaged: list[str] = []
        self.checked: dict[str, CheckedFile] = {}
        self.has_token = False
        self.hub_said_no = False

    def run(self, access: AccessReport | None) -> DownloadResult:
        request = self.request
        folder = as_folder(request.model)
        if request.to is not None:
            refuse_usage(request.model, folder, request.to)
        if folder is not None:
            return self._of_folder(folder)
        here = None
        if request.to is None:
            here = find_cached(request.model, request.revision, request.cache_dir)
        if is_offline():
            return self._offline(here)
        if here is not None and not request.refresh and self._is_right(here):
            return self._result(here.folder, here.commit, here.listing)
        if access is None:
            access = self._ask(here)
            for problem in access.problems:
                if not problem.blocking:
                    self.on_event(Noticed(problem))
        return self._by_report(access, here)

    def _offline(self, here: LocalFiles | None) -> DownloadResult:
        """Make do with the cache, also where it is to be copied to a folder."""
        request = self.request
        if request.to is None:
            return self._as_it_is(here)
        if is_filled_with(request.to, request.model, request.revision, request.cache_dir):
            # It may be newer than the cache, and is compared with its own manifest.
            return self._of_folder(request.to)
        cached = find_cached(request.model, request.revision, request.cache_dir)
        if cached is None or cached.commit is None:
            return self._as_it_is(None)
        listed = Repository(
            request.model, cached.commit, gated=False, private=False, files=cached.listing
        )
        return self._alone_into(request.to, listed)

    def _ask(self, here: LocalFiles | None) -> AccessReport:
        request = self.request
        revision = request.revision
        if request.to is None and not request.refresh:
            # What is cached is taken, and only what it lacks is asked for.
            revision = revision_to_ask(request.model, revision, request.cache_dir, here)
        return self.inbox.during(
            lambda: check_access(
                request.model, revision, cache_dir=request.cache_dir, to=request.to
            ),
            self._heed_signals,
            _TICK_S,
        )

    def _by_report(self, report: AccessReport, here: LocalFiles | None) -> DownloadResult:
        repository = report.repository
        is_newer = repository is not None and here is not None and repository.commit != here.commit
        if report.problems and is_newer:
            # What is here could be served, but a newer one was asked for.
            raise GemmaServeError.of([replace(p, blocking=True) for p in report.problems])
        if not report.ok:
            blocking = [problem for problem in report.problems if problem.blocking]
            return self._without_the_hub(blocking)
        self.hub_said_no = bool(report.problems)
        self.has_token = report.token is not None and report.token.is_sent
        if self.request.to is not None and (repository is None or report.problems):
            return self._offline(None)
        if repository is None or (here is not None and report.problems):
            # What is here can be served, and what little it may lack can't be had now.
            return self._as_it_is(here)
        if self.request.to is None:
            return self._into_cache(repository)
        return self._alone_into(self.request.to, repository)

    def _without_the_hub(self, problems: Sequence[Problem]) -> DownloadResult:
        """A folder that is filled already stays as it is, where the Hub says no to more."""
        request = self.request
        if request.to is None or not is_filled_with(
            request.to, request.model, request.revision, request.cache_dir
        ):
            raise GemmaServeError.of(problems)
        for problem in problems:
            self.on_event(Noticed(replace(problem, blocking=False)))
        return self._of_folder(request.to)

    def _of_folder(self, folder: Path) -> DownloadResult:
        """A folder that `download --to` made is compared with what was noted then."""
        folder = folder.absolute()
        manifest = read_manifest(folder)
        if manifest is None:
            wrong = checkpoint_problems(folder)
            if wrong:
                raise GemmaServeError.of(wrong)
            return self._result(folder, None, ())
        if manifest.broken_off:
            raise GemmaServeError.of([broken_off_problem(folder, manifest)])
        here = LocalFiles(folder, manifest.commit, manifest)
        if not here.is_known_whole:
            self._note(folder, manifest, self._refuse_damage(here))
        return self._result(folder, manifest.commit, manifest.listing)

    def _as_it_is(self, here: LocalFiles | None) -> DownloadResult:
        """What the cache holds, where the Hub can't be asked: right or refused."""
        if here is None:
            raise GemmaServeError.of(self._missing())
        if not self._is_right(here):
            states = self._refuse_damage(here)
            # Nobody could say whether these are all the files.
            noted = Manifest(self.request.model, here.folder.name, complete=False)
            self._note(here.folder, noted, states)
        return self._result(here.folder, here.commit, here.listing)

    def _missing(self) -> list[Problem]:
        request = self.request
        wrong = problems_of_cached(request.model, request.revision, request.cache_dir)
        return [offline_missing(request.model, cache_folder(request.cache_dir)), *wrong]

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
        self._note(here.folder, manifest, states)
        return True

    def _refuse_damage(self, here: LocalFiles) -> tuple[FileState, ...]:
        states = self._check(here.folder, here.listing, here.manifest)
        bad = [state for state in states if state.state != "whole"]
        if bad:
            model = self.request.model
            said_no = self.hub_said_no
            raise GemmaServeError.of([_damage(here.folder, s, model, said_no) for s in bad])
        return states

    def _note(self, folder: Path, manifest: Manifest, states: Sequence[FileState]) -> None:
        """Keep what was found of files that are all whole."""
        checked = {state.file.name: state.checked for state in states if state.checked is not None}
        write_manifest(folder, replace(manifest, files=checked))

    def _into_cache(self, repository: Repository) -> DownloadResult:
        repo = cached_repo(repository.model, self.request.cache_dir)
        snapshot = repo.snapshot(repository.commit)

        def fetch(file: RepoFile, reporting: Reporting) -> None:
            fetch_to_cache(repo, repository.commit, file, reporting)

        def here(files: Sequence[RepoFile]) -> dict[str, int]:
            return cached_bytes(repo.model, snapshot.name, files, self.request.cache_dir)

        result = self._complete(_Place(repository, snapshot, fetch, here))
        remember_revision(repo, self.request.revision, repository.commit)
        return result

    def _alone_into(self, folder: Path, repository: Repository) -> DownloadResult:
        refuse_others(folder, repository.model, repository.files)
        former = read_manifest(folder)
        files = files_to_serve(repository.files)
        problem = disk_problem(disk_space(folder, files, folder_bytes(folder, files)))
        if problem is not None:
            raise GemmaServeError.of([problem])
        with only_writer(folder) as alone:
            if not alone:
                raise _busy(folder)
            return self._into_folder(repository, folder, former)

    def _into_folder(
        self, repository: Repository, folder: Path, former: Manifest | None
    ) -> DownloadResult:
        before = {} if former is None else former.files
        # So that it is known as ours, and as half a one, should this break off.
        coming = {
            f.name: CheckedFile(f.size_bytes, f.checksum) for f in files_to_serve(repository.files)
        }
        mark = Manifest(repository.model, repository.commit, {**coming, **before}, broken_off=True)
        write_manifest(folder, mark)
        # An index that the repository no longer has would be taken for this commit's.
        self._remove(folder, before.keys() - {file.name for file in repository.files})
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

        def here(files: Sequence[RepoFile]) -> dict[str, int]:
            return folder_bytes(folder, files)

        result = self._complete(_Place(repository, folder, fetch, here))
        # Of an older commit: vLLM would load a weight file that is no longer of the model.
        self._remove(folder, before.keys() - {file.name for file in result.files})
        return result

    def _remove(self, folder: Path, names: Iterable[str]) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    def _complete(self, place: _Place) -> DownloadResult:
        """Fetch what is missing or damaged, and show that it is a whole checkpoint."""
        repository, folder = place.repository, place.folder
        wanted = files_to_serve(repository.files)
        states = self._check(folder, wanted, read_manifest(folder))
        for state in states:
            if state.checked is not None:
                self.checked[state.file.name] = state.checked
            if state.state == "damaged":
                self.damaged.append(state.file.name)
                self.on_event(FileDamaged(state.file.name, state.found))
                forget_link(folder, state.file.name)
        missing = [state.file for state in states if state.state != "whole"]
        fetched = self._fetch(place, wanted, missing)
        named = with_shards_of_index(wanted, repository.files, shards_of_index(folder))
        late = [file for file in named if file not in wanted]
        fetched += self._fetch(place, named, late)
        problems = checkpoint_problems(folder)
        if problems:
            raise GemmaServeError.of(problems)
        files = {file.name: self.checked[file.name] for file in named}
        write_manifest(folder, Manifest(repository.model, repository.commit, files))
        result = self._result(folder, repository.commit, named, fetched)
        if missing or late:
            self.on_event(_ended(result, repository))
        return result

    def _check(
        self, folder: Path, files: Sequence[RepoFile], manifest: Manifest | None
    ) -> tuple[FileState, ...]:
        """Compare files with their checksums, and show how far that is."""
        total = sum(file.size_bytes for file in files)
        read = Sum()

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

    def _fetch(self, place: _Place, wanted: Sequence[RepoFile], missing: Sequence[RepoFile]) -> int:
        """Fetch the `missing` files, several at once; how many bytes came."""
        if not missing:
            return 0

        def fetch(file: RepoFile, reporting: Reporting) -> None:
            place.fetch(file, reporting)
            self.checked[file.name] = stamp(place.folder / file.name, file.checksum)

        transfers = Transfers(wanted, missing, self.cancelled, self.inbox.wake)
        self.on_event(_began(place, wanted, missing, self.damaged))
        transfers.start(fetch)
        while not transfers.ended:
            self._heed_signals()
            self.on_event(transfers.progress())
            if transfers.is_stalled():
                self.cancelled.set()
                raise GemmaServeError.of([self._why_nothing_comes(place.repository, transfers)])
            self.inbox.wait(_TICK_S)
        self._heed_signals()
        if transfers.error is not None:
            self.cancelled.set()
            found = problem_for(transfers.error, self._asked())
            raise GemmaServeError.of([found]) from transfers.error
        self.on_event(transfers.progress())
        return transfers.fetched_bytes

    def _why_nothing_comes(self, repository: Repository, transfers: Transfers) -> Problem:
        still_s = transfers.still_s()
        ask = partial(ask_for_one_byte, repository.model, repository.commit)
        questions = {f.name: partial(ask, f, _WHY_S) for f in transfers.in_flight[:1]}
        for answer in ask_side_by_side(questions, _WHY_S).values():
            if isinstance(answer, Exception) and http_status(answer) is not None:
                return problem_for(answer, self._asked())
        return stalled(still_s)

    def _asked(self) -> Asked:
        return Asked(self.request.model, self.request.revision, has_token=self.has_token)

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


def _began(
    place: _Place,
    wanted: Sequence[RepoFile],
    missing: Sequence[RepoFile],
    damaged: Collection[str],
) -> DownloadBegan:
    here = place.here([file for file in missing if file.name not in damaged])
    yet_to_come = sum(file.size_bytes for file in missing) - sum(here.values())
    return DownloadBegan(
        place.repository.model,
        place.repository.commit,
        place.folder,
        len(wanted),
        sum(file.size_bytes for file in wanted),
        yet_to_come,
    )


def _ended(result: DownloadResult, repository: Repository) -> DownloadEnded:
    return DownloadEnded(
        repository.model,
        repository.commit,
        result.folder,
        len(result.files),
        result.total_bytes,
        result.fetched_bytes,
        result.duration_s,
    )


def _busy(folder: Path) -> GemmaServeError:
    return GemmaServeError(
        f"another download writes to {folder}",
        code="download.busy",
        hint="wait for it to end, or give another folder with `--to`",
    )


def _damage(folder: Path, state: FileState, model: str, hub_said_no: bool) -> Problem:
    """A file that is wrong, where nobody can fetch it again."""
    name, missing = state.file.name, state.state == "missing"
    code = code_of_missing(name) if missing else code_of_damaged(name)
    found = "is missing" if missing else f"is damaged: {state.found}"
    hint = "copy the folder again from where it was made"
    if as_folder(model) is None:
        hint = f"where the Hub can be reached, `gemma-serve download --model {model}` mends it"
    if hub_said_no:
        hint = "the Hub would send it again: first mend what it said, above, then run this again"
    return Problem(code, f"{folder / name} {found}", hint=hint)
