"""A local Hub for tests: a real HTTP server that the real client of the Hub is pointed at.

It answers as huggingface.co does, and misbehaves on demand: see `LocalHub` and the `Fault`s.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR, socket
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import pytest
from huggingface_hub import close_session, constants

SHA = "0123456789abcdef0123456789abcdef01234567"
# How much of a weight file the client asks for before it knows how long the header is.
FIRST_BYTES = "bytes=0-100000"

Files = Mapping[str, bytes]

_LFS_ENDINGS = (".safetensors", ".bin", ".gguf", ".model")
_LFS_FROM_BYTES = 2**20
_PIECE_BYTES = 2**16
_FLIPPED = bytes(255 - byte for byte in range(256))


@dataclass(frozen=True)
class Refusal:
    """What the Hub says instead of an answer; `code` is its own word for the reason."""

    status: int
    code: str | None = None
    message: str | None = None
    retry_after_s: int | None = None
    commit: str | None = None


@dataclass
class Repo:
    """A repository: `files` are those of `main`, `revisions` those of other branches and tags.

    All may be changed while the Hub runs; `main` has another commit then, and the commits that
    somebody was told stay. Whether its LFS files are on the `cdn` is as on the Hub, or not.
    """

    files: Files
    gated: Literal["auto", "manual"] | None = None
    private: bool = False
    revisions: Mapping[str, Files] = field(default_factory=dict)
    cdn: bool = True
    told: dict[str, Files] = field(default_factory=dict, init=False, repr=False)

    def find(self, revision: str = "main") -> tuple[str, Files] | None:
        """The commit of a branch, a tag or a commit, and its files."""
        for files in (self.files, *self.revisions.values()):
            self.told[_commit(files)] = dict(files)
        if revision in self.told:
            return revision, self.told[revision]
        named = {**self.revisions, "main": self.files}.get(revision)
        return None if named is None else (_commit(named), dict(named))

    def commit(self, revision: str = "main") -> str:
        """The commit of a branch or tag, 40 hexadecimal digits."""
        found = self.find(revision)
        assert found is not None, revision
        return found[0]

    def blob(self, sha256: str) -> bytes | None:
        """The content that has this digest, in whichever commit."""
        known = (content for files in list(self.told.values()) for content in files.values())
        return next((content for content in known if _blob(content).sha256 == sha256), None)


class _OneForAll(Repo):
    """A repository with one commit, to which each revision leads."""

    def find(self, revision: str = "main") -> tuple[str, Files] | None:
        return SHA, self.files


@dataclass(frozen=True)
class FineGrained:
    """A token with rights of its own: may it read the gated repositories that its owner may?"""

    can_read_gated: bool = False


@dataclass
class Account:
    """Whose token it is, and the gated repositories whose licence its owner `accepted`."""

    name: str
    accepted: Set[str] = frozenset()
    fine_grained: FineGrained | None = None


@dataclass
class Request:
    """What was asked for.

    `route` is one of "api" (what the Hub says of a model), "tree", "auth-check", "whoami-v2",
    "resolve", "cdn", or empty; `name` is the file of the last two, and else the route. `sent` are
    bytes of the answer's body.
    """

    method: str
    path: str
    range: str | None
    token: str | None
    route: str = ""
    name: str = ""
    repo: str | None = None
    revision: str = "main"
    sent: int = 0


@dataclass(eq=False)
class Fault:
    """What goes wrong `at` a file or a route, of one `repo` or any, with one `method` or any.

    It happens that many `times`, or always; `happened` tells how often it did.
    """

    at: str | None = None
    repo: str | None = field(default=None, kw_only=True)
    method: str | None = field(default=None, kw_only=True)
    times: int | None = field(default=None, kw_only=True)
    happened: int = field(default=0, kw_only=True, init=False)

    def concerns(self, request: Request) -> bool:
        """Whether it is to happen to this request."""
        return (
            self.at in (None, request.name, request.route)
            and self.repo in (None, request.repo)
            and self.method in (None, request.method)
            and (self.times is None or self.happened < self.times)
        )


@dataclass(eq=False)
class Refuse(Fault):
    """The Hub says no: 404, 429, 503 and so on."""

    refusal: Refusal = field(kw_only=True)


@dataclass(eq=False)
class Hang(Fault):
    """There is no answer until the server closes."""


@dataclass(eq=False)
class Cut(Fault):
    """The connection closes after so many bytes of an answer's body that has more of them."""

    after_bytes: int = field(kw_only=True)


@dataclass(eq=False)
class Hold(Fault):
    """After so many bytes of a body that has more, `reached` is set and `go_on` waited for."""

    after_bytes: int = field(kw_only=True)
    reached: threading.Event = field(default_factory=threading.Event, kw_only=True)
    go_on: threading.Event = field(default_factory=threading.Event, kw_only=True)


@dataclass(eq=False)
class WrongLength(Fault):
    """The content is so many bytes longer than it should be, or shorter where `by` is negative."""

    by: int = field(kw_only=True)


@dataclass(eq=False)
class WrongContent(Fault):
    """The content has its length, but other bytes from `after_bytes` on."""

    after_bytes: int = field(default=0, kw_only=True)


@dataclass(eq=False)
class NoRanges(Fault):
    """A wanted range is ignored: the whole file comes, with status 200."""


_F = TypeVar("_F", bound=Fault)


@dataclass
class LocalHub:
    """A Hub, and what it was asked for.

    It has the `repos`, and knows the tokens of `accounts`. Without `repos`, it has one repository
    by every name, takes each token, tells of the commit `SHA` whatever the revision, and has the
    `files` there alone.

    For a name in `refuses` ("api" is the listing) the answer is no, for one in `hangs` there is
    none, and for one in `answers` just that; `faults` do more. All may be changed while it runs.

    `asked` are methods, paths and the ranges that were wanted, `requests` the same in full, `sent`
    the bytes of the answers by file, `tokens` the authorizations that came along (to the Hub; what
    its CDN at `cdn_url` gets is in `requests`).
    """

    files: Files = field(default_factory=dict)
    refuses: Mapping[str, Refusal] = field(default_factory=dict)
    hangs: Set[str] = frozenset()
    answers: Mapping[str, bytes] = field(default_factory=dict)
    repos: Mapping[str, Repo] | None = None
    accounts: Mapping[str, Account] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    url: str = ""
    cdn_url: str = ""
    asked: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, request: Request) -> None:
        """Put down what was asked."""
        with self.lock:
            self.requests.append(request)
            self.asked.append(" ".join(filter(None, (request.method, request.path, request.range))))
            if request.route != "cdn":
                self.tokens.add(request.token)

    def count(self, request: Request, sent: int) -> None:
        """Put down how many bytes go out."""
        with self.lock:
            request.sent += sent
            self.sent[request.name] = self.sent.get(request.name, 0) + sent

    def take(self, kind: type[_F], request: Request, body_bytes: int | None = None) -> _F | None:
        """The fault of this kind that is to happen now; those of a longer body are left out."""
        with self.lock:
            for fault in self.faults:
                if not isinstance(fault, kind) or not fault.concerns(request):
                    continue
                if body_bytes is not None and fault.after_bytes >= body_bytes:  # type: ignore[attr-defined]
                    continue
                fault.happened += 1
                return fault
        return None

    def answer(self, request: Request) -> _Answer | Refusal:
        """What the Hub says, were all well."""
        if request.name in self.refuses:
            return self.refuses[request.name]
        if (fault := self.take(Refuse, request)) is not None:
            return fault.refusal
        answer = self._stored(request) if request.route == "cdn" else self._answer(request)
        if request.name in self.answers and not isinstance(answer, Refusal):
            return _Answer(self.answers[request.name], answer.headers)
        return answer

    def _account(self, request: Request) -> Account | None:
        token = (request.token or "").removeprefix("Bearer ")
        return self.accounts.get(token) if self.repos is not None else Account(token)

    def _answer(self, request: Request) -> _Answer | Refusal:
        account = self._account(request)
        if request.token is not None and account is None:
            return Refusal(401, message="Invalid credentials in Authorization header")
        if request.route == "whoami-v2":
            return _who(account) if request.token and account else Refusal(401, message=_LOG_IN)
        if request.repo is None:
            return Refusal(404, message="Sorry, we can't find the page you are looking for.")
        repo = self._repo(request.repo, account)
        if repo is None and account is None:
            return Refusal(401, "RepoNotFound", _LOG_IN)
        if repo is None:
            return Refusal(404, "RepoNotFound", "Repository not found")
        if request.route in ("auth-check", "resolve") and repo.gated:
            refusal = _gate(request.repo, account)
            if refusal is not None:
                return refusal
        found = repo.find(request.revision)
        if found is None:
            return Refusal(404, "RevisionNotFound", f"Invalid rev id: {request.revision}")
        commit, files = found
        if self.repos is None and request.route == "resolve" and request.revision != commit:
            files = {}  # so that a test sees who forgot what the Hub told
        if request.route == "resolve":
            return self._file(request, repo, commit, files)
        if request.route == "auth-check":
            return _Answer(b"{}")
        if request.route == "tree":
            return _tree(request, files)
        return _model_info(request, repo, commit, files)

    def _repo(self, name: str, account: Account | None) -> Repo | None:
        """The repository, if there is one that may be seen."""
        if self.repos is None:
            return _OneForAll(self.files, cdn=False)
        repo = self.repos.get(name)
        owner = name.partition("/")[0]
        hidden = repo is not None and repo.private and (account is None or account.name != owner)
        return None if hidden else repo

    def _file(self, request: Request, repo: Repo, commit: str, files: Files) -> _Answer | Refusal:
        content = files.get(request.name)
        if content is None:
            return Refusal(404, "EntryNotFound", "Entry not found", commit=commit)
        blob = _blob(content)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not (repo.cdn and _is_lfs(request.name, content)):
            return _Answer(content, headers | {"ETag": f'"{blob.oid}"'}, is_file=True)
        assert request.repo is not None
        query = urlencode({"repo": request.repo, "name": request.name})
        headers["Location"] = f"{self.cdn_url}/cdn/{blob.sha256}?{query}"
        headers["X-Linked-Size"] = str(len(content))
        headers["X-Linked-Etag"] = f'"{blob.sha256}"'
        return _Answer(b"Found. Redirecting to the CDN.", headers, status=302)

    def _stored(self, request: Request) -> _Answer | Refusal:
        """What the CDN has, for everybody who has the address."""
        sha256 = urlsplit(request.path).path.removeprefix("/cdn/")
        repo = (self.repos or {}).get(request.repo or "")
        content = repo.blob(sha256) if repo else None
        if content is None:
            return Refusal(404)
        headers = {"ETag": f'"{sha256[:32]}"', "Accept-Ranges": "bytes"}
        return _Answer(content, headers, is_file=True)


@dataclass(frozen=True)
class _Answer:
    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int = 200
    is_file: bool = False


@dataclass(frozen=True)
class _Blob:
    """The digests of a content: `oid` is git's, of the content; `sha256` is what LFS goes by."""

    oid: str
    sha256: str


@lru_cache(maxsize=256)
def _blob(content: bytes) -> _Blob:
    return _Blob(_git_oid(content), hashlib.sha256(content).hexdigest())


def _git_oid(content: bytes, kind: str = "blob") -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def _commit(files: Files) -> str:
    listed = sorted((name, _blob(content).oid) for name, content in files.items())
    return _git_oid(json.dumps(listed).encode(), "commit")


def _is_lfs(name: str, content: bytes) -> bool:
    return name.endswith(_LFS_ENDINGS) or len(content) > _LFS_FROM_BYTES


def _pointer(content: bytes) -> bytes:
    """What git holds in place of an LFS file."""
    return (
        "version https://git-lfs.github.com/spec/v1\n"
        f"oid sha256:{_blob(content).sha256}\nsize {len(content)}\n"
    ).encode()


def _listed(name: str, content: bytes) -> dict[str, Any]:
    """A file as it is listed, with LFS' digest as `sha256`."""
    if not _is_lfs(name, content):
        return {"size": len(content), "blobId": _blob(content).oid}
    pointer, sha256 = _pointer(content), _blob(content).sha256
    lfs = {"sha256": sha256, "size": len(content), "pointerSize": len(pointer)}
    return {"size": len(content), "blobId": _git_oid(pointer), "lfs": lfs}


def _json(value: object) -> _Answer:
    return _Answer(json.dumps(value).encode(), {"Content-Type": "application/json"})


_LOG_IN = "Invalid username or password."


def _who(account: Account) -> _Answer:
    token: dict[str, Any] = {"displayName": "ci", "role": "read"}
    if (rights := account.fine_grained) is not None:
        fine = {"canReadGatedRepos": rights.can_read_gated, "global": [], "scoped": []}
        token |= {"role": "fineGrained", "fineGrained": fine}
    names = {"type": "user", "name": account.name, "fullname": account.name.title()}
    return _json(names | {"auth": {"type": "access_token", "accessToken": token}})


def _gate(repo: str, account: Account | None) -> Refusal | None:
    """Why a gated repository is not for this account, if it is not."""
    restricted = f"Access to model {repo} is restricted"
    if account is None:
        wanted = "You must have access to it and be authenticated to access it. Please log in."
        return Refusal(401, "GatedRepo", f"{restricted}. {wanted}")
    if account.fine_grained is not None and not account.fine_grained.can_read_gated:
        return Refusal(
            403,
            message="Please enable access to public gated repositories in your fine-grained token "
            "settings to view this repository.",
        )
    if repo not in account.accepted:
        wanted = f"Visit https://huggingface.co/{repo} to ask for access."
        message = f"{restricted} and you are not in the authorized list. {wanted}"
        return Refusal(403, "GatedRepo", message)
    return None


def _model_info(request: Request, repo: Repo, commit: str, files: Files) -> _Answer:
    blobs = parse_qs(urlsplit(request.path).query).get("blobs") == ["true"]
    siblings = [
        {"rfilename": name} | (_listed(name, content) if blobs else {})
        for name, content in sorted(files.items())
    ]
    names = {"id": request.repo, "modelId": request.repo, "sha": commit}
    rights = {"private": repo.private, "gated": repo.gated or False, "disabled": False}
    return _json(names | rights | {"tags": [], "siblings": siblings})


def _tree(request: Request, files: Files) -> _Answer | Refusal:
    parts = urlsplit(request.path)
    recursive = parse_qs(parts.query).get("recursive", [""])[0].lower() in ("true", "1")
    under = unquote(parts.path.partition("/tree/")[2]).partition("/")[2]
    prefix = f"{under}/" if under else ""
    below = {name: content for name, content in files.items() if name.startswith(prefix)}
    if under and not below:
        return Refusal(404, "EntryNotFound", f"{under} does not exist")
    folders = {
        str(folder)
        for name in below
        for folder in Path(name).parents
        if str(folder).startswith(prefix) and str(folder) != "."
    }
    entries = [_folder_entry(name) for name in folders]
    entries += [_file_entry(name, content) for name, content in below.items()]
    entries.sort(key=lambda entry: str(entry["path"]))
    return _json([e for e in entries if recursive or "/" not in e["path"].removeprefix(prefix)])


def _folder_entry(name: str) -> dict[str, Any]:
    return {"type": "directory", "oid": _git_oid(name.encode(), "tree"), "size": 0, "path": name}


def _file_entry(name: str, content: bytes) -> dict[str, Any]:
    listed = _listed(name, content)
    entry = {"type": "file", "oid": listed["blobId"], "size": len(content), "path": name}
    if "lfs" in listed:
        entry["lfs"] = {
            "oid": listed["lfs"]["sha256"],
            "size": len(content),
            "pointerSize": listed["lfs"]["pointerSize"],
        }
    return entry


_REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
_ROUTES = {
    "whoami-v2": r"/api/whoami-v2",
    "auth-check": rf"/api/models/{_REPO}/auth-check",
    "tree": rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(?:/.+)?",
    "api": rf"/api/models/{_REPO}(?:/revision/(?P<revision>[^/]+))?",
    "resolve": rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)",
    "cdn": r"/cdn/[0-9a-f]{64}",
}


def _read(request: Request) -> Request:
    """Fill in what the path means."""
    parts = urlsplit(request.path)
    for route, pattern in _ROUTES.items():
        if (found := re.fullmatch(pattern, parts.path)) is not None:
            given = {key: unquote(value) for key, value in found.groupdict().items() if value}
            if route == "cdn":
                given = {key: values[0] for key, values in parse_qs(parts.query).items()}
            request.route, request.name = route, given.get("name", route)
            request.repo, request.revision = given.get("repo"), given.get("revision", "main")
            break
    return request


def _part(wanted: str | None, length: int) -> range | None:
    """The bytes that a Range header means, empty if there are none; None to send the whole."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    # Of an empty file there is no part, and servers send it whole.
    if not found or not any(found.groups()) or not length:
        return None
    if not found[1]:
        return range(max(length - int(found[2]), 0), length)
    return range(int(found[1]), min(int(found[2] or length), length - 1) + 1)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    # Headers and body are sent apart, and a client's delayed acknowledgement would cost 40 ms.
    disable_nagle_algorithm = True

    def handle(self) -> None:
        # A client that was killed is no concern of the Hub's.
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        hub = self.server.hub
        request = _read(
            Request(
                self.command,
                self.path,
                self.headers.get("Range"),
                self.headers.get("Authorization"),
            )
        )
        hub.note(request)
        if request.name in hub.hangs or hub.take(Hang, request) is not None:
            hub.over.wait()
            self.close_connection = True
            return
        answer = hub.answer(request)
        if isinstance(answer, Refusal):
            self._refuse(answer)
        else:
            self._send(request, answer)

    do_HEAD = do_GET

    def _refuse(self, refusal: Refusal) -> None:
        headers = {
            "X-Error-Code": refusal.code,
            "X-Error-Message": refusal.message,
            "X-Repo-Commit": refusal.commit,
            "Retry-After": refusal.retry_after_s,
            "Content-Type": "application/json",
        }
        body = json.dumps({"error": refusal.message or "no"}).encode()
        self._head(refusal.status, headers, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send(self, request: Request, answer: _Answer) -> None:
        hub, content, status = self.server.hub, answer.content, answer.status
        headers: dict[str, object] = dict(answer.headers)
        has_faults = self.command != "HEAD" and status == 200
        if has_faults:
            content = self._spoilt(request, content)
        part = _part(request.range, len(content)) if answer.is_file else None
        if part is not None and has_faults and hub.take(NoRanges, request):
            part = None
        if part is not None and not part:
            self._head(416, {**headers, "Content-Range": f"bytes */{len(content)}"}, 0)
            return
        if part:
            headers["Content-Range"] = f"bytes {part[0]}-{part[-1]}/{len(content)}"
            status, content = 206, content[part.start : part.stop]
        self._head(status, headers, len(content))
        if self.command == "HEAD":
            return
        if has_faults:
            self._body(request, content)
        else:
            self._write(request, content)

    def _spoilt(self, request: Request, content: bytes) -> bytes:
        hub = self.server.hub
        if (wrong := hub.take(WrongContent, request)) is not None:
            right = content[: wrong.after_bytes]
            content = right + content[wrong.after_bytes :].translate(_FLIPPED)
        if (longer := hub.take(WrongLength, request)) is not None:
            content = content[: max(len(content) + longer.by, 0)] + bytes(max(longer.by, 0))
        return content

    def _body(self, request: Request, body: bytes) -> None:
        """Write the body, as far and as fast as the faults let it."""
        hub = self.server.hub
        cut = hub.take(Cut, request, len(body))
        end = cut.after_bytes if cut else len(body)
        hold, start = hub.take(Hold, request, end), 0
        if hold is not None:
            start = hold.after_bytes
            self._write(request, body[:start])
            hold.reached.set()
            while not hold.go_on.wait(0.01):
                if hub.over.is_set():
                    self.close_connection = True
                    return
        self._write(request, body[start:end])
        if cut is not None:
            self.close_connection = True

    def _write(self, request: Request, body: bytes) -> None:
        for start in range(0, len(body), _PIECE_BYTES):
            piece = body[start : start + _PIECE_BYTES]
            # Before it goes out: a client that has it may look at once.
            self.server.hub.count(request, len(piece))
            self.wfile.write(piece)

    def _head(self, status: int, headers: Mapping[str, object], length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    # With fewer, several requests at once wait for a second.
    request_queue_size = 64
    # Closing waits for the threads.
    daemon_threads = False

    def __init__(self, hub: LocalHub, host: str) -> None:
        super().__init__((host, 0), _Handler)
        self.hub = hub
        self.open: set[socket] = set()
        self.url = f"http://{host}:{self.server_port}"
        poll = {"poll_interval": 0.01}
        self.thread = threading.Thread(target=self.serve_forever, kwargs=poll, name=self.url)
        self.thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.hub.lock:
            self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.hub.lock:
            self.open.discard(request)
        super().shutdown_request(request)

    def close(self) -> None:
        """End, whatever the clients are at."""
        self.shutdown()
        self.thread.join()
        with self.hub.lock:
            for connection in self.open:
                with suppress(OSError):
                    connection.shutdown(SHUT_RDWR)
        self.server_close()


@contextmanager
def serving(hub: LocalHub) -> Iterator[LocalHub]:
    """Serve `hub`, which has a URL then, and its CDN one of another host, as is the Hub's."""
    hub.over.clear()
    # Clients 1.x tell hosts apart by their names alone, and follow redirects to the same one.
    servers = [_Server(hub, "127.0.0.1"), _Server(hub, "127.0.0.2")]
    hub.url, hub.cdn_url = (server.url for server in servers)
    try:
        yield hub
    finally:
        hub.over.set()
        for server in servers:
            server.close()


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


_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def environ(hub_url: str, home: Path, token: str | None = None) -> dict[str, str]:
    """What to put over a child's environment: this Hub, a cache and token of its own, no proxy."""
    return {
        "HF_ENDPOINT": hub_url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_TOKEN": token or "",
        "HUGGING_FACE_HUB_TOKEN": "",
        "HF_HUB_OFFLINE": "",
        "TRANSFORMERS_OFFLINE": "",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        **{name: "" for proxy in _PROXIES for name in (proxy, proxy.lower())},
    }
