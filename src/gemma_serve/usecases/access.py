"""May this account download the model, how much is that, and is there room for it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    checkpoint_problems,
    find_cached,
    folder_bytes,
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
    can_write: bool = True

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
    folder = as_folder(model)
    if folder is not None:
        wrong = checkpoint_problems(folder)
        return AccessReport(model, revision, where, is_folder=True, problems=wrong)
    cached = find_cached(model, revision, cache_dir)
    report = AccessReport(model, revision, where, offline=is_offline(), cached=cached)
    if report.offline:
        if cached is not None:
            return report
        wrong = problems_of_cached(model, revision, cache_dir)
        return replace(report, problems=(offline_missing(model, cache_folder(cache_dir)), *wrong))
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
    told = (*problems, *([disk] if disk else []))
    return replace(report, problems=tuple(replace(p, blocking=not soft) for p in told))


def _with_files(
    report: AccessReport, repository: Repository, cache_dir: Path | None, to: Path | None
) -> AccessReport:
    files = files_to_serve(repository.files)
    if to is None:
        here = cached_bytes(report.model, repository.commit, files, cache_dir)
        space = disk_space(cache_folder(cache_dir), files, here)
    else:
        here = folder_bytes(to, files)
        space = disk_space(to, files, here)
    return replace(report, files=files, here=here, disk=space)


def disk_space(folder: Path, files: Sequence[RepoFile], here: Mapping[str, int]) -> DiskSpace:
    """The room for what of `files` is not `here` yet, by size, in bytes."""
    missing = sum(file.size_bytes - here[file.name] for file in files)
    margin = max(_LEAST_MARGIN_BYTES, int(missing * _MARGIN))
    free = host.free_disk_bytes(folder)
    return DiskSpace(folder, free, missing, margin, can_write=host.can_write(folder))


def disk_problem(disk: DiskSpace) -> Problem | None:
    """Why the files can't be put there, or None if they can."""
    if not disk.missing_bytes:
        return None
    if not disk.can_write:
        return Problem(
            "hub.cache_unwritable",
            f"{file_size(disk.missing_bytes)} are to be downloaded, and this account can't write "
            f"to {disk.folder}",
            hint="name a folder of yours with HF_HOME, `--download-dir` or `--to`",
        )
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
