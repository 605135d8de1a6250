"""What stands between an account and a model: asked by the real client of a local Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, snapshot_download

import local_hub
from checkpoint_samples import GEMMA, weights_file
from gemma_serve.adapters import host
from gemma_serve.adapters.hub.access import Repository, Token, ask_access
from gemma_serve.adapters.hub.client import TIME_LIMIT_S, cache_folder
from gemma_serve.adapters.hub.errors import offline_missing
from gemma_serve.adapters.package_data import data_path, load_failures
from gemma_serve.cli import main
from gemma_serve.errors import Problem
from gemma_serve.planning.model.repo_files import RepoFile
from gemma_serve.usecases import access
from gemma_serve.usecases.access import AccessReport, DiskSpace, check_access
from gemma_serve.usecases.local_files import LocalFiles
from local_hub import (
    SHA,
    Account,
    Cut,
    FineGrained,
    LocalHub,
    Refusal,
    Refuse,
    Repo,
    serving,
)

GATED, OPEN, PRIVATE = "google/gemma-7b-it", "google/open", "alice/mine"
ALICE, BOB = "hf_alice_has_accepted", "hf_bob_has_not"
NARROW, WIDE, UNKNOWN = "hf_alice_narrow", "hf_alice_wide", "hf_nobody_knows"
MIB = 2**20
CONFIG, WEIGHTS = json.dumps(GEMMA).encode(), weights_file({"w": 1000})
TOKENIZER = b'{"version": "1.0"}'
FILES = {
    "config.json": CONFIG,
    "tokenizer.json": TOKENIZER,
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": WEIGHTS,
    "README.md": b"# Gemma",
}
NEEDED = ("config.json", "tokenizer.json", "model.safetensors")
NEEDED_BYTES = sum(len(FILES[name]) for name in NEEDED)
FREE = 10**12
NO_TOKEN = Problem(
    "gated-no-token",
    f"the model is gated, and no valid token was sent: {GATED} is gated, and no token is found to "
    "ask for it with",
    f"accept the licence at https://huggingface.co/{GATED}, then run `hf auth login` or set "
    "HF_TOKEN",
)
NOT_ACCEPTED = Problem(
    "gated-no-licence",
    "the token's account may not read this gated model: the account of this token has not "
    f"accepted the licence of {GATED}",
    f"accept it at https://huggingface.co/{GATED} with that very account; it holds at once, no "
    "new token is needed",
)
LACKS_PERMISSION = Problem(
    "hub.token_lacks_permission",
    f"the token may not read gated repositories, and {GATED} is one",
    "at https://huggingface.co/settings/tokens, give this fine-grained token `Read access to "
    "contents of all public gated repos you can access`",
)
NOT_FOUND_ANONYMOUS = Problem(
    "repo-not-found",
    "there is no such model: `me/mine` is not on the Hub, or is private; the name of a model "
    "there, or a folder, is wanted",
    "check the spelling: `gemma-serve models` lists the public Gemmas; if it is private, run `hf "
    "auth login` or set HF_TOKEN",
)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    with local_hub.alone(monkeypatch, tmp_path):
        monkeypatch.setenv("GEMMA_SERVE_STATE_DIR", str(tmp_path / "state"))
        monkeypatch.setenv("NO_COLOR", "1")
        yield


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    made = LocalHub(
        repos={
            GATED: Repo(FILES, gated="manual"),
            OPEN: Repo(FILES),
            PRIVATE: Repo(FILES, private=True),
        },
        accounts={
            ALICE: Account("alice", accepted={GATED}),
            BOB: Account("bob"),
            NARROW: Account("alice", {GATED}, FineGrained()),
            WIDE: Account("alice", {GATED}, FineGrained(can_read_gated=True)),
        },
    )
    with serving(made) as served:
        local_hub.use(monkeypatch, served.url)
        yield served


Check = Callable[..., AccessReport]


@pytest.fixture
def check(hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Check:
    """Ask with a `token` or without, on a disk with `FREE` bytes; no answer holds the token."""
    monkeypatch.setattr(host, "free_disk_bytes", lambda _: FREE)

    def ask(
        model: str = GATED, revision: str | None = None, *, token: str | None = None, **how: Any
    ) -> AccessReport:
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        report = check_access(model, revision, **how)
        assert token is None or token not in repr(report)
        return report

    return ask


def codes(report: AccessReport) -> list[str]:
    return [problem.code for problem in report.problems]


def listed(hub: LocalHub, model: str) -> tuple[RepoFile, ...]:
    """The model's files, all of them, as the Hub promises them."""
    [repository] = [ask_access(model).repository]
    assert repository is not None
    hub.requests.clear()
    hub.asked.clear()
    hub.tokens.clear()
    return repository.files


def expected(hub: LocalHub, tmp_path: Path, model: str = GATED, **other: Any) -> AccessReport:
    """What is told of a model of which nothing is here yet."""
    assert hub.repos is not None
    repo = hub.repos[model]
    files = listed(hub, model)
    by_name = {file.name: file for file in files}
    assert sorted(by_name) == sorted(FILES)
    assert {name: file.size_bytes for name, file in by_name.items()} == {
        name: len(content) for name, content in FILES.items()
    }
    report = AccessReport(
        model,
        None,
        hub.url,
        reached=True,
        repository=Repository(model, repo.commit(), repo.gated is not None, repo.private, files),
        files=tuple(by_name[name] for name in NEEDED),
        here=dict.fromkeys(NEEDED, 0),
        disk=DiskSpace(tmp_path / "hub", FREE, NEEDED_BYTES, 256 * MIB),
    )
    return replace(report, **other)


def test_without_a_token(check: Check, hub: LocalHub, tmp_path: Path) -> None:
    wanted = expected(hub, tmp_path, allowed=False, problems=(NO_TOKEN,))
    assert check() == wanted
    assert (wanted.ok, wanted.total_bytes, wanted.here_bytes) == (False, NEEDED_BYTES, 0)
    # All at once, so in any order.
    assert sorted(hub.asked) == [
        f"GET /api/models/{GATED}/auth-check",
        f"GET /api/models/{GATED}?blobs=true",
        f"GET /{GATED}/resolve/main/config.json",
    ]
    assert hub.tokens == {None}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("token", "found", "problem"),
    [
        (ALICE, Token("HF_TOKEN", valid=True, account="alice", role="read"), None),
        (BOB, Token("HF_TOKEN", valid=True, account="bob", role="read"), NOT_ACCEPTED),
        (
            NARROW,
            Token("HF_TOKEN", True, True, "alice", "fineGrained", may_read_gated=False),
            LACKS_PERMISSION,
        ),
        (WIDE, Token("HF_TOKEN", True, True, "alice", "fineGrained", may_read_gated=True), None),
    ],
    ids=["accepted", "not accepted", "fine-grained without gated", "fine-grained"],
)
def test_with_a_token_of_an_account(
    check: Check,
    hub: LocalHub,
    tmp_path: Path,
    token: str,
    found: Token,
    problem: Problem | None,
) -> None:
    told = () if problem is None else (problem,)
    wanted = expected(hub, tmp_path, token=found, allowed=problem is None, problems=told)
    report = check(token=token)
    assert report == wanted
    assert report.ok == (problem is None)
    assert len(hub.asked) == 4
    assert hub.tokens == {f"Bearer {token}"}
    assert list(tmp_path.iterdir()) == []


def test_a_token_that_the_hub_does_not_know(check: Check, hub: LocalHub) -> None:
    report = check(token=UNKNOWN)
    assert report == AccessReport(
        GATED,
        None,
        hub.url,
        reached=True,
        token=Token("HF_TOKEN", valid=False),
        problems=(
            Problem(
                "hub.invalid_token",
                f"{hub.url} does not take the token that it was given; a valid one is wanted",
                "make one at https://huggingface.co/settings/tokens, then `hf auth login` or set "
                "HF_TOKEN; with HF_TOKEN unset, public models need none",
            ),
        ),
    )


def test_a_token_that_no_header_can_hold(check: Check) -> None:
    for token in ("hf_with\x01control", "hf_wíth_an_accent"):
        report = check(OPEN, token=token)
        assert codes(report) == ["hub.invalid_token"]
        assert "hf_w" not in repr(report)


def test_an_open_model_needs_no_token(check: Check, hub: LocalHub, tmp_path: Path) -> None:
    assert check(OPEN) == expected(hub, tmp_path, OPEN, allowed=True)


def test_a_token_for_gated_models_is_not_asked_of_an_open_one(check: Check) -> None:
    report = check(OPEN, token=NARROW)
    assert (report.ok, report.allowed, report.problems) == (True, True, ())


@pytest.mark.parametrize(
    ("token", "allowed", "told"),
    [
        (None, None, ["repo-not-found"]),
        (BOB, None, ["repo-not-found"]),
        (ALICE, True, []),
    ],
)
def test_a_private_model(
    check: Check, token: str | None, allowed: bool | None, told: list[str]
) -> None:
    report = check(PRIVATE, token=token)
    assert (report.reached, report.allowed, codes(report)) == (True, allowed, told)
    assert (report.repository is not None and report.repository.private) == (token == ALICE)


def test_a_model_that_is_not_there(check: Check, hub: LocalHub) -> None:
    assert check("me/mine") == AccessReport(
        "me/mine", None, hub.url, reached=True, problems=(NOT_FOUND_ANONYMOUS,)
    )
    [problem] = check("me/mine", token=BOB).problems
    assert problem == Problem(
        "repo-not-found",
        "there is no such model: `me/mine` is not on the Hub, or is private to others than this "
        "account; the name of a model there, or a folder, is wanted",
        "check the spelling: `gemma-serve models` lists the public Gemmas",
    )


@pytest.mark.parametrize("token", [None, ALICE])
@pytest.mark.parametrize("typed", ["google/gemma-7b-its", "gemma-7b-it", "Google/Gemma-7B-it"])
def test_a_typo_gets_the_nearest_gemma(check: Check, typed: str, token: str | None) -> None:
    [problem] = check(typed, token=token).problems
    private = "" if token else "; if it is private, run `hf auth login` or set HF_TOKEN"
    assert (problem.code, problem.hint) == (
        "repo-not-found",
        f"did you mean `--model {GATED}`? If not: check the spelling: `gemma-serve models` lists "
        f"the public Gemmas{private}",
    )


def test_a_name_that_no_hub_could_have(check: Check, hub: LocalHub) -> None:
    assert codes(check("a/b/c")) == ["repo-not-found"]


@pytest.mark.parametrize(
    ("model", "token", "told"),
    [
        (OPEN, None, ["hub.revision_not_found"]),
        (GATED, ALICE, ["hub.revision_not_found"]),
        (GATED, None, ["hub.revision_not_found", "gated-no-token"]),
    ],
)
def test_a_revision_that_is_not_there(
    check: Check, model: str, token: str | None, told: list[str]
) -> None:
    report = check(model, "v99", token=token)
    assert codes(report) == told
    assert "no revision `v99`" in report.problems[0].message


def test_a_revision_that_is_there(check: Check, hub: LocalHub) -> None:
    assert hub.repos is not None
    hub.repos[OPEN].revisions = {"v1": FILES | {"config.json": CONFIG + b"\n"}}
    report = check(OPEN, "v1")
    assert report.repository is not None
    assert report.repository.commit == hub.repos[OPEN].commit("v1") != hub.repos[OPEN].commit()
    assert (report.total_bytes, report.problems) == (NEEDED_BYTES + 1, ())


@pytest.mark.parametrize("token", [None, ALICE])
@pytest.mark.parametrize(
    ("refusal", "code", "told"),
    [
        (Refusal(429, retry_after_s=30), "hub.rate_limited", "a pause of 30 s"),
        (Refusal(429), "hub.rate_limited", "(HTTP 429)"),
        (Refusal(500), "hub.server_error", "HTTP 500"),
        (Refusal(503, retry_after_s=30), "hub.server_error", "HTTP 503"),
    ],
)
def test_a_hub_that_has_no_time_for_us(
    check: Check,
    hub: LocalHub,
    token: str | None,
    refusal: Refusal,
    code: str,
    told: str,
) -> None:
    hub.faults = [Refuse(refusal=refusal)]
    report = check(token=token)
    [problem] = report.problems
    assert (problem.code, problem.blocking, report.reached) == (code, True, True)
    assert told in problem.message
    # No second try: each was asked once.
    assert len(hub.asked) == len(set(hub.asked)) == (3 if token is None else 4)


@pytest.mark.parametrize("stage", ["api", "auth-check", "config.json"])
def test_one_answer_that_is_missing_is_told_and_the_others_hold(
    check: Check, hub: LocalHub, stage: str
) -> None:
    hub.refuses = {stage: Refusal(503)}
    report = check(token=ALICE)
    assert codes(report) == ["hub.server_error"]
    assert report.reached is True
    assert report.token == Token("HF_TOKEN", valid=True, account="alice", role="read")
    assert (report.repository is None) == (stage == "api")
    assert report.allowed is (True if stage == "api" else None)


@pytest.mark.parametrize("stage", [None, "api", "auth-check", "config.json", "whoami-v2"])
def test_no_answer_in_time(
    check: Check, hub: LocalHub, monkeypatch: pytest.MonkeyPatch, stage: str | None
) -> None:
    assert TIME_LIMIT_S < 12  # beside the start of the program, 15 s are promised
    everything = {"api", "auth-check", "config.json", "whoami-v2"}
    hub.hangs = everything if stage is None else {stage}
    monkeypatch.setattr(access, "ask_access", partial(ask_access, time_limit_s=0.4))
    began = time.monotonic()
    report = check(token=ALICE)
    assert time.monotonic() - began < 3
    # Who somebody is need not be known.
    assert codes(report) == ([] if stage == "whoami-v2" else ["hub.unreachable"])
    assert report.reached is (stage is not None)


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    local_hub.use(monkeypatch, "http://user:password@127.0.0.1:9")
    report = check_access(GATED)
    assert (report.reached, codes(report)) == (False, ["hub.unreachable"])
    assert report.endpoint == "http://127.0.0.1:9"
    assert "password" not in repr(report)


@pytest.mark.parametrize("stage", ["api", "config.json"])
@pytest.mark.parametrize("answer", [b"<html>log in</html>", b"", b"[]", b'"text"', b"\xff\xfe"])
def test_something_else_answers_in_place_of_the_hub(
    check: Check, hub: LocalHub, stage: str, answer: bytes
) -> None:
    hub.answers = {stage: answer}
    assert codes(check(OPEN)) == ["hub.unreachable"]


def test_a_login_page_in_place_of_everything(check: Check, hub: LocalHub) -> None:
    page = b"<html>log in</html>"
    hub.answers = dict.fromkeys(("api", "auth-check", "config.json", "whoami-v2"), page)
    report = check(OPEN, token=ALICE)
    assert report == AccessReport(
        OPEN,
        None,
        hub.url,
        reached=False,
        token=Token("HF_TOKEN"),
        problems=(
            Problem(
                "hub.unreachable",
                f"the Hub at {hub.url} could not be asked: its answer is not the Hub's; a proxy "
                "or a login page may be between",
                "check the network, HTTPS_PROXY and HF_ENDPOINT, or give the model's folder with "
                "`--model DIR`",
            ),
        ),
    )


@pytest.mark.parametrize("stage", ["api", "config.json"])
def test_an_answer_that_breaks_off(check: Check, hub: LocalHub, stage: str) -> None:
    hub.faults = [Cut(stage, after_bytes=10)]
    assert codes(check(OPEN)) == ["hub.unreachable"]


@pytest.mark.parametrize("status", [429, 500, 403, 401])
def test_who_somebody_is_need_not_be_known(
    check: Check, hub: LocalHub, tmp_path: Path, status: int
) -> None:
    hub.refuses = {"whoami-v2": Refusal(status)}
    wanted = expected(hub, tmp_path, token=Token("HF_TOKEN", valid=None), allowed=True)
    assert check(token=ALICE) == wanted


@pytest.mark.parametrize("token", [ALICE, NARROW])
def test_a_model_that_is_not_gated_is_forbidden_whatever_its_name(
    check: Check, hub: LocalHub, token: str
) -> None:
    model = "google/fine-grained-gated"
    hub.repos = {model: Repo(FILES)}
    hub.refuses = dict.fromkeys(("auth-check", "config.json"), Refusal(403))
    report = check(model, token=token)
    assert (codes(report), report.allowed) == (["hub.forbidden"], False)


def test_two_answers_that_are_no_are_both_told(check: Check, hub: LocalHub) -> None:
    hub.refuses = {"api": Refusal(429)}
    report = check(token=BOB)
    assert codes(report) == ["hub.rate_limited", "gated-no-licence"]
    assert (report.reached, report.allowed, report.repository) == (True, False, None)


def test_a_proxy_that_wants_a_password_is_not_the_hub(check: Check, hub: LocalHub) -> None:
    hub.faults = [Refuse(refusal=Refusal(407))]
    report = check(token=ALICE)
    assert (report.reached, report.allowed, codes(report)) == (False, None, ["hub.unreachable"])
    assert "HTTP 407" in report.problems[0].message
    assert report.token == Token("HF_TOKEN", valid=None)


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_mirror_need_not_know_of_licences(
    check: Check, hub: LocalHub, tmp_path: Path, status: int
) -> None:
    hub.refuses = {"auth-check": Refusal(status)}
    assert check(OPEN) == expected(hub, tmp_path, OPEN, allowed=True)
    # The file is refused all the same.
    assert check(GATED).problems == (NO_TOKEN,)


def test_a_mirror_that_lists_names_alone_is_asked_for_the_tree(
    check: Check, hub: LocalHub, tmp_path: Path
) -> None:
    wanted = expected(hub, tmp_path, OPEN, allowed=True)
    assert wanted.repository is not None
    names = [{"rfilename": name} for name in sorted(FILES)]
    info = {"id": OPEN, "sha": wanted.repository.commit, "private": False, "gated": False}
    hub.answers = {"api": json.dumps(info | {"siblings": names}).encode()}
    assert check(OPEN) == wanted
    assert [r.revision for r in hub.requests if r.route == "tree"] == [wanted.repository.commit]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_offline_without_the_model(check: Check, hub: LocalHub) -> None:
    missing = load_failures().titled(offline_missing(GATED, cache_folder()))
    assert check(token=ALICE) == AccessReport(
        GATED, None, hub.url, offline=True, problems=(missing,)
    )
    assert hub.asked == []


def test_offline_with_the_model(
    check: Check, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(snapshot_download(OPEN))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    cached = LocalFiles(folder, folder.name, None)
    assert check(OPEN) == AccessReport(OPEN, None, hub.url, offline=True, cached=cached)
    assert hub.asked == []
    (folder / "model.safetensors").resolve().unlink()
    report = check(OPEN)
    assert report.cached is None
    assert codes(report) == ["offline-cache-miss", "weights-truncated"]


def test_what_is_cached_need_not_come_again(check: Check, hub: LocalHub) -> None:
    folder = Path(snapshot_download(OPEN))
    report = check(OPEN)
    assert report.cached == LocalFiles(folder, folder.name, None)
    assert report.here == {name: len(FILES[name]) for name in NEEDED}
    assert report.disk is not None
    assert (report.disk.missing_bytes, report.disk.needed_bytes) == (0, 0)
    (folder / "model.safetensors").resolve().unlink()
    half = check(OPEN)
    assert half.cached is None
    assert half.here == report.here | {"model.safetensors": 0}
    assert half.disk is not None
    assert half.disk.missing_bytes == len(WEIGHTS)
    assert half.disk.needed_bytes == len(WEIGHTS) + 256 * MIB


def test_where_the_model_is_here_what_the_hub_says_is_a_warning(
    check: Check, hub: LocalHub
) -> None:
    snapshot_download(OPEN)
    hub.faults = [Refuse(refusal=Refusal(500))]
    report = check(OPEN)
    [problem] = report.problems
    assert (problem.code, problem.blocking, report.ok) == ("hub.server_error", False, True)


def test_a_folder_needs_nobody(check: Check, hub: LocalHub, tmp_path: Path) -> None:
    demo = str(data_path("demo"))
    assert check(demo) == AccessReport(demo, None, hub.url, is_folder=True)
    assert codes(check(str(tmp_path))) == ["model.no_config"]
    assert codes(check(str(tmp_path / "none"))) == ["repo-not-found"]
    assert hub.asked == []


def test_a_known_gemma_that_this_hub_lacks_is_not_a_typo(check: Check, hub: LocalHub) -> None:
    [problem] = check("google/gemma-2b").problems
    assert problem.code == "repo-not-found"
    assert problem.hint.startswith("it is on huggingface.co: see what HF_ENDPOINT")


@pytest.mark.parametrize("token", ["hf_tök", "hf_a b", "hf_a\x7fb"])
def test_a_token_that_no_header_can_hold_is_not_sent(
    check: Check, hub: LocalHub, token: str
) -> None:
    report = check(token=token)
    [problem] = report.problems
    assert (problem.code, report.reached) == ("hub.invalid_token", None)
    assert "the token from HF_TOKEN holds a character that no token has" in problem.message
    assert hub.asked == []


def test_an_endpoint_without_a_scheme_is_told_what_it_lacks(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_hub.use(monkeypatch, "127.0.0.1:9")
    [problem] = check().problems
    assert (problem.code, problem.hint) == (
        "hub.unreachable",
        "HF_ENDPOINT is `127.0.0.1:9`: put http:// or https:// in front",
    )


def huge(model: str) -> bytes:
    """A listing with a weight file that no disk holds."""
    files = [("config.json", len(CONFIG)), ("tokenizer.json", 2), ("model.safetensors", 10**15)]
    siblings = [{"rfilename": name, "size": size, "blobId": "0" * 40} for name, size in files]
    info = {"id": model, "sha": SHA, "private": False, "gated": "manual", "siblings": siblings}
    return json.dumps(info).encode()


def test_a_disk_that_is_too_small_is_said_beside_all_else(hub: LocalHub, tmp_path: Path) -> None:
    hub.answers = {"api": huge(GATED)}
    report = check_access(GATED)
    assert codes(report) == ["gated-no-token", "disk-full"]
    assert report.problems[0] == NO_TOKEN
    assert report.disk is not None
    missing = 10**15 + len(CONFIG) + 2
    assert report.disk.free_bytes is not None
    assert report.disk == DiskSpace(
        tmp_path / "hub", report.disk.free_bytes, missing, int(missing * 0.05)
    )
    assert str(tmp_path / "hub") in report.problems[1].message
    elsewhere = check_access(GATED, cache_dir=tmp_path / "other")
    assert str(tmp_path / "other") in elsewhere.problems[1].message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spare", "told"), [(0, []), (-1, ["disk-full"])], ids=["just enough", "a byte too few"]
)
def test_the_margin_is_kept_free(
    check: Check, monkeypatch: pytest.MonkeyPatch, spare: int, told: list[str]
) -> None:
    monkeypatch.setattr(host, "free_disk_bytes", lambda _: NEEDED_BYTES + 256 * MIB + spare)
    assert codes(check(OPEN)) == told


def test_what_was_begun_in_a_folder_takes_no_more_room(
    check: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    to = tmp_path / "model"
    to.mkdir()
    (to / ".model.safetensors.incomplete").write_bytes(WEIGHTS[:500])
    (to / "tokenizer.json").write_bytes(TOKENIZER)
    room = NEEDED_BYTES - 500 - len(TOKENIZER) + 256 * MIB
    for free, told in ((room, []), (room - 1, ["disk-full"])):
        monkeypatch.setattr(host, "free_disk_bytes", lambda _, free=free: free)
        report = check(OPEN, to=to)
        assert codes(report) == told
        assert report.here == {
            "config.json": 0,
            "tokenizer.json": len(TOKENIZER),
            "model.safetensors": 500,
        }
        assert report.disk == DiskSpace(to, free, room - 256 * MIB, 256 * MIB)


@pytest.mark.parametrize("where", ["below a file", "a file", "not ours"])
def test_a_cache_that_nobody_can_write_to_is_said(
    check: Check, hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    place = tmp_path / "place"
    folder = place if where == "a file" else place / "hub"
    if where == "not ours":
        place.mkdir()
        # Root may write anywhere, so the system is asked in our place.
        monkeypatch.setattr(host.os, "access", lambda path, _: Path(path) != place)
    else:
        place.write_bytes(b"mine")
    report = check(OPEN, cache_dir=folder)
    [problem] = report.problems
    assert (problem.code, problem.blocking) == ("hub.cache_unwritable", True)
    assert problem.message.endswith(f"this account can't write to {folder}")
    assert report.disk == DiskSpace(folder, FREE, NEEDED_BYTES, 256 * MIB, can_write=False)
    assert report.repository is not None


def test_a_disk_that_does_not_say_what_is_free_stops_nobody(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "free_disk_bytes", lambda _: None)
    assert check(OPEN).ok


def test_where_the_token_was_found(
    check: Check, hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    of_alice = {"valid": True, "account": "alice", "role": "read"}
    (tmp_path / "token").write_text(f"{ALICE}\n")
    assert check().token == Token(str(tmp_path / "token"), **of_alice)
    # As the client does, the environment goes first.
    assert check(token=BOB).token == Token("HF_TOKEN", valid=True, account="bob", role="read")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", ALICE)
    assert check().token == Token("HUGGING_FACE_HUB_TOKEN", **of_alice)
    assert hub.tokens == {f"Bearer {ALICE}", f"Bearer {BOB}"}


@pytest.mark.parametrize("nothing", ["", "  ", "\n"])
def test_an_empty_token_is_none(
    check: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nothing: str
) -> None:
    (tmp_path / "token").write_text(nothing)
    monkeypatch.setenv("HF_TOKEN", nothing)
    report = check()
    assert (report.token, report.problems) == (None, (NO_TOKEN,))


def test_a_token_that_is_kept_back(
    check: Check, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    report = check(token=ALICE)
    assert report.token == Token("HF_TOKEN", is_sent=False)
    assert codes(report) == ["gated-no-token"]
    assert hub.tokens == {None}


# Through the program.


@pytest.mark.parametrize(
    ("token", "exit_code", "told"), [(None, 1, ["gated-no-token"]), (ALICE, 0, []),
                                     (BOB, 1, ["gated-no-licence"])],
)  # fmt: skip
def test_the_program_says_it_by_its_exit_code(
    hub: LocalHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    token: str | None,
    exit_code: int,
    told: list[str],
) -> None:
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    assert main(["check-access", "--model", GATED, "--json"]) == exit_code
    out, err = capsys.readouterr()
    envelope = json.loads(out)
    free = envelope["data"]["disk"].pop("free_bytes")
    assert isinstance(free, int)
    assert err == ""
    assert hub.repos is not None
    assert envelope["data"] == {
        "model": GATED,
        "revision": None,
        "commit": hub.repos[GATED].commit(),
        "endpoint": hub.url,
        "offline": False,
        "reached": True,
        "token": token
        and {
            "source": "HF_TOKEN",
            "is_sent": True,
            "valid": True,
            "account": "alice" if token == ALICE else "bob",
            "role": "read",
            "may_read_gated": None,
        },
        "gated": True,
        "private": False,
        "allowed": exit_code == 0,
        "files": {"count": 3, "total_bytes": NEEDED_BYTES, "here_bytes": 0},
        "cached": None,
        "disk": {
            "folder": str(tmp_path / "hub"),
            "missing_bytes": NEEDED_BYTES,
            "needed_bytes": NEEDED_BYTES + 256 * MIB,
        },
    }
    head = (envelope["schema"], envelope["command"], envelope["ok"])
    assert head == (1, "check-access", exit_code == 0)
    assert [problem["code"] for problem in envelope["problems"]] == told


def test_a_person_gets_a_table_and_the_problems(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", BOB)
    assert main(["check-access", "--model", GATED]) == 1
    out, err = capsys.readouterr()
    # What a long path has pushed to the next line is indented.
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if line[0] != " ")
    assert list(rows) == ["model", "endpoint", "token", "licence", "files", "cache", "disk"]
    assert rows["token"].rstrip() == "from HF_TOKEN, of bob (read)"
    assert rows["licence"].rstrip() == "not accepted by this account"
    assert err == f"error: {NOT_ACCEPTED.message}\nhint: {NOT_ACCEPTED.hint}\n"


@pytest.mark.parametrize("form", [[], ["--json"], ["--debug"]])
@pytest.mark.parametrize("fault", [None, 401, 403, 404, 429, 500, "hang", "html"])
def test_whatever_fails_the_program_says_so_and_keeps_the_token(
    hub: LocalHub,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fault: int | str | None,
    form: list[str],
) -> None:
    everything = ("api", "auth-check", "config.json", "whoami-v2")
    if isinstance(fault, int):
        hub.faults = [Refuse(refusal=Refusal(fault))]
    elif fault == "hang":
        hub.hangs = set(everything)
        monkeypatch.setattr(access, "ask_access", partial(ask_access, time_limit_s=0.4))
    elif fault == "html":
        hub.answers = dict.fromkeys(everything, b"<html></html>")
    monkeypatch.setenv("HF_TOKEN", ALICE)
    before = [arg for arg in form if arg == "--debug"]
    after = [arg for arg in form if arg != "--debug"]
    code = main([*before, "check-access", "--model", GATED, *after])
    out, err = capfd.readouterr()
    assert code == (0 if fault is None else 1)
    assert "Traceback" not in out + err
    assert ALICE not in out + err


def test_a_process_of_its_own(hub: LocalHub, tmp_path: Path) -> None:
    """What the environment of a shell means, from a start with nothing patched."""
    (tmp_path / "token").write_text(ALICE)
    environ = {**os.environ, **local_hub.environ(hub.url, tmp_path)}
    command = [sys.executable, "-m", "gemma_serve", "check-access", "--model", GATED, "--json"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    envelope = json.loads(done.stdout)
    assert (done.returncode, done.stderr, envelope["problems"]) == (0, "", [])
    assert envelope["data"]["token"]["source"] == str(tmp_path / "token")
    assert envelope["data"]["endpoint"] == hub.url
    assert envelope["data"]["disk"]["folder"] == str(tmp_path / "hub")
    offline = subprocess.run(
        command,
        env={**environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    told = json.loads(offline.stdout)
    assert (offline.returncode, told["data"]["offline"]) == (1, True)
    assert [problem["code"] for problem in told["problems"]] == ["offline-cache-miss"]


def test_without_a_model_it_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-access", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["ok"] is False
