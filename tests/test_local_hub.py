"""The Hub of the tests answers as the real one does: asked by the real client, and by hand."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from huggingface_hub import HfApi, file_download, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder

import local_hub
from local_hub import (
    SHA,
    Account,
    Cut,
    Fault,
    FineGrained,
    Hang,
    Hold,
    LocalHub,
    NoRanges,
    Refusal,
    Refuse,
    Repo,
    WrongContent,
    WrongLength,
    environ,
    serving,
)

OPEN, GATED, PRIVATE = "google/open", "google/gated", "alice/private"
CONFIG, WEIGHTS = b'{"model_type": "gemma"}', bytes(range(256)) * 1000
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "sub/notes.txt": b"notes"}
OLD = {"config.json": b"{}"}
ALICE, BOB, FINE = "hf_alice", "hf_bob", "hf_fine"
WEIGHTS_SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    with local_hub.alone(monkeypatch, tmp_path):
        yield


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    made = LocalHub(
        repos={
            OPEN: Repo(dict(FILES), revisions={"v1": OLD, "refs/pr/1": OLD}),
            GATED: Repo(FILES, gated="manual"),
            PRIVATE: Repo(FILES, private=True),
        },
        accounts={
            ALICE: Account("alice", accepted={GATED}),
            BOB: Account("bob"),
            FINE: Account("alice", accepted={GATED}, fine_grained=FineGrained()),
        },
    )
    with serving(made) as served:
        local_hub.use(monkeypatch, served.url)
        yield served


@pytest.fixture
def by_hand(hub: LocalHub) -> Iterator[httpx.Client]:
    """A client that follows the Hub to its CDN, and tries nothing twice."""
    with httpx.Client(
        base_url=hub.url, follow_redirects=True, trust_env=False, timeout=5
    ) as client:
        yield client


def address(name: str, repo: str = OPEN, revision: str = "main") -> str:
    return f"/{repo}/resolve/{revision}/{name}"


def content_of(folder: str | Path) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    f"oid sha256:{WEIGHTS_SHA256}\nsize {len(WEIGHTS)}\n"
).encode()


def test_a_snapshot_is_whole_and_equal(hub: LocalHub) -> None:
    folder = Path(snapshot_download(OPEN))
    assert content_of(folder) == FILES
    assert folder.name == hub.repos[OPEN].commit()
    assert hub.sent["model.safetensors"] >= len(WEIGHTS)
    blobs = {path.name for path in (folder.parents[1] / "blobs").iterdir()}
    assert blobs == {git_oid(CONFIG), git_oid(b"notes"), WEIGHTS_SHA256}


def test_a_file_of_lfs_comes_from_the_cdn_which_gets_no_token(hub: LocalHub) -> None:
    path = hf_hub_download(GATED, "model.safetensors", token=ALICE)
    assert Path(path).read_bytes() == WEIGHTS
    assert [(r.method, r.route, r.token) for r in hub.requests] == [
        ("HEAD", "resolve", f"Bearer {ALICE}"),
        ("GET", "cdn", None),
    ]
    assert hub.requests[-1].sent == len(WEIGHTS)
    assert hub.tokens == {f"Bearer {ALICE}"}


def test_what_the_hub_says_of_a_file(hub: LocalHub, by_hand: httpx.Client) -> None:
    regular = by_hand.head(address("config.json"))
    commit = hub.repos[OPEN].commit()
    assert (regular.status_code, regular.headers["Content-Length"]) == (200, str(len(CONFIG)))
    assert regular.headers["ETag"] == f'"{git_oid(CONFIG)}"'
    assert regular.headers["X-Repo-Commit"] == commit
    linked = by_hand.head(address("model.safetensors"), follow_redirects=False)
    assert (linked.status_code, linked.headers["X-Linked-Size"]) == (302, str(len(WEIGHTS)))
    assert linked.headers["X-Linked-Etag"] == f'"{WEIGHTS_SHA256}"'
    assert linked.headers["X-Repo-Commit"] == commit
    assert linked.headers["Location"].startswith(f"{hub.cdn_url}/cdn/{WEIGHTS_SHA256}")
    stored = by_hand.head(linked.headers["Location"])
    assert stored.headers["Content-Length"] == str(len(WEIGHTS))
    assert WEIGHTS_SHA256 not in stored.headers["ETag"]


def test_what_the_hub_says_of_a_model(hub: LocalHub) -> None:
    info = HfApi().model_info(GATED, files_metadata=True)
    assert (info.id, info.sha) == (GATED, hub.repos[GATED].commit())
    assert (info.private, info.gated) == (False, "manual")
    listed = {file.rfilename: (file.size, file.blob_id) for file in info.siblings}
    assert listed == {
        "config.json": (len(CONFIG), git_oid(CONFIG)),
        "model.safetensors": (len(WEIGHTS), git_oid(POINTER)),
        "sub/notes.txt": (5, git_oid(b"notes")),
    }
    [lfs] = [file.lfs for file in info.siblings if file.lfs]
    assert (lfs.sha256, lfs.size, lfs.pointer_size) == (WEIGHTS_SHA256, len(WEIGHTS), len(POINTER))
    plain = HfApi().model_info(GATED)
    assert [(file.size, file.blob_id, file.lfs) for file in plain.siblings] == [(None,) * 3] * 3


def test_the_tree(hub: LocalHub) -> None:
    entries = list(HfApi().list_repo_tree(OPEN, recursive=True))
    files = {e.path: (e.size, e.blob_id) for e in entries if isinstance(e, RepoFile)}
    assert files["model.safetensors"] == (len(WEIGHTS), git_oid(POINTER))
    assert set(files) == set(FILES)
    assert [entry.path for entry in entries if isinstance(entry, RepoFolder)] == ["sub"]
    [lfs] = [entry.lfs for entry in entries if isinstance(entry, RepoFile) and entry.lfs]
    assert (lfs.sha256, lfs.size, lfs.pointer_size) == (WEIGHTS_SHA256, len(WEIGHTS), len(POINTER))
    top = [entry.path for entry in HfApi().list_repo_tree(OPEN)]
    assert top == ["config.json", "model.safetensors", "sub"]
    assert [entry.path for entry in HfApi().list_repo_tree(OPEN, "sub")] == ["sub/notes.txt"]


def test_revisions_and_commits(hub: LocalHub) -> None:
    repo = hub.repos[OPEN]
    first = repo.commit()
    assert Path(hf_hub_download(OPEN, "config.json", revision="v1")).read_bytes() == b"{}"
    assert Path(hf_hub_download(OPEN, "config.json", revision="refs/pr/1")).read_bytes() == b"{}"
    assert HfApi().model_info(OPEN, revision="v1").sha == repo.commit("v1") != first
    repo.files = {**FILES, "config.json": b"[]"}
    assert HfApi().model_info(OPEN).sha not in (first, repo.commit("v1"))
    assert content_of(snapshot_download(OPEN)) == repo.files
    assert content_of(snapshot_download(OPEN, revision=first)) == FILES


ANY_ROUTE = {
    "api": lambda repo: HfApi().model_info(repo),
    "tree": lambda repo: list(HfApi().list_repo_tree(repo)),
    "auth-check": lambda repo: HfApi().auth_check(repo),
    "resolve": lambda repo: file_download.get_hf_file_metadata(
        f"{file_download.constants.ENDPOINT}{address('config.json', repo)}"
    ),
}


@pytest.mark.parametrize("route", ANY_ROUTE)
@pytest.mark.parametrize("repo", ["google/none", PRIVATE])
def test_what_is_missing_or_hidden(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, route: str, repo: str
) -> None:
    for token, status in ((None, 401), (BOB, 404)):
        monkeypatch.setenv("HF_TOKEN", token or "")
        with pytest.raises(RepositoryNotFoundError) as caught:
            ANY_ROUTE[route](repo)
        assert caught.value.response.status_code == status
        assert caught.value.response.headers["X-Error-Code"] == "RepoNotFound"
    monkeypatch.setenv("HF_TOKEN", ALICE)
    ANY_ROUTE[route](PRIVATE)


@pytest.mark.parametrize("route", ANY_ROUTE)
def test_a_token_that_nobody_has(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization") as caught:
        ANY_ROUTE[route](OPEN)
    assert type(caught.value) is HfHubHTTPError
    assert caught.value.response.status_code == 401
    assert "X-Error-Code" not in caught.value.response.headers


REFUSED = {
    None: (401, GatedRepoError, "GatedRepo", "is restricted. You must have access to it"),
    BOB: (403, GatedRepoError, "GatedRepo", f"Visit https://huggingface.co/{GATED} to ask"),
    FINE: (403, HfHubHTTPError, None, "Please enable access to public gated repositories"),
}


@pytest.mark.parametrize("route", ["auth-check", "resolve"])
@pytest.mark.parametrize("token", REFUSED)
def test_a_licence_to_accept(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, route: str, token: str | None
) -> None:
    monkeypatch.setenv("HF_TOKEN", token or "")
    status, kind, code, said = REFUSED[token]
    with pytest.raises(HfHubHTTPError) as caught:
        ANY_ROUTE[route](GATED)
    response = caught.value.response
    assert (type(caught.value), response.status_code) == (kind, status)
    assert response.headers.get("X-Error-Code") == code
    assert said in response.headers["X-Error-Message"]
    assert HfApi().model_info(GATED).gated == "manual"
    hub.accounts = {BOB: Account("bob", accepted={GATED})}
    monkeypatch.setenv("HF_TOKEN", BOB)
    ANY_ROUTE[route](GATED)


def test_what_the_repository_does_not_have(hub: LocalHub) -> None:
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info(OPEN, revision="v9")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(OPEN, "config.json", revision="v9")
    with pytest.raises(RemoteEntryNotFoundError) as caught:
        hf_hub_download(OPEN, "none.json")
    assert caught.value.response.headers["X-Repo-Commit"] == hub.repos[OPEN].commit()


def test_who_one_is(hub: LocalHub, by_hand: httpx.Client) -> None:
    assert by_hand.get("/api/whoami-v2").status_code == 401
    assert HfApi().whoami(BOB) == {
        "type": "user",
        "name": "bob",
        "fullname": "Bob",
        "auth": {"type": "access_token", "accessToken": {"displayName": "ci", "role": "read"}},
    }
    assert HfApi().whoami(FINE)["auth"]["accessToken"] == {
        "displayName": "ci",
        "role": "fineGrained",
        "fineGrained": {"canReadGatedRepos": False, "global": [], "scoped": []},
    }
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi().whoami("hf_nobody")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("wanted", "first", "end"),
    [
        ("bytes=5-9", 5, 10),
        ("bytes=7-", 7, None),
        ("bytes=-3", -3, None),
        ("bytes=0-9999999", 0, None),
    ],
)
def test_ranges(
    hub: LocalHub, by_hand: httpx.Client, name: str, wanted: str, first: int, end: int | None
) -> None:
    answer = by_hand.get(address(name), headers={"Range": wanted})
    part, whole = FILES[name][first:end], len(FILES[name])
    assert (answer.status_code, answer.content) == (206, part)
    start = first % whole
    assert answer.headers["Content-Range"] == f"bytes {start}-{start + len(part) - 1}/{whole}"
    assert (hub.requests[-1].range, hub.requests[-1].sent) == (wanted, len(part))


def test_a_range_beyond_the_end(by_hand: httpx.Client) -> None:
    answer = by_hand.get(address("config.json"), headers={"Range": f"bytes={len(CONFIG)}-"})
    assert (answer.status_code, answer.content) == (416, b"")
    assert answer.headers["Content-Range"] == f"bytes */{len(CONFIG)}"


def test_no_ranges(hub: LocalHub, by_hand: httpx.Client) -> None:
    hub.faults = [NoRanges("model.safetensors", times=1)]
    answers = [
        by_hand.get(address("model.safetensors"), headers={"Range": "bytes=5-"}) for _ in "12"
    ]
    assert [answer.status_code for answer in answers] == [200, 206]
    assert answers[0].content == WEIGHTS


@pytest.mark.parametrize("at", ["config.json", "resolve", None])
def test_a_refusal_of_one_kind(hub: LocalHub, by_hand: httpx.Client, at: str | None) -> None:
    busy = Refusal(429, retry_after_s=7)
    hub.faults = [Refuse(at, repo=OPEN, method="GET", times=2, refusal=busy)]
    path = address("config.json")
    assert by_hand.head(path).status_code == 200
    assert by_hand.get(address("config.json", GATED, "none")).status_code == 401
    answers = [by_hand.get(path) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [429, 429, 200]
    assert answers[0].headers["Retry-After"] == "7"
    assert hub.faults[0].happened == 2


@pytest.mark.parametrize("route", ["api", "tree", "auth-check", "whoami-v2"])
def test_a_refusal_of_a_route(hub: LocalHub, route: str) -> None:
    # Not 503: the client asks for a tree again, for half a minute.
    hub.faults = [Refuse(route, refusal=Refusal(418))]
    ask: Any = ANY_ROUTE.get(route, lambda _: HfApi().whoami(ALICE))
    with pytest.raises(HfHubHTTPError, match="418"):
        ask(OPEN)


def test_a_busy_cdn_is_asked_again(hub: LocalHub) -> None:
    hub.faults = [Refuse("cdn", times=1, refusal=Refusal(429, retry_after_s=0))]
    assert Path(hf_hub_download(OPEN, "model.safetensors")).read_bytes() == WEIGHTS
    assert [request.route for request in hub.requests] == ["resolve", "cdn", "cdn"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_cut(hub: LocalHub, by_hand: httpx.Client, name: str) -> None:
    hub.faults = [Cut(name, after_bytes=10, times=1)]
    got: list[bytes] = []
    with by_hand.stream("GET", address(name)) as answer:
        assert answer.headers["Content-Length"] == str(len(FILES[name]))
        with pytest.raises(httpx.RemoteProtocolError, match="closed connection without"):
            got.extend(answer.iter_raw(1))
    assert b"".join(got) == FILES[name][:10]
    assert hub.requests[-1].sent == 10
    assert by_hand.get(address(name)).content == FILES[name]


def test_wrong_content(hub: LocalHub, by_hand: httpx.Client) -> None:
    hub.faults = [WrongContent("model.safetensors", after_bytes=100, times=1)]
    wrong, right = (by_hand.get(address("model.safetensors")).content for _ in "12")
    assert right == WEIGHTS
    assert (len(wrong), wrong[:100]) == (len(WEIGHTS), WEIGHTS[:100])
    assert all(a != b for a, b in zip(wrong[100:], WEIGHTS[100:], strict=True))


@pytest.mark.parametrize("by", [-10, 10])
def test_a_wrong_length(hub: LocalHub, by: int) -> None:
    hub.faults = [WrongLength("model.safetensors", by=by)]
    with pytest.raises(OSError, match="Consistency check failed"):
        hf_hub_download(OPEN, "model.safetensors")
    assert hub.sent["model.safetensors"] == len(WEIGHTS) + by


def test_a_file_that_is_held_while_others_go_on(hub: LocalHub) -> None:
    hold = Hold("model.safetensors", after_bytes=1000)
    hub.faults = [hold]
    got: list[str] = []
    asking = Thread(target=lambda: got.append(snapshot_download(OPEN)))
    asking.start()
    assert hold.reached.wait(10)
    assert (hub.sent["model.safetensors"], got) == (1000, [])
    hold.go_on.set()
    asking.join(10)
    assert content_of(got[0]) == FILES


def test_a_child_that_is_killed_in_the_midst_of_a_file(hub: LocalHub, tmp_path: Path) -> None:
    hold = Hold("model.safetensors", after_bytes=len(WEIGHTS) // 2, times=1)
    hub.faults = [hold]
    code = f"from huggingface_hub import snapshot_download as s; print(s({GATED!r}))"
    environment = os.environ | environ(hub.url, tmp_path / "home", ALICE)
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as child:
        assert hold.reached.wait(20)
        child.kill()
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path / "home")
    assert content_of(folder) == FILES


def test_closing_waits_for_nobody(hub: LocalHub) -> None:
    """A hung request and a held one end as the server does; so do connections kept alive."""
    hold = Hold(after_bytes=1)
    faults: list[Fault] = [Hang("tree"), hold]
    errors: list[type[Exception]] = []

    def ask(client: httpx.Client, path: str) -> None:
        try:
            client.get(path)
        except httpx.HTTPError as error:
            errors.append(type(error))

    with httpx.Client(trust_env=False, timeout=60) as client:
        with serving(LocalHub(repos={OPEN: Repo(FILES)})) as other:
            assert client.get(f"{other.url}/api/models/{OPEN}").status_code == 200
            other.faults = faults
            paths = [f"{other.url}/api/models/{OPEN}/tree/main", other.url + address("config.json")]
            asking = [Thread(target=ask, args=(client, path)) for path in paths]
            for thread in asking:
                thread.start()
            assert hold.reached.wait(10)
        for thread in asking:
            thread.join(10)
    assert errors == [httpx.RemoteProtocolError] * 2


def test_one_repository_by_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(LocalHub(FILES)) as served:
        local_hub.use(monkeypatch, served.url)
        folder = Path(snapshot_download("any/name", token="hf_anything"))
        assert (folder.name, content_of(folder)) == (SHA, FILES)
        assert "cdn" not in {request.route for request in served.requests}
        served.refuses = {"api": Refusal(503)}
        with pytest.raises(LocalEntryNotFoundError):
            snapshot_download("other/name")
