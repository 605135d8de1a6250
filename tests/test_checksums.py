"""Files are compared with what the Hub promises, and read again only if they may have changed."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from pathlib import Path

import pytest

from gemma_serve.adapters.checksums import (
    CheckedFile,
    FileState,
    Manifest,
    check_file,
    content_checksum,
    is_unchanged,
    manifest_path,
    read_manifest,
    stamp,
    write_manifest,
)
from gemma_serve.planning.model.repo_files import RepoFile
from running import eventually

MODEL, COMMIT = "google/gemma-7b-it", "0123456789abcdef0123456789abcdef01234567"
# More than is read at once, and no multiple of it.
CONTENT = random.Random(4).randbytes(9 * 2**20 + 5)
ALTERED = "its checksum is not the one that the Hub promises"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def write(folder: Path, name: str, content: bytes, checksum: str | None = None) -> RepoFile:
    """Write a file as the Hub would list it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return RepoFile(name, len(content), checksum or sha256(content))


def alter(path: Path) -> None:
    """Change one byte in the middle, and nothing of the size."""
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def whole(folder: Path, file: RepoFile) -> FileState:
    """What is found of a file that is right."""
    return FileState(file, "whole", checked=stamp(folder / file.name, file.checksum))


def note(folder: Path, *files: RepoFile, complete: bool = True) -> bool:
    """Write a manifest of files as they are now."""
    noted = {file.name: stamp(folder / file.name, file.checksum) for file in files}
    return write_manifest(folder, Manifest(MODEL, COMMIT, noted, complete))


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the program keeps what it can keep nowhere else."""
    folder = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("GEMMA_SERVE_STATE_DIR", str(folder))
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> RepoFile:
    return write(tmp_path, "model.safetensors", CONTENT)


@pytest.mark.parametrize("content", [b"", b"x", b"what is up, doc?", CONTENT])
def test_a_checksum_is_sha256_or_gits_own(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert content_checksum(path) == content_checksum(path, 64) == sha256(content)
    assert content_checksum(path, 40) == git_oid(content)


def test_git_agrees(tmp_path: Path) -> None:
    # From the book that defines it.
    (tmp_path / "doc").write_bytes(b"what is up, doc?")
    known = "bd9dbf5aae1a3862dd1526723246b20206e5fc37"
    assert content_checksum(tmp_path / "doc", 40) == known
    try:
        told = subprocess.check_output(["git", "hash-object", "doc"], cwd=tmp_path, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    assert told.strip() == known


def test_all_that_is_read_is_told(tmp_path: Path, weights: RepoFile) -> None:
    read: list[int] = []
    assert check_file(tmp_path, weights, None, read.append) == whole(tmp_path, weights)
    assert sum(read) == len(CONTENT)
    assert len(read) > 1


def test_a_file_is_whole_or_it_is_said_what_is_wrong(tmp_path: Path, weights: RepoFile) -> None:
    path = tmp_path / weights.name
    small = write(tmp_path, "config.json", b"{}", git_oid(b"{}"))
    assert check_file(tmp_path, small) == whole(tmp_path, small)
    # Of a file without a checksum the size is all that is known.
    unknown = RepoFile("config.json", 2)
    read: list[int] = []
    assert check_file(tmp_path, unknown, None, read.append) == whole(tmp_path, unknown)
    assert read == []

    alter(path)
    assert check_file(tmp_path, weights) == FileState(weights, "damaged", ALTERED)
    path.write_bytes(CONTENT[:-5])
    cut = "9,437,184 bytes instead of 9,437,189"
    assert check_file(tmp_path, weights) == FileState(weights, "damaged", cut)
    path.write_bytes(CONTENT + b"+")
    longer = "9,437,190 bytes instead of 9,437,189"
    assert check_file(tmp_path, weights) == FileState(weights, "damaged", longer)
    path.unlink()
    assert check_file(tmp_path, weights) == FileState(weights, "missing")
    path.symlink_to("gone")
    assert check_file(tmp_path, weights) == FileState(weights, "missing")
    path.unlink()
    path.mkdir()
    assert check_file(tmp_path, weights).state == "damaged"


def test_a_file_in_place_of_a_folder_is_a_missing_file(tmp_path: Path) -> None:
    write(tmp_path, "2_Dense", b"not a folder")
    file = RepoFile("2_Dense/config.json", 2, git_oid(b"{}"))
    assert check_file(tmp_path, file).state != "whole"


def test_what_was_noted_is_read_back(tmp_path: Path, weights: RepoFile) -> None:
    config = write(tmp_path, "config.json", b"{}", git_oid(b"{}"))
    part = write(tmp_path, "2_Dense/config.json", b"[]")
    unknown = RepoFile("config.json", 2)
    for files, complete in (([weights, config, part], True), ([unknown], False), ([], True)):
        assert note(tmp_path, *files, complete=complete)
        manifest = read_manifest(tmp_path)
        assert manifest is not None
        stats = {file.name: (tmp_path / file.name).stat() for file in files}
        assert manifest == Manifest(
            MODEL,
            COMMIT,
            {
                file.name: CheckedFile(
                    file.size_bytes,
                    file.checksum,
                    stats[file.name].st_mtime_ns,
                    stats[file.name].st_ctime_ns,
                )
                for file in files
            },
            complete,
        )
        assert manifest.listing == tuple(files)
        assert is_unchanged(tmp_path, manifest)


def test_a_manifest_lies_in_a_plain_folder_and_beside_the_snapshots_of_a_cache(
    tmp_path: Path,
) -> None:
    assert manifest_path(tmp_path) == tmp_path / ".gemma-serve.json"
    repo = tmp_path / "models--google--gemma-7b-it"
    snapshot = repo / "snapshots" / COMMIT
    assert manifest_path(snapshot) == repo / "gemma-serve" / f"{COMMIT}.json"
    file = write(snapshot, "config.json", b"{}")
    assert note(snapshot, file)
    # Nothing but the model's own files is in what vLLM is given.
    assert [path.name for path in snapshot.iterdir()] == ["config.json"]
    assert [path.name for path in (repo / "gemma-serve").iterdir()] == [f"{COMMIT}.json"]


def checked(folder: Path, file: RepoFile) -> tuple[FileState, int]:
    """What a check by the manifest finds, and how many bytes it reads."""
    manifest = read_manifest(folder)
    assert manifest is not None
    read: list[int] = []
    state = check_file(folder, file, manifest.files.get(file.name), read.append)
    # A glance at the sizes and the times finds as much.
    assert is_unchanged(folder, manifest) == (not read and state.state == "whole")
    return state, sum(read)


def test_what_has_not_changed_is_not_read_again(tmp_path: Path, weights: RepoFile) -> None:
    note(tmp_path, weights)
    assert checked(tmp_path, weights) == (whole(tmp_path, weights), 0)
    # Another content is promised now: the old note says nothing of that.
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    other = RepoFile(weights.name, weights.size_bytes, sha256(b"other"))
    known = manifest.files[weights.name]
    assert check_file(tmp_path, other, known) == FileState(other, "damaged", ALTERED)


def wait_for_the_clock(path: Path) -> None:
    """Wait until what is changed now gets another time than `path` has."""
    probe = path.with_name("clock")

    def has_moved() -> bool:
        probe.write_bytes(b"")
        return probe.stat().st_ctime_ns > path.stat().st_ctime_ns

    eventually(has_moved, "the file system's clock moves")
    probe.unlink()


def test_an_altered_file_is_found_though_its_size_and_its_time_are_as_before(
    tmp_path: Path, weights: RepoFile
) -> None:
    path = tmp_path / weights.name
    note(tmp_path, weights)
    before = path.stat()
    wait_for_the_clock(path)
    alter(path)
    assert checked(tmp_path, weights) == (FileState(weights, "damaged", ALTERED), len(CONTENT))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert checked(tmp_path, weights) == (FileState(weights, "damaged", ALTERED), len(CONTENT))


def test_a_file_that_was_only_touched_is_read_and_whole(tmp_path: Path, weights: RepoFile) -> None:
    path = tmp_path / weights.name
    note(tmp_path, weights)
    wait_for_the_clock(path)
    path.touch()
    assert checked(tmp_path, weights) == (whole(tmp_path, weights), len(CONTENT))
    note(tmp_path, weights)
    assert checked(tmp_path, weights) == (whole(tmp_path, weights), 0)


def test_a_truncated_or_a_missing_file_is_found_without_reading(
    tmp_path: Path, weights: RepoFile
) -> None:
    path = tmp_path / weights.name
    note(tmp_path, weights)
    os.truncate(path, 100)
    cut = "100 bytes instead of 9,437,189"
    assert checked(tmp_path, weights) == (FileState(weights, "damaged", cut), 0)
    path.unlink()
    assert checked(tmp_path, weights) == (FileState(weights, "missing"), 0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        '"text"',
        "[" * 100_000,
        "{}",
        '{"format": 2, "model": "m", "commit": "c", "complete": true, "files": {}}',
        '{"format": 1, "model": "m", "commit": "c", "complete": true}',
        '{"format": 1, "model": "m", "commit": "c", "complete": true, "files": []}',
        '{"format": 1, "model": "m", "commit": "c", "complete": true, "files": {"a": 1}}',
        '{"format": 1, "model": "m", "commit": "c", "complete": true, "files": {"a": {}}}',
        '{"format": 1, "model": "m", "commit": "c", "complete": true,'
        ' "files": {"a": {"size_bytes": 1, "checksum": null, "later": 1}}}',
        '{"format": 1, "commit": "c", "complete": true, "files": {}}',
        # Somebody else's folder must not make us look at, or remove, what is not in it.
        '{"format": 1, "model": "m", "commit": "c", "complete": true,'
        ' "files": {"../a": {"size_bytes": 1, "checksum": null}}}',
        '{"format": 1, "model": "m", "commit": "c", "complete": true,'
        ' "files": {"/tmp/a": {"size_bytes": 1, "checksum": null}}}',
    ],
)
def test_a_manifest_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    manifest_path(tmp_path).write_text(text)
    assert read_manifest(tmp_path) is None


def test_there_is_no_manifest_where_there_is_no_file(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "nowhere") is None
    manifest_path(tmp_path).write_bytes(b"\xff\xfe\0")
    assert read_manifest(tmp_path) is None
    manifest_path(tmp_path).unlink()
    manifest_path(tmp_path).mkdir()
    assert read_manifest(tmp_path) is None


def test_a_manifest_that_cannot_be_written_is_said_and_nothing_is_left(
    tmp_path: Path, state: Path
) -> None:
    (state / "checked").write_bytes(b"")
    repo = tmp_path / "models--google--gemma"
    snapshot = repo / "snapshots" / COMMIT
    file = write(snapshot, "config.json", b"{}")
    # A file where the folder should be: nobody can write there, root neither.
    (repo / "gemma-serve").write_bytes(b"")
    assert note(snapshot, file) is False
    assert read_manifest(snapshot) is None
    plain = tmp_path / "plain"
    file = write(plain, "config.json", b"{}")
    manifest_path(plain).mkdir()
    assert note(plain, file) is False
    assert sorted(path.name for path in plain.iterdir()) == [".gemma-serve.json", "config.json"]
    assert [path.name for path in state.iterdir()] == ["checked"]


def test_beside_a_folder_that_cannot_be_written_to_the_manifest_is_in_our_own(
    tmp_path: Path, state: Path
) -> None:
    repo = tmp_path / "models--google--gemma"
    snapshot = repo / "snapshots" / COMMIT
    file = write(snapshot, "config.json", b"{}")
    noted = Manifest(MODEL, COMMIT, {file.name: stamp(snapshot / file.name, file.checksum)})
    # As on a disk that is mounted read only, for root too.
    (repo / "gemma-serve").write_bytes(b"")
    assert write_manifest(snapshot, noted)
    assert read_manifest(snapshot) == noted
    [kept] = (state / "checked").iterdir()
    other = tmp_path / "models--else" / "snapshots" / COMMIT
    write(other, "config.json", b"{}")
    assert read_manifest(other) is None

    # Of two, the one elsewhere would be the newer; so it goes as soon as it is not needed.
    (repo / "gemma-serve").unlink()
    newer = Manifest("google/gemma-2b", COMMIT, noted.files)
    assert write_manifest(snapshot, newer)
    assert read_manifest(snapshot) == newer
    assert not kept.exists()
    assert [path.name for path in (repo / "gemma-serve").iterdir()] == [f"{COMMIT}.json"]


def test_what_was_noted_elsewhere_of_a_folder_holds_while_the_folder_says_the_same(
    tmp_path: Path, state: Path
) -> None:
    file = write(tmp_path, "config.json", b"{}")
    inside = Manifest(MODEL, COMMIT, {file.name: CheckedFile(2, file.checksum)})
    assert write_manifest(tmp_path, inside)
    kept = manifest_path(tmp_path).read_bytes()
    # As on a disk that was filled elsewhere and is mounted read only here: newer times, elsewhere.
    manifest_path(tmp_path).unlink()
    manifest_path(tmp_path).mkdir()
    seen = Manifest(MODEL, COMMIT, {file.name: stamp(tmp_path / file.name, file.checksum)})
    assert write_manifest(tmp_path, seen)
    assert read_manifest(tmp_path) is None, "it is not known to be of this folder"
    manifest_path(tmp_path).rmdir()
    manifest_path(tmp_path).write_bytes(kept)
    assert read_manifest(tmp_path) == seen
    # The disk is filled anew, and its own word counts.
    newer = Manifest(MODEL, "f" * 40, inside.files)
    manifest_path(tmp_path).write_bytes(kept.replace(COMMIT.encode(), b"f" * 40))
    assert read_manifest(tmp_path) == newer


def test_what_is_told_of_a_file_is_what_it_was_before_it_was_read(
    tmp_path: Path, weights: RepoFile
) -> None:
    path = tmp_path / weights.name
    before = stamp(path, weights.checksum)

    def spoil(_: int) -> None:
        # As somebody else may, behind the place that is being read.
        with path.open("r+b") as stream:
            stream.write(b"other")
        os.utime(path, ns=(1, 1))

    state = check_file(tmp_path, weights, None, spoil)
    assert state == FileState(weights, "whole", checked=before)
    assert check_file(tmp_path, weights, state.checked) == FileState(weights, "damaged", ALTERED)
