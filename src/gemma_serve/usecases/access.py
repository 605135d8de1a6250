"""May this account download the model, how much is that, and is there room for it?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from gemma_serve.adapters import host
from gemma_serve.adapters.hub.access import Repository, Token, ask_access
from gemma_serve.adapters.hub.client import cache_folder, endpoint, is_offline
from gemma_serve.adapters.hub.errors import offline_missing
from gemma_serve.adapters.secrets import without_secrets
from gemma_serve.errors import Problem
from gemma_serve.planning.model.repo_files import RepoFile, files_to_serve
from gemma_serve.planning.sizes import file_size
from gemma_serve.usecases.local_files import (
    LocalFiles,
    cached_bytes,
    find_cached,
    problems_of_cached,
)
from gemma_serve.usecases.model_facts import as_folder, with_suggestion

# Logs, compiled kernels and others' files want room as well.
_MARGIN = 0.05
_LEAST_MARGIN_BYTES = 256 * 2**20


@dataclass(frozen=True)
class DiskSpace:
    """The room where the files will be, and what of it the download takes, in bytes.

    `free_bytes` is None where the system does not say. `needed_bytes` is what is missing and a
    margin.
    """

    folder: Path
    free_bytes: int | None
    missing_bytes: int
    margin_bytes: int

    @property
    def needed_bytes(self) -> int:
        """Nothing, where nothing is missing."""
        return self.missing_bytes + self.margin_bytes if self.missing_bytes else 0


@dataclass(frozen=True)
class AccessReport:
    """What stands between here and the model's files.

    `files` are those that vLLM needs, `here` how many bytes of each are on the disk already.
    `cached` is the model in the local cache, if it could be served from there.
    """

    model: str
    revision: str | None
    endpoint: str
    offline: bool = False
    is_folder: bool = False
    reached: bool | None = None
    token: Token | None = None
    repository: Repository | None = None
    allowed: bool | None = None
    files: tuple[RepoFile, ...] = ()
    here: dict[str, int] | None = None
    cached: LocalFiles | None = None
    disk: DiskSpace | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the model can be had."""
        return not any(problem.blocking for problem in self.problems)

    @property
    def total_bytes(self) -> int:
        """All of `files`."""
        return sum(file.size_bytes for file in self.files)

    @property
    def here_bytes(self) -> int:
        """What of `files` is on the disk."""
        return sum((self.here or {}).values())


def check_access(
    model: str,
    revision: str | None = None,
    *,
    cache_dir: Path | None = None,
    to: Path | None = None,
) -> AccessReport:
    """Ask all that decides whether the model can be downloaded, each answer a problem of its own.

    A folder needs nobody. Offline, the cache decides. Where the cache could serve the model, what
    the Hub says against it is a warning. `to` is the folder to download into, if not the cache.
    """
    where = without_secrets(endpoint())
    if as_folder(model) is not None:
        return AccessReport(model, revision, where, is_folder=True)
    cached = find_cached(model, revision, cache_dir)
    report = AccessReport(model, revision, where, offline=is_offline(), cached=cached)
    if report.offline:
        if cached is not None:
            return report
        wrong = problems_of_cached(model, revision, cache_dir)
        return replace(report, problems=(offline_missing(model), *wrong))
    answer = ask_access(model, revision)
    problems = with_suggestion(model, answer.problems)
    report = replace(
        report,
        reached=answer.reached,
        token=answer.token,
        repository=answer.repository,
        allowed=answer.allowed,
    )
    if answer.repository is not None:
        report = _with_files(report, answer.repository, cache_dir, to)
    disk = None if report.disk is None else disk_problem(report.disk)
    soft = cached is not None and to is None
    told = [replace(p, blocking=p.blocking and not soft) for p in problems]
    return replace(report, problems=(*told, *([disk] if disk else [])))


def _with_files(
    report: AccessReport, repository: Repository, cache_dir: Path | None, to: Path | None
) -> AccessReport:
    files = files_to_serve(repository.files)
    here = cached_bytes(report.model, repository.commit, files, cache_dir)
    if to is None:
        missing = sum(file.size_bytes - here[file.name] for file in files)
        return replace(
            report, files=files, here=here, disk=_space(cache_folder(cache_dir), missing)
        )
    there = {f.name: _size_in(to, f) for f in files}
    missing = sum(file.size_bytes - there[file.name] for file in files)
    return replace(report, files=files, here=there, disk=_space(to, missing))


def _size_in(folder: Path, file: RepoFile) -> int:
    try:
        size = (folder / file.name).stat().st_size
    except OSError:
        return 0
    return size if size == file.size_bytes else 0


def _space(folder: Path, missing_bytes: int) -> DiskSpace:
    margin = max(_LEAST_MARGIN_BYTES, int(missing_bytes * _MARGIN))
    return DiskSpace(folder, host.free_disk_bytes(folder), missing_bytes, margin)


def disk_problem(disk: DiskSpace) -> Problem | None:
    """Why the files will not fit on the disk, or None if they will."""
    if disk.free_bytes is None or disk.free_bytes >= disk.needed_bytes:
        return None
    missing, margin = file_size(disk.missing_bytes), file_size(disk.margin_bytes)
    return Problem(
        "hub.disk_full",
        f"{missing} are to be downloaded and {margin} more kept free, but {disk.folder} has "
        f"{file_size(disk.free_bytes)}",
        hint="free some space there, or put the files on another disk with HF_HOME, "
        "`--download-dir` or `--to`",
    )
