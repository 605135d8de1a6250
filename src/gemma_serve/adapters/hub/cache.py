"""The Hub client's local cache: which snapshots it holds, and where their files lie.

Its layout is the client's: `models--ORG--NAME/` with `refs/REVISION` (a commit), `blobs/CHECKSUM`,
and `snapshots/COMMIT/`, whose files are links to blobs.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from gemma_serve.adapters.checksums import is_snapshot
from gemma_serve.adapters.hub.client import cache_folder
from gemma_serve.adapters.whole_files import write_whole
from gemma_serve.planning.model.repo_files import RepoFile

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class CachedRepo:
    """The folder of one model in the local cache; it need not exist."""

    model: str
    folder: Path

    def snapshot(self, commit: str) -> Path:
        """The folder of the files at `commit`."""
        return self.folder / "snapshots" / commit

    def blob(self, checksum: str) -> Path:
        """The file with the content of this checksum."""
        return self.folder / "blobs" / checksum

    def lock(self, checksum: str) -> Path:
        """The file that the client locks while it writes a blob."""
        return self.folder.parent / ".locks" / self.folder.name / f"{checksum}.lock"

    def commit(self, revision: str | None) -> str | None:
        """The commit that `revision` was when it was last asked for; None where it never was."""
        revision = revision or "main"
        if _COMMIT.fullmatch(revision):
            return revision
        try:
            found = (self.folder / "refs" / revision).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return None
        return found if _COMMIT.fullmatch(found) else None


def cached_repo(model: str, cache_dir: Path | None = None) -> CachedRepo:
    """Where the cache keeps, or would keep, the model."""
    return CachedRepo(model, cache_folder(cache_dir) / f"models--{model.replace('/', '--')}")


def cached_snapshot(model: str, revision: str | None, cache_dir: Path | None = None) -> Path | None:
    """The folder of the local cache that holds the model's config.json, if any does."""
    repo = cached_repo(model, cache_dir)
    commit = repo.commit(revision)
    if commit is None:
        return None
    try:
        return repo.snapshot(commit) if (repo.snapshot(commit) / "config.json").is_file() else None
    except OSError:
        return None  # a cache that this account may not look into


def remember_revision(repo: CachedRepo, revision: str | None, commit: str) -> None:
    """Note that `revision` is `commit`, as the client does, so that it is found without the Hub.

    Written whole, and only when every file is there: until then the former commit stays good.
    """
    revision = revision or "main"
    if revision == commit or repo.commit(revision) == commit:
        return
    ref = repo.folder / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, a file that a kill leaves would be a revision of its own.
    temporary = repo.folder / f".ref-{uuid4().hex}"
    write_whole(temporary, commit)
    temporary.replace(ref)


def promised_checksum(file: Path) -> str | None:
    """What the cache says is in a file of a snapshot: its blob's name; None where it says nothing.

    Only the first link is followed: a blob may itself be a link into a store that is shared.
    """
    try:
        name = file.readlink().name
    except OSError:
        return None
    return name if _CHECKSUM.fullmatch(name) else None


def files_of_snapshot(snapshot: Path) -> tuple[RepoFile, ...]:
    """The files in a snapshot with what their blobs' names promise. Broken links are left out."""
    found = []
    for path in sorted(snapshot.rglob("*")):
        if path.is_file():
            name = path.relative_to(snapshot).as_posix()
            found.append(RepoFile(name, path.stat().st_size, promised_checksum(path)))
    return tuple(found)


def forget_link(snapshot: Path, name: str) -> None:
    """Take a damaged file out of the snapshot; the blob stays, which others may be mending."""
    (snapshot / name).unlink(missing_ok=True)


def forget_file(snapshot: Path, name: str) -> None:
    """Remove a damaged file with its blob, also where that is a link into a shared store."""
    root = snapshot.parents[2] if is_snapshot(snapshot) else snapshot
    path = snapshot / name
    while path.is_relative_to(root):
        target = path.parent / path.readlink() if path.is_symlink() else None
        path.unlink(missing_ok=True)
        if target is None:
            return
        path = Path(os.path.normpath(target))
