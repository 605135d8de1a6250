"""Whether the files of a model are what they should be, and what was checked before.

A checksum costs a reading of the whole file. What was found is kept beside the model in a small
file, with the size and the times of each file, so that only what has changed is read again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from gemma_serve.adapters.state import state_dir
from gemma_serve.adapters.whole_files import write_whole
from gemma_serve.planning.model.repo_files import RepoFile, is_inside

_CHUNK = 4 * 2**20
_SHA256_DIGITS = 64
_FORMAT = 1


@dataclass(frozen=True)
class CheckedFile:
    """A file whose content had `checksum` when it had this size and these times (nanoseconds)."""

    size_bytes: int
    checksum: str | None
    mtime_ns: int = 0
    ctime_ns: int = 0


@dataclass(frozen=True)
class Manifest:
    """What is in a model's folder, written when it was all right.

    `complete` is whether the Hub said that these are all the files, False where nobody could ask.
    With `broken_off` they are those that a download is to bring, and it has not ended.
    """

    model: str
    commit: str
    files: Mapping[str, CheckedFile] = field(default_factory=dict)
    complete: bool = True
    broken_off: bool = False

    @property
    def listing(self) -> tuple[RepoFile, ...]:
        """The files as a repository lists them."""
        return tuple(RepoFile(n, f.size_bytes, f.checksum) for n, f in self.files.items())


@dataclass(frozen=True)
class FileState:
    """What became of one file: `whole`, `missing` or `damaged`, and then how.

    `checked` is what a whole one was like before it was read.
    """

    file: RepoFile
    state: Literal["whole", "missing", "damaged"]
    found: str = ""
    checked: CheckedFile | None = None


def manifest_path(folder: Path) -> Path:
    """Where the manifest of a model's folder is: beside the snapshots of a cache, else inside."""
    if is_snapshot(folder):
        return folder.parent.parent / "gemma-serve" / f"{folder.name}.json"
    return folder / ".gemma-serve.json"


def is_snapshot(folder: Path) -> bool:
    """Whether a folder is one of the Hub client's cache: `models--ORG--NAME/snapshots/COMMIT`."""
    repo = folder.parent.parent
    return folder.parent.name == "snapshots" and repo.name.startswith("models--")


def _manifest_elsewhere(folder: Path) -> Path:
    """Where it is if that can't be written, as on a disk that is mounted read only."""
    key = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:32]
    return state_dir() / "checked" / f"{key}.json"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of `folder`, if it has one that can be read."""
    own, other = _read(manifest_path(folder)), _read(_manifest_elsewhere(folder))
    if own is None:
        # A commit's files are always the same; what is in another folder may have changed since.
        return other if is_snapshot(folder) else None
    agree = other is not None and (own.model, own.commit, own.listing) == (
        other.model,
        other.commit,
        other.listing,
    )
    return other if agree else own


def _read(path: Path) -> Manifest | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            return None
        files = {str(name): CheckedFile(**entry) for name, entry in content["files"].items()}
        if not all(map(is_inside, files)):
            return None
        return Manifest(
            str(content["model"]),
            str(content["commit"]),
            files,
            complete=content["complete"] is True,
            broken_off=content["broken_off"] is True,
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def write_manifest(folder: Path, manifest: Manifest) -> bool:
    """Note what is in `folder`; False where that can't be kept anywhere."""
    text = json.dumps({"format": _FORMAT, **asdict(manifest)}, indent=1)
    first, other = manifest_path(folder), _manifest_elsewhere(folder)
    for path in (first, other):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
        except OSError:
            continue
        if path == first:
            with suppress(OSError):
                other.unlink(missing_ok=True)
        return True
    return False


def check_file(
    folder: Path,
    file: RepoFile,
    checked: CheckedFile | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> FileState:
    """Compare a file with its size and its checksum; read it only if it changed since `checked`.

    `on_bytes` is told how many bytes were read, as they are.
    """
    path = folder / file.name
    try:
        before = stamp(path, file.checksum)
        if before.size_bytes != file.size_bytes:
            found = f"{before.size_bytes:,} bytes instead of {file.size_bytes:,}"
            return FileState(file, "damaged", found)
        if file.checksum is None or checked == before:
            return FileState(file, "whole", checked=before)
        found = content_checksum(path, len(file.checksum), on_bytes)
    except FileNotFoundError:
        return FileState(file, "missing")
    except OSError as error:
        return FileState(file, "damaged", f"it can't be read: {error.strerror}")
    if found != file.checksum:
        return FileState(file, "damaged", "its checksum is not the one that the Hub promises")
    return FileState(file, "whole", checked=before)


def is_unchanged(folder: Path, manifest: Manifest) -> bool:
    """Whether every file of the manifest is there with the size and the times that it had."""
    try:
        return all(
            stamp(folder / name, known.checksum) == known for name, known in manifest.files.items()
        )
    except OSError:
        return False


def content_checksum(
    path: Path, digits: int = _SHA256_DIGITS, on_bytes: Callable[[int], None] | None = None
) -> str:
    """The SHA-256 of a file (64 digits), or git's SHA-1 of it as a blob (40 digits).

    Git's has the kind and the length in front:
    https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
    """
    with path.open("rb") as stream:
        if digits == _SHA256_DIGITS:
            digest = hashlib.sha256()
        else:
            digest = hashlib.sha1(usedforsecurity=False)
            digest.update(b"blob %d\0" % os.fstat(stream.fileno()).st_size)
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return digest.hexdigest()


def stamp(path: Path, checksum: str | None) -> CheckedFile:
    """What a file is like now: its size and times, with the checksum that it is known to have.

    Raises:
        OSError: it isn't there.
    """
    stat = path.stat()
    return CheckedFile(stat.st_size, checksum, stat.st_mtime_ns, stat.st_ctime_ns)
