"""What of a model the local cache holds: told at a glance, by names, sizes and headers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint_samples import GEMMA, weights_file
from gemma_serve.adapters.checksums import (
    FileState,
    Manifest,
    read_manifest,
    stamp,
    write_manifest,
)
from gemma_serve.adapters.hub.cache import forget_file, forget_link
from gemma_serve.adapters.hub.transfer import partial_in
from gemma_serve.planning.model.repo_files import INDEX, RepoFile
from gemma_serve.usecases.local_files import (
    LocalFiles,
    cached_bytes,
    check_files,
    checkpoint_problems,
    find_cached,
    folder_bytes,
    names_in,
    problems_of_cached,
    tokenizer_problem,
)

NAME = "google/gemma-7b-it"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEXED = json.dumps({"weight_map": {"a": FIRST, "b": SECOND}}).encode()
FILES = {
    "config.json": json.dumps(GEMMA).encode(),
    INDEX: INDEXED,
    "tokenizer.json": b"{}",
    FIRST: weights_file({"a": 1000}),
    SECOND: weights_file({"b": 2000}),
}


def listed(name: str, content: bytes) -> RepoFile:
    if name.endswith(".safetensors"):
        return RepoFile(name, len(content), hashlib.sha256(content).hexdigest())
    blob = b"blob %d\0" % len(content) + content
    return RepoFile(name, len(content), hashlib.sha1(blob).hexdigest())


LISTING = tuple(listed(name, content) for name, content in FILES.items())


class Cache:
    """A cache as the client lays it out, filled by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repo = folder / "models--google--gemma-7b-it"
        self.snapshot = self.repo / "snapshots" / COMMIT

    def fill(self, files: Mapping[str, bytes], revision: str = "main") -> None:
        ref = self.repo / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(COMMIT)
        (self.repo / "blobs").mkdir(exist_ok=True)
        for name, content in files.items():
            link = self.snapshot / name
            link.parent.mkdir(parents=True, exist_ok=True)
            blob = self.blob(name, content)
            blob.write_bytes(content)
            link.symlink_to(os.path.relpath(blob, link.parent))

    def blob(self, name: str, content: bytes) -> Path:
        return self.repo / "blobs" / str(listed(name, content).checksum)

    def path(self, name: str) -> Path:
        """The file that a snapshot's link leads to."""
        return (self.snapshot / name).resolve()

    def find(self, revision: str | None = None) -> LocalFiles | None:
        return find_cached(NAME, revision, self.folder)

    def bytes(self) -> dict[str, int]:
        return cached_bytes(NAME, COMMIT, LISTING, self.folder)

    def note(self, files: Sequence[RepoFile] = LISTING, *, complete: bool = True) -> bool:
        noted = {file.name: stamp(self.snapshot / file.name, file.checksum) for file in files}
        return write_manifest(self.snapshot, Manifest(NAME, COMMIT, noted, complete))


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GEMMA_SERVE_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "hub")


def test_a_whole_model_that_somebody_else_brought_is_found(cache: Cache) -> None:
    cache.fill(FILES)
    found = LocalFiles(cache.snapshot, COMMIT, None)
    assert cache.find() == cache.find("main") == cache.find(COMMIT) == found
    # The names of the blobs say what is in them; nobody has compared it.
    assert set(found.listing) == set(LISTING)
    assert not found.is_known_whole
    assert cache.find("v2") is None
    assert problems_of_cached(NAME, None, cache.folder) == ()


def test_a_branch_with_a_slash_is_found(cache: Cache) -> None:
    cache.fill(FILES, "refs/pr/7")
    assert cache.find("refs/pr/7") == LocalFiles(cache.snapshot, COMMIT, None)
    assert cache.find() is None


def test_what_we_noted_is_known_whole_until_something_changes(cache: Cache) -> None:
    cache.fill(FILES)
    assert cache.note()
    found = cache.find()
    assert found == LocalFiles(cache.snapshot, COMMIT, read_manifest(cache.snapshot))
    assert found.is_known_whole
    assert found.listing == LISTING
    os.utime(cache.path(FIRST), ns=(1, 1))
    assert cache.find() == found
    assert not found.is_known_whole


def test_what_nobody_could_ask_for_is_not_known_whole(cache: Cache) -> None:
    cache.fill(FILES)
    cache.note(complete=False)
    found = cache.find()
    assert found is not None
    assert not found.is_known_whole


@pytest.mark.parametrize("name", FILES)
def test_a_part_of_a_model_is_not_found(cache: Cache, name: str) -> None:
    cache.fill({other: content for other, content in FILES.items() if other != name})
    # Without its index, a model is what its shards are.
    assert (cache.find() is None) == (name != INDEX)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", FIRST, SECOND])
def test_a_link_to_nothing_is_no_file(cache: Cache, name: str) -> None:
    cache.fill(FILES)
    cache.path(name).unlink()
    assert cache.find() is None
    kept = [file for file in LISTING if file.name != name]
    assert cache.bytes() == {name: 0} | {file.name: file.size_bytes for file in kept}


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "tokenizer.model"])
def test_either_tokenizer_will_do(cache: Cache, tokenizer: str) -> None:
    files = {name: content for name, content in FILES.items() if name != "tokenizer.json"}
    cache.fill(files)
    assert cache.find() is None
    cache.fill({tokenizer: b"{}"})
    assert cache.find() == LocalFiles(cache.snapshot, COMMIT, None)


def test_a_shard_that_is_cut_short_is_noticed_by_its_header(cache: Cache) -> None:
    cache.fill(FILES)
    os.truncate(cache.path(SECOND), 1500)
    assert cache.find() is None
    (problem,) = problems_of_cached(NAME, None, cache.folder)
    assert problem.code == "weights-truncated"
    assert str(cache.snapshot / SECOND) in problem.message


def test_a_missing_shard_is_named(cache: Cache) -> None:
    cache.fill({name: content for name, content in FILES.items() if name != SECOND})
    (problem,) = problems_of_cached(NAME, None, cache.folder)
    assert problem.code == "weights-missing"
    assert SECOND in problem.message


def test_a_file_that_was_noted_must_be_there(cache: Cache) -> None:
    template = {"chat_template.jinja": b"{{ messages }}"}
    cache.fill(FILES | template)
    cache.note([*LISTING, listed(*next(iter(template.items())))])
    assert cache.find() is not None
    (cache.snapshot / "chat_template.jinja").unlink()
    assert cache.find() is None


def test_a_manifest_that_cannot_be_read_says_nothing(cache: Cache) -> None:
    cache.fill(FILES)
    cache.note()
    (cache.repo / "gemma-serve" / f"{COMMIT}.json").write_text("{")
    assert cache.find() == LocalFiles(cache.snapshot, COMMIT, None)


def test_an_empty_cache_holds_nothing(cache: Cache) -> None:
    nothing = {file.name: 0 for file in LISTING}
    assert cache.find() is None
    assert cache.bytes() == nothing
    assert problems_of_cached(NAME, None, cache.folder) == ()
    # A ref that holds no commit leads nowhere.
    cache.fill({})
    (cache.repo / "refs" / "main").write_text("../../../etc")
    assert cache.find() is None
    assert cache.bytes() == nothing


def test_what_came_so_far_counts(cache: Cache) -> None:
    cache.fill({"config.json": FILES["config.json"]})
    blob = cache.blob(FIRST, FILES[FIRST])
    partial = blob.with_name(f"{blob.name}.incomplete")
    sizes = {file.name: 0 for file in LISTING} | {"config.json": len(FILES["config.json"])}
    for size in (0, 1, 500, len(FILES[FIRST])):
        partial.write_bytes(FILES[FIRST][:size])
        assert cache.bytes() == sizes | {FIRST: size}
    # More than the whole is not more than the whole.
    partial.write_bytes(FILES[FIRST] + b"more")
    assert cache.bytes() == sizes | {FIRST: len(FILES[FIRST])}


def test_a_blob_counts_before_it_is_linked(cache: Cache) -> None:
    cache.fill({})
    cache.blob(SECOND, FILES[SECOND]).write_bytes(FILES[SECOND])
    sizes = {file.name: 0 for file in LISTING}
    assert cache.bytes() == sizes | {SECOND: len(FILES[SECOND])}
    # One of another size will be fetched anew.
    cache.blob(SECOND, FILES[SECOND]).write_bytes(FILES[SECOND][:-1])
    assert cache.bytes() == sizes


def test_each_file_is_compared_and_all_that_is_read_is_told(cache: Cache) -> None:
    cache.fill(FILES)
    read: list[int] = []
    states = check_files(cache.snapshot, LISTING, None, read.append)
    assert states == tuple(
        FileState(file, "whole", checked=stamp(cache.snapshot / file.name, file.checksum))
        for file in LISTING
    )
    assert sum(read) == sum(file.size_bytes for file in LISTING)

    cache.note()
    manifest = read_manifest(cache.snapshot)
    read.clear()
    assert check_files(cache.snapshot, LISTING, manifest, read.append) == states
    assert read == []

    content = FILES[FIRST]
    cache.path(FIRST).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (cache.snapshot / SECOND).unlink()
    found = {state.file.name: state for state in check_files(cache.snapshot, LISTING, manifest)}
    whole = {state.file.name: state for state in states}
    assert found == whole | {
        FIRST: replace(
            whole[FIRST],
            state="damaged",
            found="its checksum is not the one that the Hub promises",
            checked=None,
        ),
        SECOND: replace(whole[SECOND], state="missing", checked=None),
    }


def test_a_folder_has_what_is_whole_and_what_was_begun(tmp_path: Path) -> None:
    part = RepoFile("2_Dense/config.json", 5)
    assert partial_in(tmp_path, part) == tmp_path / "2_Dense" / ".config.json.incomplete"
    begun, whole, other = LISTING[3], LISTING[4], LISTING[0]
    (tmp_path / whole.name).write_bytes(FILES[whole.name])
    (tmp_path / other.name).write_bytes(b"of another size")
    partial_in(tmp_path, begun).write_bytes(FILES[begun.name][:7])
    assert folder_bytes(tmp_path, (begun, whole, other, part)) == {
        begun.name: 7,
        whole.name: whole.size_bytes,
        other.name: 0,
        part.name: 0,
    }
    # More than the whole is not more than the whole.
    partial_in(tmp_path, begun).write_bytes(FILES[begun.name] + b"more")
    assert folder_bytes(tmp_path, (begun,)) == {begun.name: begun.size_bytes}
    assert folder_bytes(tmp_path / "nowhere", (begun,)) == {begun.name: 0}


def test_a_model_without_a_tokenizer_is_none_to_serve(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    assert checkpoint_problems(tmp_path) == ()
    assert tokenizer_problem("m", names_in(tmp_path)) is None
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_bytes(b"{}")
    problem = tokenizer_problem("m", names_in(tmp_path))
    assert problem is not None
    assert (problem.code, problem.blocking) == ("tokenizer-missing", True)
    assert problem.message == (
        "m has neither tokenizer.json nor tokenizer.model, so nothing can read a prompt"
    )


def test_a_damaged_file_is_taken_out_of_the_snapshot_and_its_blob_stays(cache: Cache) -> None:
    cache.fill(FILES)
    blob = cache.path(FIRST)
    for _ in range(2):  # somebody else may have been quicker
        forget_link(cache.snapshot, FIRST)
        assert not (cache.snapshot / FIRST).is_symlink()
        assert blob.read_bytes() == FILES[FIRST]


def test_a_damaged_file_is_removed_with_its_blob_and_a_shared_store_is_left_alone(
    cache: Cache, tmp_path: Path
) -> None:
    cache.fill(FILES)
    blob = cache.path(FIRST)
    forget_file(cache.snapshot, FIRST)
    assert not (cache.snapshot / FIRST).is_symlink()
    assert not blob.exists()

    # The client's store that several repositories share is in the cache's folder.
    own, foreign = cache.folder / "store" / "of-all", tmp_path / "foreign"
    for stored in (own, foreign):
        stored.parent.mkdir(exist_ok=True)
        link = cache.path(SECOND)
        stored.write_bytes(FILES[SECOND])
        link.unlink()
        link.symlink_to(os.path.relpath(stored, link.parent))
        forget_file(cache.snapshot, SECOND)
        assert not link.is_symlink()
        assert stored.exists() == (stored == foreign)
        cache.fill({SECOND: FILES[SECOND]})
