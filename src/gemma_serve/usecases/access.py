"""May this account download the model, how much is that, and is there room for it?"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_serve.adapters import host
from gemma_serve.adapters.checksums import read_manifest
from gemma_serve.adapters.hub.access import Repository, Token, ask_access
from gemma_serve.adapters.hub.cache import cached_repo
from gemma_serve.adapters.hub.client import cache_folder, endpoint, is_offline
from gemma_serve.adapters.hub.errors import offline_missing
from gemma_serve.adapters.secrets import without_secrets
from gemma_serve.errors import Problem, UsageError
from gemma_serve.planning.model.repo_files import RepoFile, files_to_serve
from gemma_serve.planning.sizes import file_size
from gemma_serve.usecases.known_failures import with_titles
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

    Raises:
        UsageError: `to` is no place for this model.
    """
    folder = as_folder(model)
    if to is not None:
        refuse_usage(model, folder, to)
    report = _ask(model, folder, revision, cache_dir, to)
    return replace(report, problems=with_titles(report.problems))


def _ask(
    model: str, folder: Path | None, revision: str | None, cache_dir: Path | None, to: Path | None
) -> AccessReport:
    where = without_secrets(endpoint())
    if folder is not None:
        wrong = checkpoint_problems(folder)
        return AccessReport(model, revision, where, is_folder=True, problems=wrong)
    cached = find_cached(model, revision, cache_dir)
    report = AccessReport(model, revision, where, offline=is_offline(), cached=cached)
    if report.offline:
        return _offline(report, cache_dir, to)
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
        if to is not None:
            refuse_others(to, model, answer.repository.files)
        report = _with_files(report, answer.repository, cache_dir, to)
    disk = None if report.disk is None else disk_problem(report.disk)
    soft = cached is not None
    told = tuple(replace(p, blocking=not soft) for p in problems)
    if disk is not None:
        told += (replace(disk, blocking=not soft or to is not None),)
    return replace(report, problems=told)


def _offline(report: AccessReport, cache_dir: Path | None, to: Path | None) -> AccessReport:
    """What the cache allows, and whether there is room for a copy of it."""
    model, cached = report.model, report.cached
    if cached is None:
        if to is not None and is_filled_with(to, model, report.revision, cache_dir):
            return report
        wrong = problems_of_cached(model, report.revision, cache_dir)
        missing = offline_missing(model, cache_folder(cache_dir))
        return replace(report, problems=(missing, *wrong))
    if to is None or is_filled_with(to, model, report.revision, cache_dir):
        return report
    refuse_others(to, model, cached.listing)
    files = files_to_serve(cached.listing)
    disk = disk_space(to, files, folder_bytes(to, files))
    problem = disk_problem(disk)
    return replace(report, files=files, disk=disk, problems=(problem,) if problem else ())


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
        "disk-full",
        f"{missing} are to be downloaded and {margin} more kept free, but {disk.folder} has "
        f"{file_size(disk.free_bytes)}",
        hint="free some space there, or put the files on another disk with HF_HOME, "
        "`--download-dir` or `--to`",
    )


def is_filled_with(
    folder: Path, model: str, revision: str | None, cache_dir: Path | None = None
) -> bool:
    """Whether `download --to` has filled the folder with this model, at this revision if given."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.broken_off or manifest.model != model:
        return False
    return revision is None or manifest.commit == cached_repo(model, cache_dir).commit(revision)


def refuse_usage(model: str, folder: Path | None, to: Path) -> None:
    """What `--to` can't mean, for a model that is in `folder` already, or a file.

    Raises:
        UsageError: nothing was asked or touched.
    """
    if folder is not None:
        raise UsageError(
            f"{model} is on this machine already, in {folder}",
            code="usage",
            hint=f"copy that folder, or serve it with `--model {model}`",
        )
    if to.exists() and not to.is_dir():
        raise UsageError(
            f"{to} is a file, and a folder is wanted",
            code="usage",
            hint="give a new folder: `--to DIR`",
        )


def refuse_others(folder: Path, model: str, listing: Sequence[RepoFile]) -> None:
    """A folder with another model or with somebody's own files is no place for this one.

    Raises:
        UsageError: nothing was touched.
    """
    manifest = read_manifest(folder)
    if manifest is not None and manifest.model == model:
        return
    holds = manifest.model if manifest is not None else _stranger_in(folder, listing)
    if holds is not None:
        other = folder.with_name(f"{folder.name}-{model.split('/')[-1]}")
        raise UsageError(
            f"{folder} holds {holds}, which is not of {model}; a new or an empty folder is wanted",
            code="download.not_empty",
            hint=f"give another one: `--to {shlex.quote(str(other))}`",
        )


def _stranger_in(folder: Path, listing: Sequence[RepoFile]) -> str | None:
    """A file that the repository does not have like this; half files of ours are hidden ones."""
    if not folder.is_dir():
        return None
    sizes = {file.name: file.size_bytes for file in listing}
    folders = {file.name.split("/")[0] for file in listing if "/" in file.name}
    for path in sorted(folder.iterdir()):
        known = path.name in folders if path.is_dir() else _size(path) == sizes.get(path.name)
        if not known and not path.name.startswith("."):
            return path.name
    return None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
