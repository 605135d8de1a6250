"""The files of a model on this disk: are they all there, and are they what they should be?"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gemma_serve.adapters.checkpoint import read_checkpoint
from gemma_serve.adapters.checksums import (
    FileState,
    Manifest,
    check_file,
    is_unchanged,
    read_manifest,
)
from gemma_serve.adapters.hub.cache import cached_repo, cached_snapshot, files_of_snapshot
from gemma_serve.adapters.hub.transfer import partial_in
from gemma_serve.errors import Problem
from gemma_serve.planning.model.repo_files import RepoFile, weight_names

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
# Hashing is done by C code that lets other threads run.
_AT_ONCE = 4


@dataclass(frozen=True)
class LocalFiles:
    """A model in a folder of this disk that could be served, as far as a glance can tell.

    `manifest` is what we noted when it was whole, None where somebody else brought the files.
    """

    folder: Path
    commit: str | None
    manifest: Manifest | None

    @property
    def is_known_whole(self) -> bool:
        """Whether it was checked to the last byte, and nothing has changed since."""
        known = self.manifest
        return known is not None and known.complete and is_unchanged(self.folder, known)

    @property
    def listing(self) -> tuple[RepoFile, ...]:
        """The files and what should be in them, by the manifest or by the cache's own names."""
        if self.manifest is not None:
            return self.manifest.listing
        return files_of_snapshot(self.folder)


def find_cached(
    model: str, revision: str | None = None, cache_dir: Path | None = None
) -> LocalFiles | None:
    """The model in the local cache, if config, tokenizer and all weights seem to be there."""
    snapshot = cached_snapshot(model, revision, cache_dir)
    if snapshot is None or checkpoint_problems(snapshot):
        return None
    manifest = read_manifest(snapshot)
    if manifest is None and tokenizer_problem(model, names_in(snapshot)) is not None:
        return None  # a download that broke off, more likely than a model without one
    if manifest is not None and not all((snapshot / n).is_file() for n in manifest.files):
        return None
    return LocalFiles(snapshot, snapshot.name, manifest)


def problems_of_cached(
    model: str, revision: str | None = None, cache_dir: Path | None = None
) -> tuple[Problem, ...]:
    """What keeps a snapshot that is in the cache from being served."""
    snapshot = cached_snapshot(model, revision, cache_dir)
    return () if snapshot is None else checkpoint_problems(snapshot)


def cached_bytes(
    model: str, commit: str, files: Sequence[RepoFile], cache_dir: Path | None = None
) -> dict[str, int]:
    """How much of each file the cache has, whole or begun; by size, nothing is read."""
    repo = cached_repo(model, cache_dir)
    return {
        file.name: _bytes_here(file, _places(repo.snapshot(commit), repo.folder, file))
        for file in files
    }


def folder_bytes(folder: Path, files: Sequence[RepoFile]) -> dict[str, int]:
    """How much of each file a plain folder has, whole or begun; by size, nothing is read."""
    return {
        file.name: _bytes_here(file, (folder / file.name, partial_in(folder, file)))
        for file in files
    }


def check_files(
    folder: Path,
    files: Iterable[RepoFile],
    manifest: Manifest | None,
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[FileState, ...]:
    """Compare each file with its size and checksum, several at once; what was checked is not read.

    `on_bytes` is told from several threads how much was read.
    """
    known = {} if manifest is None else manifest.files
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="checksum") as pool:
        states = pool.map(lambda f: check_file(folder, f, known.get(f.name), on_bytes), files)
        return tuple(states)


def noted_problems(here: LocalFiles) -> tuple[Problem, ...]:
    """What of a model's files is no longer as it was noted; by size and times, nothing is read."""
    if here.is_known_whole:
        return ()
    if here.manifest is not None and here.manifest.broken_off:
        return (broken_off_problem(here.folder, here.manifest),)
    if here.manifest is None or not here.manifest.complete:
        return (_changed(here.folder, "have not been compared with their checksums yet"),)
    gone = [name for name in here.manifest.files if not (here.folder / name).is_file()]
    if gone:
        return tuple(_gone(here.folder, name) for name in gone)
    return (_changed(here.folder, "have changed since they were compared with their checksums"),)


def _changed(folder: Path, found: str) -> Problem:
    return Problem(
        "model.not_compared",
        f"files in {folder} {found}",
        hint="`up` compares them before it starts; `gemma-serve download` does it now",
        blocking=False,
    )


def code_of_missing(name: str) -> str:
    """The code for a file of a model that is not there: of its weights, or another."""
    return "weights-missing" if weight_names([name]) else "model.file_missing"


def code_of_damaged(name: str) -> str:
    """The code for a file of a model with other bytes than it should have."""
    return "weights-truncated" if weight_names([name]) else "model.file_damaged"


def _gone(folder: Path, name: str) -> Problem:
    return Problem(
        code_of_missing(name),
        f"{folder / name} is missing",
        hint="copy the folder again from where it was made",
    )


def checkpoint_problems(folder: Path) -> tuple[Problem, ...]:
    """What keeps a folder with a model's files from being loaded, as far as headers tell."""
    return tuple(p for p in read_checkpoint(folder).problems if p.blocking)


def tokenizer_problem(model: str, names: Collection[str]) -> Problem | None:
    """Why nothing could read a prompt, with these files; None where there is a tokenizer."""
    if any(name in names for name in _TOKENIZERS):
        return None
    return Problem(
        "tokenizer-missing",
        f"{model} has neither tokenizer.json nor tokenizer.model, so nothing can read a prompt",
        hint="name the tokenizer of the model that it was made from: `--engine-arg tokenizer=DIR`",
    )


def names_in(folder: Path) -> frozenset[str]:
    """The names of the files right in `folder`; none where it can't be read."""
    try:
        return frozenset(path.name for path in folder.iterdir() if path.is_file())
    except OSError:
        return frozenset()


def revision_to_ask(
    model: str, revision: str | None, cache_dir: Path | None, here: LocalFiles | None
) -> str | None:
    """The commit that is cached, also where a file of it is gone; else `revision` as it is."""
    if here is not None:
        return here.commit
    repo = cached_repo(model, cache_dir)
    commit = repo.commit(revision)
    noted = commit is not None and read_manifest(repo.snapshot(commit)) is not None
    return commit if noted else revision


def broken_off_problem(folder: Path, manifest: Manifest) -> Problem:
    """A folder that a download was filling when it ended."""
    place, model = shlex.quote(str(folder)), manifest.model
    return Problem(
        "weights-missing",
        f"the download of {model} into {folder} did not end",
        hint=f"run it again: `gemma-serve download --model {model} --revision {manifest.commit} "
        f"--to {place}`",
    )


def _places(snapshot: Path, repo: Path, file: RepoFile) -> Sequence[Path]:
    blob = repo / "blobs" / (file.checksum or file.name)
    return (snapshot / file.name, blob, blob.with_name(f"{blob.name}.incomplete"))


def _bytes_here(file: RepoFile, places: Sequence[Path]) -> int:
    """The size of the first that is there; one of another size counts for nothing but the last."""
    for path in places:
        try:
            size = path.stat().st_size
        except OSError:
            continue
        if size == file.size_bytes or path == places[-1]:
            return min(size, file.size_bytes)
    return 0
