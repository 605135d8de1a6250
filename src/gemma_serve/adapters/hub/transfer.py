"""One file from the Hub to the disk: the client transfers, an interruption costs nothing.

The client's 2.x throws a half file away when it ends, for whatever reason. Here the half file stays
under a name that the next try finds, and its content is compared with what the Hub promises before
it gets its real name.
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any, TypeVar

from gemma_serve.adapters.checksums import check_file
from gemma_serve.adapters.hub.cache import CachedRepo, cached_repo, forget_file
from gemma_serve.adapters.hub.errors import WrongContentError, broken_connections, http_status
from gemma_serve.planning.model.repo_files import RepoFile

T = TypeVar("T")

# An ETag will be a file's name.
_FILE_NAME = re.compile(r"\w[\w.-]*")

# Smaller ones are quicker fetched anew than asked about.
_RESUMABLE_BYTES = 2**20
_SHA256_DIGITS = 64
# The answer where the file ends at or before the byte from which the rest is wanted.
_NOTHING_BEYOND = 416
_CHUNK = 4 * 2**20
_POLL_S = 0.2
# In a row that bring nothing. The client makes its own before each, for some ways to break off.
_TRIES = 3
_PAUSE_S = 0.5


class CancelledError(Exception):
    """The transfer was told to end; what came is kept."""


@dataclass(frozen=True)
class Reporting:
    """How a transfer tells and is told.

    `on_size` is how much of the file is here by now, `on_life` that something goes on although
    that stands still.
    """

    on_size: Callable[[int], None]
    on_life: Callable[[], None]
    is_cancelled: Callable[[], bool]


def fetch_to_cache(repo: CachedRepo, commit: str, file: RepoFile, reporting: Reporting) -> None:
    """Bring `file` into the local cache, from where it broke off if it did.

    Raises:
        CancelledError: told to end.
        WrongContentError: what came, twice, is not what the Hub promises.
        Exception: the client's own errors, for `problem_for`.
    """
    if _is_resumable(file):
        blob = _fetch_blob(repo, commit, file, reporting)
        # The client makes the link to what is there.
        _by_the_client(repo.model, commit, file, reporting, cache_dir=repo.folder.parent)
        if not (repo.snapshot(commit) / file.name).is_symlink():
            # Where there are no links, the client has made a copy.
            blob.unlink(missing_ok=True)
        return
    where = {"cache_dir": repo.folder.parent}
    _right_by_the_client(repo.model, commit, file, repo.snapshot(commit), reporting, **where)


def fetch_to_folder(
    model: str,
    commit: str,
    file: RepoFile,
    folder: Path,
    reporting: Reporting,
    *,
    cached: Path | None = None,
) -> None:
    """Bring `file` into a plain folder, from the file `cached` where that is right, else the Hub.

    Raises:
        CancelledError, WrongContentError, Exception: as `fetch_to_cache`.
    """
    target = folder / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if _is_for_the_client(file):
        _right_by_the_client(model, commit, file, folder, reporting, local_dir=folder)
        return
    partial = partial_in(folder, file)
    if cached is not None:
        _copy(cached, partial, reporting)
    _fetch(model, commit, file, partial, reporting)
    partial.replace(target)


def partial_in(folder: Path, file: RepoFile) -> Path:
    """Where a file of a plain folder is until it is whole."""
    target = folder / file.name
    return target.with_name(f".{target.name}.incomplete")


@contextmanager
def only_writer(folder: Path) -> Iterator[bool]:
    """Lock a folder against others that would write to it; False where one does already."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks, as some network ones
        yield True
    finally:
        os.close(handle)


def _fetch_blob(repo: CachedRepo, commit: str, file: RepoFile, reporting: Reporting) -> Path:
    """Put the file's content where the client looks for it."""
    source = _persistently(lambda: _find_source(repo.model, commit, file, reporting), reporting)
    blob = repo.blob(source.etag)
    blob.parent.mkdir(parents=True, exist_ok=True)
    with _locked(repo.lock(blob.name), reporting):
        # Somebody else may have brought it meanwhile, or long ago and damaged.
        alive = _read_by(reporting)
        if check_file(blob.parent, _named(file, blob), None, alive).state == "whole":
            return blob
        blob.unlink(missing_ok=True)
        partial = blob.with_name(f"{blob.name}.incomplete")
        _fetch(repo.model, commit, file, partial, reporting)
        partial.replace(blob)
    return blob


@dataclass(frozen=True)
class _Source:
    url: str
    headers: dict[str, str]
    etag: str


def _find_source(
    model: str, commit: str, file: RepoFile, reporting: Reporting | None = None
) -> _Source:
    """Where the file's bytes are now; links to them hold for an hour or so."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import FileMetadataError
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(model, file.name, revision=commit)
    headers = build_hf_headers()
    found = get_hf_file_metadata(url, headers=headers)
    if reporting is not None:
        reporting.on_life()
    if not found.etag or not _FILE_NAME.fullmatch(found.etag):
        raise FileMetadataError(f"{file.name} has no ETag that could name a file")
    if found.location != url and not _is_hub(found.location, url):
        # A signed address of a storage: the token is none of its business.
        headers.pop("authorization", None)
    return _Source(found.location, headers, found.etag)


def ask_for_one_byte(model: str, commit: str, file: RepoFile, time_limit_s: float) -> None:
    """See why nothing comes: the client waits and asks again by itself, and does not say for what.

    Raises:
        Exception: the client's own error, for what the storage answers.
    """
    from huggingface_hub import get_session, hf_raise_for_status

    source = _find_source(model, commit, file)
    headers = {**source.headers, "Range": "bytes=0-0"}
    with get_session().stream("GET", source.url, headers=headers, timeout=time_limit_s) as response:
        hf_raise_for_status(response)


def _is_hub(location: str, url: str) -> bool:
    from urllib.parse import urlsplit

    hubs = {urlsplit(url).netloc, "huggingface.co", "hf.co"}
    return urlsplit(location).netloc in hubs


def _fetch(model: str, commit: str, file: RepoFile, partial: Path, reporting: Reporting) -> None:
    """Fill `partial`, which may hold the beginning already, with the file's right content."""
    found = ""
    for _ in range(2):
        _receive(model, commit, file, partial, reporting)
        state = check_file(partial.parent, _named(file, partial), None, _read_by(reporting))
        if state.state == "whole":
            return
        # Whatever it began with, it went wrong: once more from nothing.
        found = state.found
        partial.unlink(missing_ok=True)
        reporting.on_size(0)
    raise WrongContentError(file.name, found)


def _read_by(reporting: Reporting) -> Callable[[int], None]:
    """What to tell while a file is read for its checksum."""

    def on_bytes(_: int) -> None:
        _heed(reporting)
        reporting.on_life()

    return on_bytes


def _named(file: RepoFile, path: Path) -> RepoFile:
    """The same content under the name that it has on the way."""
    return RepoFile(path.name, file.size_bytes, file.checksum)


def _receive(model: str, commit: str, file: RepoFile, partial: Path, reporting: Reporting) -> None:
    """Receive the rest of the file. A connection that breaks is made anew while bytes come."""
    in_vain = most = 0
    while True:
        _heed(reporting)
        with _Growing(partial, reporting) as stream:
            had = stream.size()
            begun_anew = had < file.size_bytes and not _is_resumable(file)
            if had > file.size_bytes or begun_anew:
                stream.seek(0)
                stream.truncate()
                had = 0
            most = max(most, had)
            reporting.on_size(had)
            if had == file.size_bytes:
                return
            broken: Exception | None = None
            try:
                _request(model, commit, file, stream, had)
            except broken_connections() as error:
                broken = error
            has = stream.size()
        # Without an error it may have ended early too, where nobody said how long it is.
        if broken is None and not most < has < file.size_bytes:
            return
        # Who begins anew each time must come further, too.
        in_vain = 0 if has > most else in_vain + 1
        most = max(most, has)
        if broken is not None and in_vain == _TRIES:
            raise broken
        sleep(in_vain * _PAUSE_S)


def _request(model: str, commit: str, file: RepoFile, stream: _Growing, had: int) -> None:
    from huggingface_hub.file_download import http_get

    source = _find_source(model, commit, file, stream.reporting)
    try:
        http_get(
            source.url,
            stream,
            resume_size=had,
            headers=source.headers,
            expected_size=file.size_bytes,
        )
    except Exception as error:
        # Ours of the content follows, and says more.
        if not _is_about_the_length(error):
            raise


def _is_about_the_length(error: Exception) -> bool:
    """Whether all came that the Hub has, and it is longer or shorter than it should be."""
    if http_status(error) == _NOTHING_BEYOND:
        return True
    of_the_client = isinstance(error, OSError) and error.errno is None
    return of_the_client and "Consistency check failed" in str(error)


class _Growing(io.FileIO):
    """A file that is being received: unbuffered, so that all that came is on the disk."""

    def __init__(self, path: Path, reporting: Reporting) -> None:
        super().__init__(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        self.path = path
        self.reporting = reporting
        self.seek(0, os.SEEK_END)

    def size(self) -> int:
        return os.fstat(self.fileno()).st_size

    def write(self, data: Any) -> int:
        _heed(self.reporting)
        left = memoryview(data).cast("B")
        whole = len(left)
        while left:
            # A disk that is nearly full takes a part before it takes no more.
            try:
                written = super().write(left)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            left = left[written or 0 :]
        self.reporting.on_size(self.tell())
        return whole


def _right_by_the_client(
    model: str, commit: str, file: RepoFile, folder: Path, reporting: Reporting, **where: Path
) -> None:
    """Let the client bring a file that then is in `folder`, once more where it is not right."""
    # The client takes any ETag for a file's name.
    _persistently(lambda: _find_source(model, commit, file, reporting), reporting)
    found = ""
    for _ in range(2):
        reporting.on_size(0)
        try:
            _by_the_client(model, commit, file, reporting, **where)
        except OSError as error:
            if not _is_about_the_length(error):
                raise
            found = f"it has another length than {file.size_bytes:,} bytes"
            # 1.x goes on with what it began, be that too long already.
            repo = cached_repo(model, next(iter(where.values())))
            repo.blob(f"{file.checksum}.incomplete").unlink(missing_ok=True)
            continue
        state = check_file(folder, file, None, _read_by(reporting))
        if state.state == "whole":
            return
        found = state.found
        forget_file(folder, file.name)
    raise WrongContentError(file.name, found)


def _by_the_client(
    model: str, commit: str, file: RepoFile, reporting: Reporting, **where: Any
) -> None:
    """Let the client fetch a file in its own way, and again where the connection breaks."""
    _persistently(lambda: _once_by_the_client(model, commit, file, reporting, **where), reporting)


def _persistently(ask: Callable[[], T], reporting: Reporting) -> T:
    """What `ask` gives, asked a few times where the connection breaks."""
    for in_vain in range(1, _TRIES):
        _heed(reporting)
        try:
            return ask()
        except broken_connections():
            sleep(in_vain * _PAUSE_S)
    _heed(reporting)
    return ask()


def _heed(reporting: Reporting) -> None:
    if reporting.is_cancelled():
        raise CancelledError


def _once_by_the_client(
    model: str, commit: str, file: RepoFile, reporting: Reporting, **where: Any
) -> None:
    """The client takes no callback that all its versions know, so its file is looked at.

    In a thread that nobody waits for, since it can't be cancelled.
    """
    from huggingface_hub import hf_hub_download

    done: Future[object] = Future()

    def run() -> None:
        try:
            done.set_result(hf_hub_download(model, file.name, revision=commit, **where))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="hub file", daemon=True).start()
    while not done.done():
        _heed(reporting)
        if _is_for_the_client(file):
            reporting.on_size(size_on_the_way(model, file, next(iter(where.values()))))
        wait([done], timeout=_POLL_S)
    done.result()
    reporting.on_size(file.size_bytes)


def size_on_the_way(model: str, file: RepoFile, folder: Path) -> int:
    """How much the client has written of a file, which it names after the checksum."""
    sizes = [0]
    blobs = cached_repo(model, folder).folder / "blobs"
    local = folder / ".cache" / "huggingface" / "download"
    for place in (blobs, local):
        sizes += _sizes_of(place, f"*{file.checksum}*.incomplete")
    return min(max(sizes), file.size_bytes)


def _sizes_of(folder: Path, pattern: str) -> list[int]:
    sizes = []
    for path in folder.glob(pattern):
        with suppress(OSError):
            sizes.append(path.stat().st_size)
    return sizes


def _is_resumable(file: RepoFile) -> bool:
    # Files known by their SHA-256 are stored apart, and come as they are: never compressed.
    is_stored_apart = len(file.checksum or "") == _SHA256_DIGITS
    large = file.size_bytes >= _RESUMABLE_BYTES
    return (is_stored_apart or large) and not _is_for_the_client(file)


def _is_for_the_client(file: RepoFile) -> bool:
    """Whether only the client's own transfer will do, by Xet: it can't go on where it broke off.

    Beyond a size the client refuses plain HTTP; and HF_XET_HIGH_PERFORMANCE asks for Xet.
    """
    from huggingface_hub import constants

    if file.size_bytes > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return True
    wanted = os.environ.get("HF_XET_HIGH_PERFORMANCE", "").upper() in ("1", "ON", "YES", "TRUE")
    return wanted and file.size_bytes >= _RESUMABLE_BYTES


def _copy(source: Path, target: Path, reporting: Reporting) -> None:
    """Copy a file of the cache, as a whole: what is there of `target` may be anything."""
    alive = _read_by(reporting)
    with source.open("rb") as reading, target.open("wb") as writing:
        while chunk := reading.read(_CHUNK):
            writing.write(chunk)
            alive(len(chunk))


@contextmanager
def _locked(lock: Path, reporting: Reporting) -> Iterator[None]:
    """Hold the client's own lock on a blob; wait for whoever else fetches it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as held:
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if reporting.is_cancelled():
                    raise CancelledError from None
                reporting.on_life()
                sleep(_POLL_S)
            except OSError:
                break  # a file system without locks, as some network ones
        yield
