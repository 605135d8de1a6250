"""What the Hub says of a model: asked by the real client, answered by a local server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import local_hub
from checkpoint_samples import GEMMA, codes, facts_of, weights_file, write_weights
from gemma_serve.adapters.checkpoint import read_checkpoint
from gemma_serve.adapters.hub.facts import read_hub
from gemma_serve.planning.model.facts import FactsReading, ModelFacts
from gemma_serve.planning.model.model_config import read_geometry
from gemma_serve.planning.model.weights import HeaderTensor
from local_hub import FIRST_BYTES, SHA, LocalHub, Refusal, serving

NAME = "google/gemma-7b-it"
API = f"/api/models/{NAME}"
FILES = f"/{NAME}/resolve/{SHA}"
CONFIG = json.dumps(GEMMA).encode()
MEBI = 2**20
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDED = {
    "config.json": CONFIG,
    "model.safetensors.index.json": b"{}",
    FIRST: weights_file({"a": MEBI, "b": 30}),
    SECOND: weights_file({"c": MEBI}, dtype="F32"),
    "consolidated.safetensors": weights_file({"all": 42}),
    "original/model.safetensors": weights_file({"all": 42}),
    "gemma-7b-it.gguf": bytes(34),
}
FROM_HUB = ModelFacts(
    model=NAME,
    source="hub",
    architecture="GemmaForCausalLM",
    model_type="gemma",
    dtype="bfloat16",
    geometry=read_geometry(GEMMA),
    tensors=(
        HeaderTensor("a", "BF16", (MEBI // 2,), MEBI),
        HeaderTensor("b", "BF16", (15,), 30),
        HeaderTensor("c", "F32", (MEBI // 4,), MEBI),
    ),
    weights_bytes=2 * MEBI + 30,
)
ONE_FILE = {"config.json": CONFIG, "model.safetensors": weights_file({"w": MEBI})}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    with local_hub.alone(monkeypatch, tmp_path):
        yield


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ask a Hub for the model; `hub` holds what was asked for afterwards."""

    def read(hub: LocalHub, revision: str | None = None, **limit: float) -> FactsReading:
        with serving(hub):
            local_hub.use(monkeypatch, hub.url)
            return read_hub(NAME, revision, **limit)

    return read


@pytest.mark.parametrize(("revision", "listing"), [(None, API), ("v1.1", f"{API}/revision/v1.1")])
def test_the_hub_tells_what_vllm_would_load(ask: Any, revision: str | None, listing: str) -> None:
    hub = LocalHub(SHARDED)
    assert ask(hub, revision) == FactsReading(FROM_HUB)
    assert hub.asked[:2] == [f"GET {listing}?blobs=true", f"GET {FILES}/config.json"]
    # Side by side, so in any order.
    assert sorted(hub.asked[2:]) == [
        f"GET {FILES}/{FIRST} {FIRST_BYTES}",
        f"GET {FILES}/{SECOND} {FIRST_BYTES}",
    ]


def test_without_an_index_all_weight_files_count(ask: Any) -> None:
    hub = LocalHub(ONE_FILE | {"consolidated.safetensors": b"", "sub/model.safetensors": b""})
    assert facts_of(ask(hub)).weights_bytes == MEBI
    assert len(hub.asked) == 3


def test_a_hub_and_a_folder_of_the_same_files_tell_the_same(ask: Any, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for name, content in ONE_FILE.items():
        (folder / name).write_bytes(content)
    of_folder = facts_of(read_checkpoint(folder, model=NAME))
    assert facts_of(ask(LocalHub(ONE_FILE))) == replace(of_folder, source="hub")


def test_no_weights_are_asked_for_beyond_the_headers(ask: Any) -> None:
    hub = LocalHub(ONE_FILE)
    ask(hub)
    assert hub.asked[2:] == [f"GET {FILES}/model.safetensors {FIRST_BYTES}"]
    assert hub.sent["model.safetensors"] == 100_001 < len(ONE_FILE["model.safetensors"])


def test_a_long_header_is_asked_for_to_its_end_and_no_further(ask: Any) -> None:
    names = {f"model.layers.{index}.self_attn.q_proj.weight": 1000 for index in range(1500)}
    file = weights_file(names)
    length = int.from_bytes(file[:8], "little")
    assert length > 100_000
    hub = LocalHub({"config.json": CONFIG, "model.safetensors": file})
    facts = facts_of(ask(hub))
    assert [tensor.name for tensor in facts.tensors] == list(names)
    assert facts.weights_bytes == 1_500_000
    assert hub.asked[2:] == [
        f"GET {FILES}/model.safetensors {FIRST_BYTES}",
        f"GET {FILES}/model.safetensors bytes=8-{length + 7}",
    ]


def test_many_files_keep_their_order(ask: Any) -> None:
    shards = {
        f"model-{index:05}-of-00020.safetensors": weights_file({f"w{index}": 2 * index})
        for index in range(1, 21)
    }
    hub = LocalHub({"config.json": CONFIG, "model.safetensors.index.json": b"{}", **shards})
    names = [tensor.name for tensor in facts_of(ask(hub)).tensors]
    assert names == [f"w{index}" for index in range(1, 21)]


def test_nothing_is_left_on_the_disk_or_on_the_terminal(
    ask: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ask(LocalHub(SHARDED))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_model_without_safetensors_is_known_by_its_config(ask: Any) -> None:
    hub = LocalHub({"config.json": CONFIG, "pytorch_model.bin": bytes(100)})
    assert ask(hub) == FactsReading(replace(FROM_HUB, tensors=(), weights_bytes=None))
    assert len(hub.asked) == 2


def test_another_kind_of_model_is_a_warning_and_its_size_is_known(ask: Any) -> None:
    config = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    reading = ask(LocalHub({**ONE_FILE, "config.json": config.encode()}))
    [problem] = reading.problems
    assert (problem.code, problem.blocking) == ("model.unknown_architecture", False)
    facts = facts_of(reading)
    assert (facts.model_type, facts.dtype, facts.geometry, facts.weights_bytes) == (
        "llama",
        "bfloat16",
        None,
        MEBI,
    )


@pytest.mark.parametrize(
    ("status", "error_code", "code", "blocking"),
    [
        (400, None, "hub.unreachable", False),
        (401, None, "hub.no_token", False),
        (401, "RepoNotFound", "repo-not-found", True),
        (401, "GatedRepo", "gated-no-token", False),
        (403, "GatedRepo", "gated-no-token", False),
        (403, None, "hub.forbidden", False),
        (404, None, "repo-not-found", True),
        (404, "RepoNotFound", "repo-not-found", True),
        (404, "RevisionNotFound", "hub.revision_not_found", True),
        (429, None, "hub.rate_limited", False),
        (500, None, "hub.server_error", False),
        (503, None, "hub.server_error", False),
    ],
)
@pytest.mark.parametrize("stage", ["api", "config.json", "model.safetensors"])
def test_the_hub_says_no(
    ask: Any, stage: str, status: int, error_code: str | None, code: str, blocking: bool
) -> None:
    hub = LocalHub(ONE_FILE, refuses={stage: Refusal(status, error_code)})
    reading = ask(hub, "v9")
    assert reading.facts is None
    [problem] = reading.problems
    assert (problem.code, problem.blocking) == (code, blocking)
    # No second try.
    assert len(hub.asked) == 1 + ["api", "config.json", "model.safetensors"].index(stage)


@pytest.mark.parametrize(
    ("token", "code"), [(None, "gated-no-token"), ("hf_of_somebody", "gated-no-licence")]
)
def test_a_licence_that_is_not_accepted(
    ask: Any, monkeypatch: pytest.MonkeyPatch, token: str | None, code: str
) -> None:
    """The Hub lists gated models to everybody, and refuses their files."""
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    hub = LocalHub(ONE_FILE, refuses={"config.json": Refusal(403, "GatedRepo")})
    [problem] = ask(hub).problems
    assert (problem.code, problem.blocking) == (code, False)
    assert f"https://huggingface.co/{NAME}" in problem.hint
    assert ("hf auth login" in problem.hint) == (token is None)


def test_a_token_that_is_kept_back_is_none(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    for refusal, code in (("GatedRepo", "gated-no-token"), ("RepoNotFound", "repo-not-found")):
        hub = LocalHub(ONE_FILE, refuses={"config.json": Refusal(401, refusal)})
        assert codes(ask(hub)) == [code]
        assert hub.tokens == {None}


def test_a_model_without_a_config(ask: Any) -> None:
    reading = ask(LocalHub({"model.safetensors": weights_file({"w": 2})}))
    [problem] = reading.problems
    assert (reading.facts, problem.code, problem.blocking) == (None, "model.no_config", True)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        bytes(8),
        b"\xff" * 8 + b"{}",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\x09\0\0\0\0\0\0\0{\"w\": 1}}",
        b"\x08\0\0\0\0\0\0\0{\"w\": 1}",
        b"\x02\0\0\0\0\0\0\0[]",
        weights_file({"w": 4}).replace(b"[0, 4]", b"[4, 0]"),
        weights_file({"w": 4}).replace(b"[0, 4]", b"[0, []"),
        weights_file({"w": 4}).replace(b"[0, 4]", b"[\"\",\"\"]")[:-2],
    ],
)  # fmt: skip
def test_a_broken_header(ask: Any, content: bytes) -> None:
    reading = ask(LocalHub({**ONE_FILE, "model.safetensors": content}))
    [problem] = reading.problems
    assert (reading.facts, problem.code, problem.blocking) == (None, "weights-truncated", True)


@pytest.mark.parametrize("stage", ["api", "config.json"])
@pytest.mark.parametrize(
    "answer",
    [b"<html>log in</html>", b"[]", b"", b"\xff\xfe", b'"text"', b"[" * 100_000],
    ids=lambda answer: repr(answer[:12]),
)
def test_something_else_answers_in_place_of_the_hub(ask: Any, stage: str, answer: bytes) -> None:
    reading = ask(LocalHub(ONE_FILE, answers={stage: answer}))
    assert (reading.facts, codes(reading)) == (None, ["hub.unreachable"])


@pytest.mark.parametrize("answer", [{"hello": 1}, {"id": "x", "tags": 3}, {"siblings": [{}]}])
def test_a_listing_that_is_none(ask: Any, answer: object) -> None:
    reading = ask(LocalHub(ONE_FILE, answers={"api": json.dumps(answer).encode()}))
    assert (reading.facts, codes(reading)) in [
        (None, ["hub.unreachable"]),
        (None, ["model.no_config"]),
    ]


@pytest.mark.parametrize("stage", ["api", "config.json", "model.safetensors"])
def test_a_hub_that_hangs_costs_no_more_than_the_limit(ask: Any, stage: str) -> None:
    began = time.monotonic()
    [problem] = ask(LocalHub(ONE_FILE, hangs=frozenset({stage})), time_limit_s=0.3).problems
    assert problem.code == "hub.unreachable"
    assert time.monotonic() - began < 3


def test_a_hub_that_hangs_does_not_keep_the_program_from_ending(tmp_path: Path) -> None:
    code = (
        "from gemma_serve.adapters.hub.facts import read_hub\n"
        f"print(read_hub({NAME!r}, time_limit_s=1.5).problems[0].code)"
    )
    with serving(LocalHub(ONE_FILE, hangs=frozenset({"model.safetensors"}))) as hub:
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **local_hub.environ(hub.url, tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        took = time.monotonic() - began
    assert done.stdout.split() == ["hub.unreachable"]
    # The server holds its answer back for ten seconds.
    assert took < 7
    assert hub.asked[-1].endswith(f"model.safetensors {FIRST_BYTES}")


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        local_hub.use(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}")
        [problem] = read_hub(NAME).problems
    assert problem.code == "hub.unreachable"
    assert "Connection refused" in problem.message


@pytest.mark.parametrize("endpoint", ["nonsense", "http://[::1", "ftp://127.0.0.1"])
def test_an_endpoint_that_is_no_url(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    local_hub.use(monkeypatch, endpoint)
    assert codes(read_hub(NAME)) == ["hub.unreachable"]


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    local_hub.use(monkeypatch, "http://user:password@127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_se\x01cret")
    [problem] = read_hub(NAME).problems
    shown = problem.message + problem.hint
    assert not [word for word in ("password", "cret", "hf_se") if word in shown]


@pytest.mark.parametrize("stage", ["api", "config.json", "model.safetensors"])
@pytest.mark.parametrize("status", [401, 403, 500])
def test_the_token_goes_to_the_hub_and_into_no_message(
    ask: Any, monkeypatch: pytest.MonkeyPatch, stage: str, status: int
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    hub = LocalHub(ONE_FILE, refuses={stage: Refusal(status)})
    reading = ask(hub)
    assert hub.tokens == {"Bearer hf_verysecret"}
    assert "verysecret" not in repr(reading)


def test_a_name_that_no_hub_could_have() -> None:
    assert codes(read_hub("a/b/c")) == ["repo-not-found"]


def test_the_weights_of_a_folder_and_of_the_hub_are_damaged_alike(ask: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_weights(file, size=64)
    (tmp_path / "config.json").write_bytes(CONFIG)
    for broken in (b"", b"short", file.read_bytes()[:20]):
        file.write_bytes(broken)
        hub = LocalHub({"config.json": CONFIG, "model.safetensors": broken})
        assert codes(ask(hub)) == codes(read_checkpoint(tmp_path)) == ["weights-truncated"]
