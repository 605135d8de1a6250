"""How large a model is: from a Hub, or without one."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session, constants

from checkpoint_samples import codes, write_model
from gemma_serve.adapters.hub import read_hub
from gemma_serve.planning.checkpoint import (
    Checkpoint,
    CheckpointReading,
)
from gemma_serve.usecases.check_gpu import find_checkpoint

INFO = {
    "id": "google/gemma-7b-it",
    "sha": "0" * 40,
    "config": {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
    "safetensors": {"parameters": {"BF16": 20, "F32": 1}, "total": 21},
    "siblings": [
        {"rfilename": "config.json", "size": 600},
        {"rfilename": "model.safetensors.index.json", "size": 900},
        {"rfilename": "model-00001-of-00002.safetensors", "size": 30},
        {"rfilename": "model-00002-of-00002.safetensors", "size": 12},
        {"rfilename": "consolidated.safetensors", "size": 42},
        {"rfilename": "original/model.safetensors", "size": 42},
        {"rfilename": "gemma-7b-it.gguf", "size": 34_000},
    ],
}
FROM_HUB = Checkpoint(
    model="google/gemma-7b-it",
    source="hub",
    weights_bytes=42,
    architecture="GemmaForCausalLM",
    model_type="gemma",
    dtype="bfloat16",
)


@contextmanager
def local_hub(
    *,
    status: int = 200,
    body: object = INFO,
    headers: dict[str, str] | None = None,
    hangs: bool = False,
) -> Iterator[tuple[str, list[str]]]:
    """A real HTTP server that answers everything alike; gives its URL and the paths asked for."""
    asked: list[str] = []
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if hangs:
                over.wait(10)
                return
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No token, no cache and no Hub but those that a test brings along."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # With telemetry, the client asks the Hub one thing more.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield
    # One client for all the Hubs would keep a connection to one that is gone.
    close_session()


@pytest.fixture
def hub_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda url: monkeypatch.setattr(constants, "ENDPOINT", url)


def test_the_hub_lists_what_vllm_would_load(hub_at: Any) -> None:
    with local_hub() as (url, asked):
        hub_at(url)
        assert read_hub("google/gemma-7b-it") == CheckpointReading(FROM_HUB)
        assert find_checkpoint("google/gemma-7b-it", "v1.1") == CheckpointReading(FROM_HUB)
    assert asked == [
        "/api/models/google/gemma-7b-it?blobs=true",
        "/api/models/google/gemma-7b-it/revision/v1.1?blobs=true",
    ]


@pytest.mark.parametrize(
    ("status", "error_code", "code", "blocking"),
    [
        (401, "RepoNotFound", "model.not_found", True),
        (404, "RepoNotFound", "model.not_found", True),
        (404, "RevisionNotFound", "model.revision_not_found", True),
        (403, "GatedRepo", "hub.gated", False),
        (403, None, "hub.denied", False),
        (500, None, "hub.unreachable", False),
        (429, None, "hub.unreachable", False),
    ],
)
def test_the_hub_says_no(
    hub_at: Any, status: int, error_code: str | None, code: str, blocking: bool
) -> None:
    headers = {"X-Error-Code": error_code} if error_code else {}
    with local_hub(status=status, body={"error": "no"}, headers=headers) as (url, asked):
        hub_at(url)
        reading = read_hub("google/gemma-7b-it", "v9")
    assert reading.checkpoint is None
    [problem] = reading.problems
    assert (problem.code, problem.blocking) == (code, blocking)
    assert len(asked) == 1  # no second try


@pytest.mark.parametrize("body", [b"<html>log in</html>", [], {"hello": 1}, {"id": "x", "tags": 3}])
def test_something_else_answers_in_place_of_the_hub(hub_at: Any, body: object) -> None:
    with local_hub(body=body) as (url, _):
        hub_at(url)
        reading = read_hub("google/gemma-7b-it")
    assert codes(reading) in (["hub.unreachable"], [])
    assert reading.checkpoint is None or reading.checkpoint.weights_bytes is None


def test_a_hub_that_hangs_costs_no_more_than_the_limit(hub_at: Any) -> None:
    with local_hub(hangs=True) as (url, _):
        hub_at(url)
        [problem] = read_hub("google/gemma-7b-it", time_limit_s=0.3).problems
    assert problem.code == "hub.unreachable"


def test_nobody_listens(hub_at: Any) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        hub_at(f"http://127.0.0.1:{unused.getsockname()[1]}")
        [problem] = read_hub("google/gemma-7b-it").problems
    assert problem.code == "hub.unreachable"
    assert "Connection refused" in problem.message


@pytest.mark.parametrize("endpoint", ["nonsense", "http://[::1", "ftp://127.0.0.1"])
def test_an_endpoint_that_is_no_url(hub_at: Any, endpoint: str) -> None:
    hub_at(endpoint)
    assert codes(read_hub("google/gemma-7b-it")) == ["hub.unreachable"]


def test_no_secret_is_shown(hub_at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_at("http://user:password@127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_se\x01cret")
    [problem] = read_hub("google/gemma-7b-it").problems
    shown = problem.message + problem.hint
    assert not [word for word in ("password", "cret", "hf_se") if word in shown]


def test_a_name_that_no_hub_could_have() -> None:
    assert codes(read_hub("a/b/c")) == ["model.not_found"]


def test_without_the_hub_the_catalogue_knows_public_models(hub_at: Any) -> None:
    reading = find_checkpoint("google/gemma-7b-it")
    assert reading.checkpoint is not None
    assert (reading.checkpoint.source, reading.checkpoint.weights_bytes) == (
        "catalogue",
        17_075_361_792,
    )
    assert codes(reading) == ["hub.unreachable"]
    assert codes(find_checkpoint("me/my-gemma")) == ["hub.unreachable", "model.size_unknown"]


def test_a_typo_gets_a_suggestion(hub_at: Any) -> None:
    with local_hub(status=401, body={}, headers={"X-Error-Code": "RepoNotFound"}) as (url, _):
        hub_at(url)
        [problem] = find_checkpoint("google/gemma-7b-its").problems
    assert problem.code == "model.not_found"
    assert problem.hint == "did you mean `--model google/gemma-7b-it`?"


def test_offline_the_cache_goes_first_and_nobody_is_asked(
    hub_at: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with local_hub() as (url, asked):
        hub_at(url)
        without = find_checkpoint("google/gemma-7b-it", cache_dir=tmp_path / "cache")
        repo = tmp_path / "cache" / "models--google--gemma-7b-it"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("abc")
        (repo / "snapshots").mkdir()
        write_model(repo / "snapshots" / "abc")
        cached = find_checkpoint("google/gemma-7b-it", cache_dir=tmp_path / "cache")
    assert asked == []
    assert without.checkpoint is not None
    assert (without.checkpoint.source, codes(without)) == ("catalogue", ["hub.offline"])
    assert cached.checkpoint is not None
    assert (cached.checkpoint.source, cached.checkpoint.weights_bytes) == ("cache", 1000)
    assert cached.problems == ()


def test_a_folder_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "gemma-mine")
    monkeypatch.chdir(tmp_path)
    reading = find_checkpoint("gemma-mine")
    assert reading.checkpoint is not None
    assert (reading.checkpoint.source, reading.problems) == ("folder", ())
    assert codes(find_checkpoint("./none")) == ["model.not_found"]
