"""A model is brought whole, whatever the network, the disk and the user do.

Each download here goes over HTTP from a local Hub into a folder, in this process or in a child.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from huggingface_hub import (
    constants,
    file_download,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)

import local_hub
from checkpoint_samples import GEMMA, weights_file
from gemma_serve.adapters import checksums, host
from gemma_serve.adapters.checksums import manifest_path, read_manifest, stamp
from gemma_serve.adapters.hub.transfer import size_on_the_way
from gemma_serve.cli import main
from gemma_serve.errors import GemmaServeError, Problem, UsageError
from gemma_serve.planning.model.repo_files import INDEX, RepoFile
from gemma_serve.usecases.download import DownloadRequest, DownloadResult, download
from gemma_serve.usecases.events import (
    CheckingFiles,
    DownloadBegan,
    DownloadEnded,
    DownloadProgress,
    Event,
    FileDamaged,
    Noticed,
)
from gemma_serve.view.download import progress_line
from local_hub import (
    Account,
    Cut,
    Hang,
    Hold,
    LocalHub,
    NoRanges,
    Refusal,
    Refuse,
    Repo,
    Request,
    WrongContent,
    WrongLength,
    environ,
    serving,
)
from running import Program, eventually

NAME, OTHER = "google/gemma-7b-it", "google/gemma-2b"
# What is lost of what came, at most, when a connection is cut.
CHUNK = 256 * 2**10
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
ONE = "model.safetensors"


def weights(tensor: str, size: int) -> bytes:
    """A safetensors file of one tensor of `size` bytes, which are random."""
    empty = weights_file({tensor: size})
    return empty[: len(empty) - size] + random.Random(tensor).randbytes(size)


def index(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"{n}": shard for n, shard in enumerate(shards)}}).encode()


SMALL = {
    "config.json": json.dumps(GEMMA).encode(),
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b"{}",
}
WANTED = {
    **SMALL,
    INDEX: index(FIRST, SECOND),
    FIRST: weights("a", 5 * CHUNK + 1000),
    SECOND: weights("b", 3 * CHUNK + 2),
}
UNWANTED = {
    "README.md": b"# Gemma",
    ".gitattributes": b"*.safetensors filter=lfs",
    "gemma.gguf": bytes(2**20),
    "original/model.safetensors": weights("original", 100),
    "consolidated.safetensors": weights("consolidated", 100),
}
SHORT = {**SMALL, ONE: weights("w", 3 * CHUNK + 1234)}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("GEMMA_SERVE_STATE_DIR", str(tmp_path / "state"))
    with local_hub.alone(monkeypatch, tmp_path):
        yield


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub with a sharded model, which this process and its children may ask."""
    with serving(LocalHub(repos={NAME: Repo({**UNWANTED, **WANTED})})) as served:
        local_hub.use(monkeypatch, served.url)
        yield served
        let_end()


def let_end() -> None:
    """Wait a moment for what a download that failed leaves; it would ask the next test's Hub."""
    for thread in threading.enumerate():
        if thread.name == "download":
            thread.join(0.3)


@pytest.fixture
def short(hub: LocalHub) -> LocalHub:
    """The same with a model of one weight file."""
    hub.repos = {NAME: Repo(SHORT)}
    return hub


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client does not pause for a second before it tries again."""
    no_pause = {**vars(time), "sleep": lambda _: None}
    monkeypatch.setattr(file_download, "time", SimpleNamespace(**no_pause))


def bring(events: list[Event] | None = None, **request: Any) -> DownloadResult:
    on_event = [].append if events is None else events.append
    return download(DownloadRequest(NAME, **request), on_event=on_event)


def refused(**request: Any) -> tuple[list[str], str]:
    """The codes and the sentences of a download that fails."""
    with pytest.raises(GemmaServeError) as caught:
        bring(**request)
    problems = caught.value.problems
    return [p.code for p in problems], "\n".join(p.message for p in problems)


def verify(folder: Path) -> DownloadResult:
    """What `--model DIR` makes of a folder."""
    return download(DownloadRequest(str(folder)), on_event=[].append)


def listed(files: Mapping[str, bytes]) -> tuple[RepoFile, ...]:
    """The files as the Hub lists them."""
    return tuple(
        RepoFile(name, len(content), checksum(name, files)) for name, content in files.items()
    )


def checksum(name: str, files: Mapping[str, bytes] = WANTED) -> str:
    content = files[name]
    if name.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def in_order(files: Mapping[str, bytes]) -> dict[str, bytes]:
    names = sorted(files, key=lambda name: (name.startswith("model") and name != INDEX, name))
    return {name: files[name] for name in names}


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, those of the program aside."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if not p.is_dir()}
    return {n: p.read_bytes() for n, p in sorted(found.items()) if n != ".gemma-serve.json"}


def cache() -> Path:
    return Path(constants.HF_HUB_CACHE)


def repo_folder(folder: Path | None = None) -> Path:
    return (folder or cache()) / "models--google--gemma-7b-it"


def partial(name: str, files: Mapping[str, bytes] = WANTED, folder: Path | None = None) -> Path:
    """Where what came of a file waits for the rest."""
    return repo_folder(folder) / "blobs" / f"{checksum(name, files)}.incomplete"


def assert_whole(
    hub: LocalHub, files: Mapping[str, bytes] = WANTED, folder: Path | None = None
) -> None:
    """The client itself finds all that was wanted, and nothing else is left."""
    where, commit = folder or cache(), hub.repos[NAME].commit()  # type: ignore[index]
    found = Path(snapshot_download(NAME, cache_dir=where, local_files_only=True))
    assert found == repo_folder(where) / "snapshots" / commit
    assert contents(found) == dict(sorted(files.items()))
    for name in files:
        path = try_to_load_from_cache(NAME, name, cache_dir=where)
        assert path == str(found / name)
    assert (repo_folder(where) / "refs" / "main").read_text() == commit
    blobs = {path.name for path in (repo_folder(where) / "blobs").iterdir()}
    # A program that ends may leave the client's own half of a small file, known by git's checksum.
    blobs = {name for name in blobs if not re.fullmatch(r"[0-9a-f]{40}\..*incomplete", name)}
    assert blobs == {checksum(name, files) for name in files}
    manifest = read_manifest(found)
    assert manifest is not None
    assert (manifest.model, manifest.commit, manifest.complete) == (NAME, commit, True)
    assert set(manifest.listing) == set(listed(files))


def assert_nothing_half(files: Mapping[str, bytes] = WANTED, folder: Path | None = None) -> None:
    """Whatever has a real name has its whole content."""
    repo = repo_folder(folder)
    names = {checksum(name, files): content for name, content in files.items()}
    for blob in (repo / "blobs").glob("*"):
        # `tmp_...` is empty: the client learns from it which permissions a new file has.
        if not blob.name.endswith(".incomplete") and not blob.name.startswith("tmp_"):
            assert blob.read_bytes() == names[blob.name]
    for path in (repo / "snapshots").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == files[path.name]
    assert not (repo / "refs" / "main").exists()
    assert not (repo / "gemma-serve").exists()


def asked_for(hub: LocalHub, name: str) -> list[Request]:
    """The requests for a file's bytes, not those of its length."""
    return [r for r in hub.requests if (r.method, r.name, r.route) == ("GET", name, "cdn")]


def forget(hub: LocalHub) -> None:
    """What was asked so far is of no interest."""
    hub.asked.clear()
    hub.requests.clear()
    hub.sent.clear()


def start(hub: LocalHub, home: Path, *args: str, token: str | None = None) -> Program:
    """`gemma-serve download` as a child, with a cache of its own below `home`."""
    flags = ["download", "--model", NAME, *args]
    if "--debug" in flags:
        flags.remove("--debug")
        flags.insert(0, "--debug")
    return Program(*flags, environ=environ(hub.url, home, token))


def when(happened: threading.Event, then: Callable[[], object]) -> threading.Thread:
    """Do something in another thread once something happened."""

    def run() -> None:
        if happened.wait(30):
            then()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


# What is brought


def test_just_what_vllm_reads_is_brought_into_the_clients_own_cache(hub: LocalHub) -> None:
    events: list[Event] = []
    result = bring(events)
    commit = hub.repos[NAME].commit()  # type: ignore[index]
    total = sum(map(len, WANTED.values()))
    folder = repo_folder() / "snapshots" / commit
    files = listed(in_order(WANTED))
    assert result == DownloadResult(NAME, folder, commit, files, total, result.duration_s, ())
    assert_whole(hub)
    # config.json once more, to see whether it may be read.
    sent = {name: len(content) for name, content in WANTED.items()}
    sent["config.json"] *= 2
    assert {n: hub.sent[n] for n in hub.sent.keys() & {*WANTED, *UNWANTED}} == sent

    first, *progress, last = (e for e in events if not isinstance(e, CheckingFiles))
    assert first == DownloadBegan(NAME, commit, folder, len(files), total, total)
    assert isinstance(last, DownloadEnded)
    assert last == DownloadEnded(NAME, commit, folder, 6, total, total, last.duration_s)
    assert all(isinstance(event, DownloadProgress) for event in progress)
    done = [event.done_bytes for event in progress]
    assert done == sorted(done)
    assert progress[-1] == replace(progress[-1], done_bytes=total, total_bytes=total, files_done=6)


def test_what_is_here_is_not_brought_again(hub: LocalHub) -> None:
    first = bring()
    forget(hub)
    events: list[Event] = []
    again = bring(events)
    assert again == replace(first, fetched_bytes=0, duration_s=again.duration_s)
    assert {n: sent for n, sent in hub.sent.items() if n in WANTED} == {
        "config.json": len(WANTED["config.json"])
    }
    assert [e for e in events if not isinstance(e, CheckingFiles)] == []
    assert_whole(hub)

    forget(hub)
    assert bring(refresh=False) == replace(again, duration_s=pytest.approx(0, abs=30))
    assert hub.asked == []


def test_what_the_client_brought_itself_is_compared_and_not_brought_again(hub: LocalHub) -> None:
    for name in WANTED:
        hf_hub_download(NAME, name)
    forget(hub)
    result = bring(refresh=False)
    assert (result.fetched_bytes, result.damaged) == (0, ())
    assert asked_for(hub, FIRST) == asked_for(hub, SECOND) == []
    assert_whole(hub)
    forget(hub)
    assert bring(refresh=False).files == listed(in_order(WANTED))
    assert hub.asked == []


def test_offline_the_cache_will_do_and_nobody_is_asked(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bring()
    forget(hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert bring() == replace(first, fetched_bytes=0, duration_s=pytest.approx(0, abs=30))
    assert hub.asked == []
    shutil.rmtree(cache())
    assert refused()[0] == ["offline-cache-miss"]
    assert hub.asked == []


def test_a_new_commit_brings_what_changed(hub: LocalHub) -> None:
    bring()
    forget(hub)
    changed = {**WANTED, "tokenizer_config.json": b'{"bos_token": "<bos>"}'}
    hub.repos = {NAME: Repo(changed)}
    result = bring()
    assert result.commit == hub.repos[NAME].commit()
    assert asked_for(hub, FIRST) == asked_for(hub, SECOND) == []
    assert contents(result.folder) == dict(sorted(changed.items()))
    assert (repo_folder() / "refs" / "main").read_text() == result.commit


def test_a_small_file_that_was_lost_counts_as_brought(hub: LocalHub) -> None:
    result = bring()
    (result.folder / "tokenizer.json").resolve().unlink()
    (result.folder / "tokenizer.json").unlink()
    assert bring(refresh=False).fetched_bytes == len(WANTED["tokenizer.json"])
    assert_whole(hub)


def test_a_branch_and_a_commit_are_brought_under_their_own_names(hub: LocalHub) -> None:
    other = {**SHORT, "tokenizer.json": b"{}"}
    hub.repos = {NAME: Repo(WANTED, revisions={"v2": other})}
    commit = hub.repos[NAME].commit("v2")
    result = bring(revision="v2")
    assert (result.commit, contents(result.folder)) == (commit, dict(sorted(other.items())))
    refs = repo_folder() / "refs"
    assert {path.name: path.read_text() for path in refs.iterdir()} == {"v2": commit}
    forget(hub)
    assert bring(revision=commit, refresh=False).folder == result.folder
    assert hub.asked == []


# The Hub has a newer commit than the cache, which the client itself has filled

NEWER = {**WANTED, "tokenizer_config.json": b'{"bos_token": "<bos>"}', FIRST: weights("c", CHUNK)}


@pytest.fixture
def moved_on(hub: LocalHub) -> tuple[str, str]:
    """The commit that is cached, without tokenizer_config.json, and the one of `main`."""
    former = Path(snapshot_download(NAME)).name
    lost = repo_folder() / "snapshots" / former / "tokenizer_config.json"
    lost.resolve().unlink()
    lost.unlink()
    assert hub.repos is not None
    hub.repos[NAME].files = NEWER
    forget(hub)
    return former, hub.repos[NAME].commit()


def test_what_is_cached_is_made_whole_and_nothing_newer_is_fetched(
    hub: LocalHub, moved_on: tuple[str, str]
) -> None:
    former, newer = moved_on
    result = bring(refresh=False)
    assert (result.commit, result.damaged) == (former, ())
    assert result.fetched_bytes == len(WANTED["tokenizer_config.json"])
    assert contents(result.folder).items() >= WANTED.items()
    assert (repo_folder() / "refs" / "main").read_text() == former
    assert not (repo_folder() / "snapshots" / newer).exists()
    assert {r.revision for r in hub.requests if r.route in ("api", "resolve")} == {former}
    assert hub.sent.keys() & {FIRST, SECOND} == set()
    forget(hub)
    assert bring(refresh=False).commit == former
    assert hub.asked == []


def test_the_newer_one_is_fetched_where_that_is_wanted(
    hub: LocalHub, moved_on: tuple[str, str]
) -> None:
    _, newer = moved_on
    result = bring(refresh=True)
    assert result.commit == newer
    assert contents(result.folder) == dict(sorted(NEWER.items()))
    assert (repo_folder() / "refs" / "main").read_text() == newer
    assert hub.sent[FIRST] == len(NEWER[FIRST])
    assert asked_for(hub, SECOND) == []
    assert bring(refresh=False).commit == newer


@pytest.mark.parametrize(
    ("hindrance", "code"), [("disk", "disk-full"), ("licence", "gated-no-token")]
)
def test_what_keeps_the_newer_one_away_is_a_warning_unless_it_is_wanted(
    hub: LocalHub,
    moved_on: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    hindrance: str,
    code: str,
) -> None:
    former, newer = moved_on
    if hindrance == "disk":
        monkeypatch.setattr(host, "free_disk_bytes", lambda _: 0)
    else:
        hub.repos[NAME].gated = "manual"  # type: ignore[index]
    with pytest.raises(GemmaServeError) as caught:
        bring(refresh=True)
    assert caught.value.exit_code == 1
    assert [(p.code, p.blocking) for p in caught.value.problems] == [(code, True)]

    events: list[Event] = []
    assert bring(events, refresh=False).commit == former
    noticed = [event.problem for event in events if isinstance(event, Noticed)]
    assert [(p.code, p.blocking) for p in noticed] == [(code, False)]
    assert not (repo_folder() / "snapshots" / newer).exists()
    assert hub.sent.keys() & {FIRST, SECOND} == set()


# The Hub, or who answers in its place, wants to write elsewhere


def outside(tmp_path: Path) -> set[str]:
    """What is beside the places that a download may write to."""
    return {path.name for path in tmp_path.iterdir()} - {"hub", "state", "model"}


@pytest.mark.parametrize("into", ["cache", "folder"])
@pytest.mark.parametrize("weights_too", [True, False])
def test_no_name_in_a_listing_leads_out_of_the_folder(
    hub: LocalHub, tmp_path: Path, into: str, weights_too: bool
) -> None:
    """Without safetensors it is pickles, whose names have more forms."""
    evil = ("pytorch_model/../../evil.bin", "../x.json", f"{tmp_path}/abs.json", "../../y.json")
    good = SHORT if weights_too else SMALL
    hub.repos = {NAME: Repo({**good, **dict.fromkeys(evil, b"{}")})}
    to = tmp_path / "model" if into == "folder" else None
    if weights_too:
        result = bring(to=to)
        assert result.files == listed(in_order(SHORT))
        assert contents(result.folder) == dict(sorted(SHORT.items()))
    else:
        assert refused(to=to)[0] == ["weights-missing"]
    assert outside(tmp_path) == set()
    found = {p.name for p in tmp_path.rglob("*")}
    assert found & {"evil.bin", "x.json", "abs.json", "y.json"} == set()
    assert hub.sent.keys() & {*evil, "evil.bin", "x.json", "abs.json", "y.json"} == set()


@dataclass
class OddHub(LocalHub):
    """A Hub that calls the content of one file by another name than its checksum."""

    odd: str = ""
    etag: str = ""

    def answer(self, request: Request) -> Any:
        answer = super().answer(request)
        if request.route != "resolve" or request.name != self.odd:
            return answer
        named = {"ETag": f'"{self.etag}"', "X-Linked-Etag": f'"{self.etag}"'}
        return replace(answer, headers={**answer.headers, **named})


@pytest.mark.parametrize("into", ["cache", "folder"])
@pytest.mark.parametrize("odd", [ONE, "tokenizer.json"])
@pytest.mark.parametrize("etag", ["../../../evil", "a/b", ".."])
def test_no_etag_leads_out_of_the_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, etag: str, odd: str, into: str
) -> None:
    made = OddHub(repos={NAME: Repo(SHORT)}, odd=odd, etag=etag)
    with serving(made) as hub:
        local_hub.use(monkeypatch, hub.url)
        to = tmp_path / "model" if into == "folder" else None
        codes, told = refused(to=to)
        let_end()
    assert codes == ["hub.unreachable"]
    assert "its answer is not the Hub's" in told
    assert outside(tmp_path) == set()
    assert [p for p in tmp_path.rglob("*") if p.name.startswith(("evil", "a"))] == []
    if to is None:
        assert_nothing_half(SHORT)


# The connection breaks

CUTS = [0, 1, 7, 8, 100, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK - 1, 3 * CHUNK]
CUTS += [3 * CHUNK + 1, len(SHORT[ONE]) - 2, len(SHORT[ONE]) - 1]
CUTS += random.Random(7).sample(range(len(SHORT[ONE])), 6)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("at", CUTS)
def test_a_connection_that_is_cut_once_costs_a_chunk_at_most(short: LocalHub, at: int) -> None:
    short.faults.append(Cut(ONE, after_bytes=at, times=1))
    bring()
    assert short.faults[0].happened == 1
    assert_whole(short, SHORT)
    assert short.sent[ONE] <= len(SHORT[ONE]) + CHUNK
    ranges = [request.range for request in asked_for(short, ONE)]
    kept = at // CHUNK * CHUNK
    assert ranges == [None, f"bytes={kept}-" if kept else None]


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("at", [0, 5, len(SHORT["tokenizer.json"]) - 1])
def test_a_small_file_that_is_cut_is_fetched_again(short: LocalHub, at: int) -> None:
    short.faults.append(Cut("tokenizer.json", after_bytes=at, times=1))
    bring()
    assert short.faults[0].happened == 1
    assert_whole(short, SHORT)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("at", [CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK])
def test_a_connection_that_is_cut_again_and_again_ends_whole(short: LocalHub, at: int) -> None:
    cut = Cut(ONE, after_bytes=at)
    short.faults.append(cut)
    bring()
    assert cut.happened >= 1
    assert_whole(short, SHORT)
    assert short.sent[ONE] <= len(SHORT[ONE]) + cut.happened * CHUNK


@pytest.mark.usefixtures("hasty")
def test_a_connection_that_brings_nothing_is_given_up_and_what_came_is_kept(
    short: LocalHub,
) -> None:
    cuts = [Cut(ONE, after_bytes=2 * CHUNK + 5, times=1), Cut(ONE, after_bytes=5)]
    short.faults += cuts
    assert refused()[0] == ["hub.unreachable"]
    assert partial(ONE, SHORT).stat().st_size == 2 * CHUNK
    assert_nothing_half(SHORT)
    short.faults.clear()
    forget(short)
    result = bring()
    assert [request.range for request in asked_for(short, ONE)] == [f"bytes={2 * CHUNK}-"]
    assert short.sent[ONE] == len(SHORT[ONE]) - 2 * CHUNK == result.fetched_bytes
    assert_whole(short, SHORT)


@pytest.mark.usefixtures("hasty")
def test_without_ranges_it_begins_anew_and_ends_whole(short: LocalHub) -> None:
    short.faults += [Cut(ONE, after_bytes=2 * CHUNK + 5, times=1), NoRanges(ONE)]
    bring()
    assert_whole(short, SHORT)
    # The oldest clients put it behind what they had, and it comes once more.
    assert short.sent[ONE] <= 2 * len(SHORT[ONE]) + 2 * CHUNK + 5


@pytest.mark.parametrize(
    "begun",
    [b"", b"\0", bytes(CHUNK), SHORT[ONE][:-1], SHORT[ONE], SHORT[ONE] + b"+", bytes(2**22)],
    ids=["nothing", "another byte", "others", "all but one", "all", "and more", "far more"],
)
def test_whatever_a_file_was_begun_with_it_ends_whole(short: LocalHub, begun: bytes) -> None:
    path = partial(ONE, SHORT)
    path.parent.mkdir(parents=True)
    path.write_bytes(begun)
    bring()
    assert_whole(short, SHORT)
    if SHORT[ONE].startswith(begun):
        assert short.sent.get(ONE, 0) == len(SHORT[ONE]) - len(begun)


# The program is stopped

HELD = 3 * CHUNK + 1000


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_download_that_was_stopped_goes_on_where_it_was(
    hub: LocalHub, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    hold = Hold(FIRST, after_bytes=HELD, times=1)
    hub.faults.append(hold)
    home = tmp_path / "home"
    begun = partial(FIRST, folder=home / "hub")
    with start(hub, home, "--json") as program:
        assert hold.reached.wait(60)
        # All that came is on the disk, in whole chunks.
        eventually(lambda: begun.is_file() and begun.stat().st_size == 3 * CHUNK, "three chunks")
        assert_nothing_half(folder=home / "hub")
        program.send(signum)
        assert program.exit_code() == code
        # The Hub holds on to the old connection until the end.
        if signum != signal.SIGKILL:
            last = program.json_lines[-1]
            assert (last["command"], last["ok"]) == ("download", False)
            assert [problem["code"] for problem in last["problems"]] == ["stopped"]
    assert begun.stat().st_size == 3 * CHUNK
    assert_nothing_half(folder=home / "hub")

    forget(hub)
    with start(hub, home, "--json") as program:
        assert program.exit_code() == 0
        data = program.json_lines[-1]["data"]
    assert [r.range for r in asked_for(hub, FIRST)] == [f"bytes={3 * CHUNK}-"]
    assert hub.sent[FIRST] == len(WANTED[FIRST]) - 3 * CHUNK
    assert_whole(hub, folder=home / "hub")
    assert data["commit"] == hub.repos[NAME].commit()  # type: ignore[index]
    assert [file["name"] for file in data["files"]] == list(in_order(WANTED))
    assert data["total_bytes"] == sum(map(len, WANTED.values()))
    assert 0 < data["fetched_bytes"] <= data["total_bytes"] - 3 * CHUNK


def test_two_at_once_bring_each_file_once(hub: LocalHub, tmp_path: Path) -> None:
    hold = Hold(FIRST, after_bytes=HELD, times=1)
    hub.faults.append(hold)
    home = tmp_path / "home"

    def lengths_asked() -> int:
        return sum((r.method, r.name) == ("HEAD", FIRST) for r in list(hub.requests))

    with start(hub, home) as one:
        assert hold.reached.wait(60)
        before = lengths_asked()
        with start(hub, home) as two:
            eventually(lambda: lengths_asked() > before, "the other wants the same file")
            hold.go_on.set()
            assert [one.exit_code(), two.exit_code()] == [0, 0], (one.err, two.err)
            assert one.out == two.out
    assert_whole(hub, folder=home / "hub")
    sent = {name: len(content) for name, content in WANTED.items() if name != "config.json"}
    assert {name: hub.sent[name] for name in sent} == sent


# What comes is not what was promised


def test_wrong_content_is_fetched_once_more(short: LocalHub) -> None:
    short.faults.append(WrongContent(ONE, after_bytes=CHUNK, times=1))
    bring()
    assert_whole(short, SHORT)
    assert short.sent[ONE] == 2 * len(SHORT[ONE])


@pytest.mark.parametrize("name", [ONE, "tokenizer.json"])
def test_content_that_is_always_wrong_gets_no_real_name(short: LocalHub, name: str) -> None:
    short.faults.append(WrongContent(name, method="GET"))
    codes, told = refused()
    assert codes == ["hub.wrong_content"]
    assert told.startswith(f"{name} of {NAME} came twice from {short.url} and is not what")
    assert_nothing_half(SHORT)
    short.faults.clear()
    bring()
    assert_whole(short, SHORT)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("by", [-CHUNK, -1, 1, CHUNK])
def test_a_wrong_length_gets_no_real_name(short: LocalHub, by: int) -> None:
    fault = WrongLength(ONE, by=by, times=1)
    short.faults.append(fault)
    bring()
    assert_whole(short, SHORT)
    # What ended early is gone on with, what is too long begun anew.
    kept = f"bytes={len(SHORT[ONE]) + by}-" if by < 0 else None
    assert [request.range for request in asked_for(short, ONE)] == [None, kept]
    shutil.rmtree(cache())
    fault.times = None
    codes, told = refused()
    assert codes == ["hub.wrong_content"]
    assert f"{len(SHORT[ONE]) + by:,} bytes instead of {len(SHORT[ONE]):,}" in told
    assert_nothing_half(SHORT)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("into", ["cache", "folder"])
@pytest.mark.parametrize("by", [-1, 1])
def test_a_small_file_of_a_wrong_length_gets_no_real_name(
    short: LocalHub, tmp_path: Path, by: int, into: str
) -> None:
    to = tmp_path / "model" if into == "folder" else None
    fault = WrongLength("tokenizer.json", by=by, method="GET")
    short.faults.append(fault)
    codes, told = refused(to=to)
    assert codes == ["hub.wrong_content"]
    assert told.startswith(f"tokenizer.json of {NAME} came twice from {short.url} and is not what")
    if to is None:
        assert_nothing_half(SHORT)
    else:
        assert "tokenizer.json" not in contents(to)
    fault.times = fault.happened + 1
    assert contents(bring(to=to).folder) == dict(sorted(SHORT.items()))
    assert fault.happened == fault.times


def test_a_weight_file_that_is_broken_on_the_hub_is_refused(hub: LocalHub) -> None:
    broken = {**WANTED, SECOND: random.Random(1).randbytes(2 * CHUNK)}
    hub.repos = {NAME: Repo(broken)}
    codes, told = refused()
    assert codes == ["weights-truncated"]
    assert SECOND in told
    assert_nothing_half(broken)


def test_a_shard_that_the_repository_lacks_is_said(hub: LocalHub) -> None:
    lacking = {name: content for name, content in WANTED.items() if name != SECOND}
    hub.repos = {NAME: Repo(lacking)}
    codes, told = refused()
    assert codes == ["weights-missing"]
    assert SECOND in told
    assert_nothing_half(lacking)


@pytest.mark.parametrize("into", ["cache", "folder"])
def test_a_model_without_a_tokenizer_can_be_had(hub: LocalHub, tmp_path: Path, into: str) -> None:
    """It may be served with the tokenizer of another; `check` and `up` say if none is named."""
    lacking = {name: content for name, content in SHORT.items() if name != "tokenizer.json"}
    hub.repos = {NAME: Repo(lacking)}
    to = tmp_path / "model" if into == "folder" else None
    assert {file.name for file in bring(to=to).files} == set(lacking) & set(in_order(lacking))
    forget(hub)
    assert bring(to=to, refresh=to is not None).fetched_bytes == 0


def test_only_the_shards_that_the_index_names_are_kept_in_the_answer(hub: LocalHub) -> None:
    odd = {
        **WANTED,
        "odd.safetensors": weights("odd", 2000),
        INDEX: index(FIRST, "odd.safetensors"),
    }
    hub.repos = {NAME: Repo(odd)}
    result = bring()
    assert [file.name for file in result.files if file.name.endswith(".safetensors")] == [
        FIRST,
        "odd.safetensors",
    ]
    assert (result.folder / "odd.safetensors").read_bytes() == odd["odd.safetensors"]


# What is here is damaged


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def dangle(path: Path) -> None:
    target = path.resolve()
    target.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "truncated": (
        lambda path: os.truncate(path, 1000),
        f"1,000 bytes instead of {len(WANTED[SECOND]):,}",
    ),
    "altered": (flip, "its checksum is not the one that the Hub promises"),
    "removed": (lambda path: path.unlink(), None),
    "dangling": (dangle, None),
}


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_and_fetched_again(
    hub: LocalHub, damage: str, refresh: bool
) -> None:
    shard = bring().folder / SECOND
    forget(hub)
    break_it, found = DAMAGES[damage]
    break_it(shard)
    events: list[Event] = []
    result = bring(events, refresh=refresh)
    named = [event for event in events if isinstance(event, FileDamaged)]
    assert named == ([] if found is None else [FileDamaged(SECOND, found)])
    assert result.damaged == tuple(event.file for event in named)
    assert asked_for(hub, FIRST) == []
    # Where the link alone is gone, the blob is still good.
    assert hub.sent.get(SECOND, 0) == (0 if damage == "removed" else len(WANTED[SECOND]))
    assert_whole(hub)


@pytest.mark.parametrize("damage", DAMAGES)
def test_offline_a_damaged_shard_is_refused_by_name(
    hub: LocalHub, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = bring().folder / SECOND
    forget(hub)
    DAMAGES[damage][0](shard)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(GemmaServeError) as caught:
        bring()
    assert caught.value.exit_code == 1
    codes = [problem.code for problem in caught.value.problems]
    gone = "weights-missing" if damage in ("removed", "dangling") else "weights-truncated"
    assert codes in ([gone], ["offline-cache-miss", gone])
    assert SECOND in caught.value.problems[-1].message
    assert hub.asked == []


def test_a_blob_that_is_damaged_is_mended_though_the_snapshot_has_lost_it(hub: LocalHub) -> None:
    """As another download leaves it, which has noticed and not yet mended it."""
    link = bring().folder / SECOND
    flip(link.resolve())
    link.unlink()
    forget(hub)
    result = bring()
    assert (result.fetched_bytes, result.damaged) == (len(WANTED[SECOND]), ())
    assert asked_for(hub, FIRST) == []
    assert_whole(hub)


def test_two_that_find_the_same_damage_mend_it_once(hub: LocalHub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    flip(bring(cache_dir=home / "hub").folder / SECOND)
    forget(hub)
    hold = Hold(SECOND, after_bytes=CHUNK, times=1)
    hub.faults.append(hold)

    def lengths_asked() -> int:
        return sum((r.method, r.name) == ("HEAD", SECOND) for r in list(hub.requests))

    with start(hub, home) as one:
        assert hold.reached.wait(60)
        before = lengths_asked()
        with start(hub, home) as two:
            eventually(lambda: lengths_asked() > before, "the other wants the same file")
            hold.go_on.set()
            assert [one.exit_code(), two.exit_code()] == [0, 0], (one.err, two.err)
    assert hub.sent[SECOND] == len(WANTED[SECOND])
    assert_whole(hub, folder=home / "hub")


def test_a_file_that_changes_after_its_check_is_not_noted_as_right(hub: LocalHub) -> None:
    snapshot = Path(snapshot_download(NAME))
    (snapshot / SECOND).resolve().unlink()
    (snapshot / SECOND).unlink()
    before = stamp(snapshot / FIRST, checksum(FIRST))
    hold = Hold(SECOND, after_bytes=CHUNK, times=1)
    hub.faults.append(hold)

    def spoil() -> None:
        flip(snapshot / FIRST)
        hold.go_on.set()

    helper = when(hold.reached, spoil)
    assert bring().damaged == ()
    helper.join()
    manifest = read_manifest(snapshot)
    assert manifest is not None
    assert manifest.files[FIRST] == before
    assert manifest.files[SECOND] == stamp(snapshot / SECOND, checksum(SECOND))
    assert bring(refresh=False).damaged == (FIRST,)
    assert (snapshot / FIRST).read_bytes() == WANTED[FIRST]


def test_where_the_cache_takes_no_manifest_it_is_read_and_asked_about_once(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file in place of the folder: nobody can write there, root neither.
    repo_folder().mkdir(parents=True)
    (repo_folder() / "gemma-serve").write_bytes(b"")
    first = bring()
    elsewhere = tmp_path / "state" / "checked"
    assert len(list(elsewhere.iterdir())) == 1

    def read(*_: object) -> str:
        raise AssertionError("a file is read")

    forget(hub)
    with monkeypatch.context() as patched:
        patched.setattr(checksums, "content_checksum", read)
        assert bring(refresh=False).files == first.files
    assert hub.asked == []

    (repo_folder() / "gemma-serve").unlink()
    os.utime((first.folder / FIRST).resolve(), ns=(1, 1))
    assert bring(refresh=False).files == first.files
    assert list(elsewhere.iterdir()) == []
    assert manifest_path(first.folder).is_file()
    assert hub.asked == []


def test_a_cache_without_links_holds_no_weights_twice(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(constants, "HF_HUB_DISABLE_SYMLINKS"):
        pytest.skip("this client always makes links where it can")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    result = bring()
    assert contents(result.folder) == dict(sorted(WANTED.items()))
    assert not any(path.is_symlink() for path in result.folder.iterdir())
    assert list((repo_folder() / "blobs").iterdir()) == []
    forget(hub)
    assert bring().fetched_bytes == 0
    assert asked_for(hub, FIRST) == asked_for(hub, SECOND) == []
    # One that is damaged is fetched again, and once.
    flip(result.folder / SECOND)
    again = bring(refresh=False)
    assert (again.damaged, again.fetched_bytes) == ((SECOND,), len(WANTED[SECOND]))
    assert contents(result.folder) == dict(sorted(WANTED.items()))
    assert list((repo_folder() / "blobs").iterdir()) == []


# Nothing comes


@pytest.mark.usefixtures("hasty")
def test_a_hub_that_falls_silent_is_unreachable_and_what_came_is_kept(
    short: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.15)
    hold = Hold(ONE, after_bytes=2 * CHUNK + 9, times=1)
    short.faults.append(hold)
    helper = when(hold.reached, lambda: short.faults.append(Hang(ONE, method="GET")))
    assert refused()[0] == ["hub.unreachable"]
    helper.join()
    assert partial(ONE, SHORT).stat().st_size == 2 * CHUNK
    assert_nothing_half(SHORT)


def test_a_hub_that_never_begins_is_unreachable_soon(
    short: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = bring()
    (result.folder / ONE).resolve().unlink()
    # The client itself would try 6 times, with pauses of a second.
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1.0)
    short.faults.append(Hang(ONE, method="GET"))
    codes, told = refused()
    assert codes == ["hub.unreachable"]
    assert told.startswith(f"nothing came from {short.url} for 2 s")


# The disk is full


def test_a_full_disk_is_said_before_the_first_byte(short: LocalHub) -> None:
    listing = httpx.get(f"{short.url}/api/models/{NAME}?blobs=true").json()
    for file in listing["siblings"]:
        if file["rfilename"] == ONE:
            file["size"] = file["lfs"]["size"] = 10**15
    short.answers = {"api": json.dumps(listing).encode()}
    codes, message = refused()
    assert codes == ["disk-full"]
    assert message.startswith("the disk is full: 931322.57 GiB are to be downloaded")
    assert [r for r in short.requests if r.name in SHORT and r.name != "config.json"] == []
    assert not repo_folder().exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, whose size may be changed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip(f"this account may not mount a disk: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def test_a_disk_that_fills_up_on_the_way_keeps_what_came(short: LocalHub, small_disk: Path) -> None:
    hold = Hold(ONE, after_bytes=CHUNK + 5, times=1)
    short.faults.append(hold)
    snapshots = small_disk / repo_folder().name / "snapshots"

    def fill() -> None:
        # The small files come at the same time, and are to be here before.
        eventually(lambda: len(list(snapshots.glob("*/*"))) == len(SMALL), "the small files")
        resize(small_disk, 2 * CHUNK + 200 * 2**10)
        hold.go_on.set()

    helper = when(hold.reached, fill)
    codes, told = refused(cache_dir=small_disk)
    helper.join()
    begun = partial(ONE, SHORT, small_disk)
    assert codes == ["disk-full"]
    assert str(begun) in told
    kept = begun.stat().st_size
    # Of the last chunk as much as there was room for.
    assert 2 * CHUNK < kept < 3 * CHUNK
    assert_nothing_half(SHORT, small_disk)

    resize(small_disk, 2**30)
    forget(short)
    bring(cache_dir=small_disk)
    assert [request.range for request in asked_for(short, ONE)] == [f"bytes={kept}-"]
    assert short.sent[ONE] == len(SHORT[ONE]) - kept
    assert_whole(short, SHORT, small_disk)


_LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
runpy.run_module("gemma_serve", run_name="__main__", alter_sys=True)
"""


def test_a_file_that_may_not_grow_is_a_full_disk(short: LocalHub, tmp_path: Path) -> None:
    home, limit = tmp_path / "home", 2 * CHUNK + 7
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(limit), "download", "--model", NAME, "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, **environ(short.url, home)},
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, done.stderr) == (1, "")
    assert [problem["code"] for problem in answer["problems"]] == ["disk-full"]
    assert partial(ONE, SHORT, home / "hub").stat().st_size == limit
    assert_nothing_half(SHORT, home / "hub")
    forget(short)
    bring(cache_dir=home / "hub")
    assert [request.range for request in asked_for(short, ONE)] == [f"bytes={limit}-"]
    assert_whole(short, SHORT, home / "hub")


# Into a plain folder


def test_a_folder_gets_plain_files_and_a_manifest(hub: LocalHub, tmp_path: Path) -> None:
    to = tmp_path / "model"
    result = bring(to=to)
    total = sum(map(len, WANTED.values()))
    assert result == DownloadResult(
        NAME, to, result.commit, listed(in_order(WANTED)), total, result.duration_s
    )
    assert contents(to) == dict(sorted(WANTED.items()))
    assert not any(path.is_symlink() for path in to.rglob("*"))
    manifest = read_manifest(to)
    assert manifest is not None
    assert (manifest.model, manifest.commit) == (NAME, result.commit)
    assert manifest.listing == result.files
    # The cache has nothing to do with it.
    assert not repo_folder().exists()

    forget(hub)
    assert bring(to=to).fetched_bytes == 0
    assert asked_for(hub, FIRST) == asked_for(hub, SECOND) == []


def test_a_folder_is_filled_from_the_cache(hub: LocalHub, tmp_path: Path) -> None:
    bring()
    forget(hub)
    to = tmp_path / "model"
    assert bring(to=to).fetched_bytes == 0
    assert contents(to) == dict(sorted(WANTED.items()))
    assert not any(path.is_symlink() for path in to.rglob("*"))
    assert {n: sent for n, sent in hub.sent.items() if n in WANTED} == {
        "config.json": len(WANTED["config.json"])
    }
    assert_whole(hub)


def test_offline_a_folder_is_filled_from_the_cache_too(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = bring().commit
    forget(hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    to = tmp_path / "model"
    assert bring(to=to).commit == commit
    assert contents(to) == dict(sorted(WANTED.items()))
    assert hub.asked == []


def test_a_damaged_cache_does_not_spoil_a_folder(hub: LocalHub, tmp_path: Path) -> None:
    cached = bring().folder
    flip(cached / FIRST)
    os.truncate(cached / SECOND, 1000)
    forget(hub)
    to = tmp_path / "model"
    bring(to=to)
    assert contents(to) == dict(sorted(WANTED.items()))


@pytest.mark.usefixtures("hasty")
def test_a_folder_is_gone_on_with(hub: LocalHub, tmp_path: Path) -> None:
    to = tmp_path / "model"
    hub.faults += [Cut(FIRST, after_bytes=HELD, times=1), Cut(FIRST, after_bytes=5)]
    assert refused(to=to)[0] == ["hub.unreachable"]
    assert FIRST not in contents(to)
    assert (to / f".{FIRST}.incomplete").stat().st_size == 3 * CHUNK
    # It is known as ours, and as half a one.
    commit = hub.repos[NAME].commit()  # type: ignore[index]
    mark = read_manifest(to)
    assert mark is not None
    assert (mark.model, mark.commit, mark.broken_off) == (NAME, commit, True)
    assert set(mark.files) == set(WANTED)
    with pytest.raises(GemmaServeError) as caught:
        verify(to)
    assert caught.value.exit_code == 1
    assert list(caught.value.problems) == [
        Problem(
            "weights-missing",
            f"weights of the model are missing: the download of {NAME} into {to} did not end",
            f"run it again: `gemma-serve download --model {NAME} --revision {commit} --to {to}`",
        )
    ]
    hub.faults.clear()
    forget(hub)
    result = bring(to=to)
    assert verify(to).files == result.files
    assert [request.range for request in asked_for(hub, FIRST)] == [f"bytes={3 * CHUNK}-"]
    assert contents(to) == dict(sorted(WANTED.items()))


@pytest.mark.usefixtures("hasty")
def test_what_was_begun_in_a_folder_counts_against_the_room_for_the_rest(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "model"
    hub.faults += [Cut(FIRST, after_bytes=HELD, times=1), Cut(FIRST, after_bytes=5)]
    assert refused(to=to)[0] == ["hub.unreachable"]
    here = sum(path.stat().st_size for path in to.iterdir() if path.name != ".gemma-serve.json")
    assert here >= 3 * CHUNK
    hub.faults.clear()
    room = sum(map(len, WANTED.values())) - here + 256 * 2**20
    monkeypatch.setattr(host, "free_disk_bytes", lambda _: room - 1)
    assert refused(to=to)[0] == ["disk-full"]
    monkeypatch.setattr(host, "free_disk_bytes", lambda _: room)
    bring(to=to)
    assert contents(to) == dict(sorted(WANTED.items()))


def test_offline_a_full_disk_is_said_before_a_file_is_copied(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring()
    forget(hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(host, "free_disk_bytes", lambda _: 0)
    to = tmp_path / "model"
    assert refused(to=to)[0] == ["disk-full"]
    assert not to.exists()
    assert hub.asked == []


OWN = {
    "another config": {"config.json": b"{}"},
    "notes": {"notes.txt": b"mine"},
    "a folder": {"mine/data.bin": b"mine"},
    "notes beside the model": {**WANTED, "notes.txt": b"mine"},
}


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_a_folder_with_files_of_somebodys_own_is_left_alone(
    hub: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], own: Mapping[str, bytes]
) -> None:
    to = tmp_path / "model"
    for name, content in own.items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(content)
    assert main(["download", "--model", NAME, "--to", str(to), "--json"]) == 2
    [problem] = json.loads(capsys.readouterr().out)["problems"]
    stranger = "notes.txt" if "notes.txt" in own else next(iter(own)).partition("/")[0]
    assert (problem["code"], problem["message"], problem["hint"]) == (
        "download.not_empty",
        f"{to} holds {stranger}, which is not of {NAME}; a new or an empty folder is wanted",
        f"give another one: `--to {to}-gemma-7b-it`",
    )
    assert contents(to) == dict(sorted(own.items()))
    assert not manifest_path(to).exists()
    assert hub.sent.keys() & {FIRST, SECOND} == set()


def test_a_folder_that_the_client_made_is_taken_over(hub: LocalHub, tmp_path: Path) -> None:
    to = tmp_path / "model"
    snapshot_download(NAME, local_dir=to)
    before = contents(to)
    forget(hub)
    result = bring(to=to)
    assert (result.fetched_bytes, result.files) == (0, listed(in_order(WANTED)))
    assert contents(to) == before
    assert before.items() >= {**WANTED, **UNWANTED}.items()
    assert hub.sent.keys() & {FIRST, SECOND} == set()
    assert verify(to).files == result.files


def test_a_file_is_no_folder(hub: LocalHub, tmp_path: Path) -> None:
    to = tmp_path / "file"
    to.write_bytes(b"mine")
    with start(hub, tmp_path / "home", "--to", str(to), "--json") as program:
        assert program.exit_code() in (1, 2)
    (problem,) = program.json_lines[-1]["problems"]
    assert problem["code"] != "internal"
    assert str(to) in problem["message"]
    assert to.read_bytes() == b"mine"


@pytest.mark.parametrize("into", ["cache", "folder"])
def test_what_the_client_transfers_in_its_own_way_is_compared_too(
    short: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, into: str
) -> None:
    monkeypatch.setenv("HF_XET_HIGH_PERFORMANCE", "1")
    to = tmp_path / "model" if into == "folder" else None
    wrong = WrongContent(ONE, after_bytes=CHUNK)
    short.faults.append(wrong)
    assert refused(to=to)[0] == ["hub.wrong_content"]
    assert to is None or ONE not in contents(to)
    wrong.times = wrong.happened + 1
    assert contents(bring(to=to).folder).items() >= SHORT.items()
    assert wrong.happened == wrong.times


@pytest.mark.parametrize("place", ["cache", "folder"])
def test_what_the_client_has_of_a_file_on_the_way_is_seen(tmp_path: Path, place: str) -> None:
    """It names what it begins after the checksum, in a place of its own."""
    file = RepoFile(ONE, 1000, checksum(ONE, SHORT))
    begun = {
        "cache": repo_folder(tmp_path) / "blobs" / f"{file.checksum}.ab12.incomplete",
        "folder": tmp_path / f".cache/huggingface/download/cd34.{file.checksum}.incomplete",
    }[place]
    assert size_on_the_way(NAME, file, tmp_path) == 0
    begun.parent.mkdir(parents=True)
    for size, told in ((0, 0), (600, 600), (1200, 1000)):
        begun.write_bytes(bytes(size))
        assert size_on_the_way(NAME, file, tmp_path) == told


def test_another_model_does_not_go_into_the_same_folder(hub: LocalHub, tmp_path: Path) -> None:
    assert hub.repos is not None
    hub.repos = {**hub.repos, OTHER: Repo(SHORT)}
    to = tmp_path / "model"
    bring(to=to)
    with pytest.raises(UsageError) as caught:
        download(DownloadRequest(OTHER, to=to), on_event=[].append)
    assert (caught.value.problems[0].code, caught.value.exit_code) == ("download.not_empty", 2)
    assert caught.value.problems[0].message == (
        f"{to} holds {NAME}, which is not of {OTHER}; a new or an empty folder is wanted"
    )
    assert contents(to) == dict(sorted(WANTED.items()))


def test_a_newer_commit_leaves_no_weights_of_the_older_one(hub: LocalHub, tmp_path: Path) -> None:
    to = tmp_path / "model"
    bring(to=to)
    (to / "notes.txt").write_text("mine")
    hub.repos = {NAME: Repo(SHORT)}
    result = bring(to=to)
    assert contents(to) == dict(sorted({**SHORT, "notes.txt": b"mine"}.items()))
    manifest = read_manifest(to)
    assert manifest is not None
    assert (manifest.commit, manifest.listing) == (result.commit, listed(in_order(SHORT)))


def test_two_do_not_write_to_one_folder(hub: LocalHub, tmp_path: Path) -> None:
    to, hold = tmp_path / "model", Hold(FIRST, after_bytes=HELD, times=1)
    hub.faults.append(hold)
    with start(hub, tmp_path / "home", "--to", str(to)) as program:
        assert hold.reached.wait(60)
        assert refused(to=to)[0] == ["download.busy"]
        hold.go_on.set()
        assert program.exit_code() == 0
        assert program.out == [f"{to}\n"]
    assert contents(to) == dict(sorted(WANTED.items()))


def test_a_folder_is_verified_wherever_it_was_carried(hub: LocalHub, tmp_path: Path) -> None:
    bring(to=tmp_path / "model")
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "model", moved)
    forget(hub)

    assert verify(moved).files == listed(in_order(WANTED))
    flip(moved / FIRST)
    (moved / SECOND).unlink()
    with pytest.raises(GemmaServeError) as caught:
        verify(moved)
    assert [(problem.code, problem.message) for problem in caught.value.problems] == [
        (
            "weights-truncated",
            f"a file of weights is cut short or damaged: {moved / FIRST} is damaged: its checksum "
            "is not the one that the Hub promises",
        ),
        ("weights-missing", f"weights of the model are missing: {moved / SECOND} is missing"),
    ]
    assert caught.value.exit_code == 1
    assert hub.asked == []


# What is shown

TOKEN = "hf_qwertyuiopasdfghjklzxcvbnm123456"
FAULTS: dict[str, Callable[[], list[local_hub.Fault]]] = {
    "none": list,
    "wrong content": lambda: [WrongContent(ONE)],
    "refused": lambda: [Refuse(ONE, method="HEAD", refusal=Refusal(403, "GatedRepo", "no"))],
    "not the token": lambda: [Refuse(refusal=Refusal(401, None, "Invalid credentials"))],
    "no such file": lambda: [
        Refuse("cdn", refusal=Refusal(404)),
        Refuse(ONE, method="GET", refusal=Refusal(404)),
    ],
    "too often": lambda: [Refuse(refusal=Refusal(429, None, "slow down"))],
}


def test_the_token_is_never_shown_and_the_cdn_does_not_get_it(tmp_path: Path) -> None:
    for name, faults in FAULTS.items():
        repos = {NAME: Repo(SHORT, gated="manual")}
        accounts = {TOKEN: Account("alice", {NAME})}
        with serving(LocalHub(repos=repos, accounts=accounts, faults=faults())) as hub:
            programs = [
                start(hub, tmp_path / f"{name} {n}", *flags, token=TOKEN)
                for n, flags in enumerate([[], ["--debug", "--json"]])
            ]
            for program in programs:
                with program:
                    assert program.exit_code() == (0 if name == "none" else 1), name
                    shown = "".join([*program.out, *program.err])
                    assert TOKEN not in shown, name
                    assert TOKEN[3:] not in shown, name
            # It was sent, or there would be nothing to leak.
            assert f"Bearer {TOKEN}" in hub.tokens
            assert {r.token for r in hub.requests if r.route == "cdn"} <= {None}
        for path in tmp_path.rglob("*"):
            if path.is_file():
                assert TOKEN.encode() not in path.read_bytes(), path


def test_a_pipe_gets_plain_lines(hub: LocalHub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    commit = hub.repos[NAME].commit()  # type: ignore[index]
    folder = repo_folder(home / "hub") / "snapshots" / commit
    with start(hub, home) as program:
        assert program.exit_code() == 0
        assert program.out == [f"{folder}\n"]
        first, *progress, last = program.err
    assert first == f"downloading {NAME} at {commit[:12]}: 6 files, 2.0 MiB\n"
    assert re.fullmatch(r"downloaded 2\.0 MiB in \d+ s; all 6 files are whole\n", last)
    assert progress[-1] == "  100 %  2.0 MiB of 2.0 MiB, 6 of 6 files\n"
    assert "\x1b" not in "".join(program.err)
    assert "\r" not in "".join(program.err)


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            DownloadProgress(0, 2**34, 0, 12, None, None),
            "    0 %  0 bytes of 16.00 GiB, 0 of 12 files",
        ),
        (
            DownloadProgress(2**32, 2**34, 3, 12, 112 * 2**20, 109.7),
            "   25 %  4.00 GiB of 16.00 GiB, 3 of 12 files, 112.0 MiB/s, 2 min left",
        ),
        (
            DownloadProgress(2**34 - 1, 2**34, 11, 12, 2**20, 0.4),
            "   99 %  16.00 GiB of 16.00 GiB, 11 of 12 files, 1.0 MiB/s, 0 s left",
        ),
        (
            DownloadProgress(1, 2**40, 0, 1, 2**20, 6 * 3600),
            "    0 %  1 bytes of 1024.00 GiB, 0 of 1 files, 1.0 MiB/s, 6.0 h left",
        ),
        (DownloadProgress(0, 0, 0, 0, None, None), "  100 %  0 bytes of 0 bytes, 0 of 0 files"),
    ],
)
def test_a_line_says_how_far_it_is(event: DownloadProgress, line: str) -> None:
    assert progress_line(event) == line
