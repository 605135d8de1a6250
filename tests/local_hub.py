"""A local Hub for tests: a real HTTP server that the real client of the Hub is pointed at."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

SHA = "0123456789abcdef0123456789abcdef01234567"
# How much of a weight file the client asks for before it knows how long the header is.
FIRST_BYTES = "bytes=0-100000"


@dataclass(frozen=True)
class Refusal:
    """What the Hub says instead of an answer; `code` is its own word for the reason."""

    status: int
    code: str | None = None


@dataclass
class LocalHub:
    """One repository, and what was asked for.

    `files` are listed and served; for a name in `refuses` ("api" is the listing) the answer is no,
    for one in `hangs` there is none, and for one in `answers` just that. `asked` are methods,
    paths and the ranges that were wanted, `sent` the bytes of the answers by file, `tokens` the
    authorizations that came along.
    """

    files: Mapping[str, bytes]
    refuses: Mapping[str, Refusal] = field(default_factory=dict)
    hangs: frozenset[str] = frozenset()
    answers: Mapping[str, bytes] = field(default_factory=dict)
    url: str = ""
    asked: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    over: threading.Event = field(default_factory=threading.Event)

    def listing(self, repo: str) -> bytes:
        """What the Hub's API says of the repository."""
        siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
        return json.dumps({"id": repo, "sha": SHA, "siblings": siblings}).encode()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        hub, wanted = self.hub, self.headers.get("Range")
        hub.asked.append(" ".join(filter(None, (self.command, self.path, wanted))))
        hub.tokens.add(self.headers.get("Authorization"))
        name, content = self._find()
        if name in hub.hangs:
            hub.over.wait(10)
            return
        refusal = hub.refuses.get(name)
        if refusal is None and content is None:
            refusal = Refusal(404, "EntryNotFound")
        if refusal is not None:
            self._send(refusal.status, b'{"error": "no"}', {"X-Error-Code": refusal.code})
            return
        assert content is not None
        status, extra = 200, {"X-Repo-Commit": SHA, "ETag": f'"{hash(content):x}"'}
        if wanted is not None and (found := re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)):
            first, last = int(found[1]), min(int(found[2]), len(content) - 1)
            extra["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            status, content = 206, content[first : last + 1]
        if with_body:
            hub.sent[name] = hub.sent.get(name, 0) + len(content)
        self._send(status, content, extra, with_body=with_body)

    def _find(self) -> tuple[str, bytes | None]:
        """The name of what is asked for, and its content if there is any."""
        api = re.fullmatch(r"/api/models/(\S+?)(?:/revision/\S+?)?\?blobs=true", self.path)
        name = "api" if api else self.path.partition(f"/resolve/{SHA}/")[2]
        content = self.hub.listing(api[1]) if api else self.hub.files.get(name)
        return name, self.hub.answers.get(name, content)

    def _send(
        self,
        status: int,
        content: bytes,
        headers: Mapping[str, str | None],
        *,
        with_body: bool = True,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    # With fewer, several requests at once wait for a second.
    request_queue_size = 64


@contextmanager
def serving(hub: LocalHub) -> Iterator[LocalHub]:
    """Serve `hub`, which has a URL then."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No token, no cache and no Hub but those that a test brings along."""
    use(monkeypatch, "http://127.0.0.1:9")
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


def use(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Point the client at the Hub of this URL, as HF_ENDPOINT does."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
