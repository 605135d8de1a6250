"""A proxy that stands before a real engine and breaks one promise of the endpoint at a time.

    python tests/breaking_proxy.py --upstream http://127.0.0.1:8000 --way lost-event [--port 9000]
    python tests/breaking_proxy.py --tables

Without a way it changes nothing: bytes pass as they come, and when a client leaves, its request
is given up upstream. Each way in `WAYS` says what it does and, where it breaks a promise, which
checks own that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import h11

import broken_answers
import broken_streams
import harmless_ways
from breaking_hooks import (
    Ask,
    Chunks,
    CutError,
    DeathError,
    Events,
    Headers,
    Hooks,
    Reply,
    Way,
    dumps,
    with_header,
)

_HOP_BY_HOP = {b"connection", b"content-length", b"keep-alive", b"transfer-encoding", b"host"}
_READ_BYTES = 65536


def _ways(*modules: ModuleType) -> list[Way]:
    return [one for module in modules for one in vars(module).values() if isinstance(one, Way)]


BROKEN = _ways(broken_answers, broken_streams)
HARMLESS = _ways(harmless_ways)
WAYS = {way.name: way for way in (*BROKEN, *HARMLESS)}


class _Upstream:
    """The server behind, as a client sees it: one connection for each request."""

    def __init__(self, url: str, key: str | None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._host, self._port, self._key = parts.hostname, parts.port, key

    @asynccontextmanager
    async def answer(self, ask: Ask) -> AsyncIterator[tuple[h11.Response, Chunks]]:
        """Pass `ask` on; leaving the block gives it up where its answer isn't whole."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            connection = h11.Connection(h11.CLIENT)
            writer.write(connection.send(self._request(ask)) or b"")
            if ask.content:
                writer.write(connection.send(h11.Data(ask.content)) or b"")
            writer.write(connection.send(h11.EndOfMessage()) or b"")
            head = await self._next(connection, reader)
            while isinstance(head, h11.InformationalResponse):
                head = await self._next(connection, reader)
            assert isinstance(head, h11.Response), head
            yield head, self._chunks(connection, reader)
        finally:
            writer.transport.abort()

    def _request(self, ask: Ask) -> h11.Request:
        headers = ask.headers
        if self._key is not None:
            headers = with_header(headers, b"authorization", f"Bearer {self._key}".encode())
        kept = [header for header in headers if header[0].lower() not in _HOP_BY_HOP]
        ours = [("Host", f"{self._host}:{self._port}"), ("Connection", "close")]
        if ask.content or ask.method == "POST":
            ours.append(("Content-Length", str(len(ask.content))))
        return h11.Request(method=ask.method, target=ask.path, headers=[*ours, *kept])

    async def _chunks(self, connection: h11.Connection, reader: asyncio.StreamReader) -> Chunks:
        while isinstance(event := await self._next(connection, reader), h11.Data):
            yield bytes(event.data)

    @staticmethod
    async def _next(connection: h11.Connection, reader: asyncio.StreamReader) -> Any:
        while (event := connection.next_event()) is h11.NEED_DATA:
            connection.receive_data(await reader.read(_READ_BYTES))
        return event


class _Client:
    """One connection of a client."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, hooks: Hooks
    ) -> None:
        self.gone = False
        self._reader, self._writer, self._hooks = reader, writer, hooks
        self._connection = h11.Connection(h11.SERVER)

    async def next_ask(self) -> Ask | None:
        """The next request; None where the client is done."""
        if self._connection.our_state is h11.DONE:
            self._connection.start_next_cycle()
        request = await self._next()
        if not isinstance(request, h11.Request):
            return None
        content = b""
        while isinstance(event := await self._next(), h11.Data):
            content += bytes(event.data)
        headers = tuple((bytes(name), bytes(value)) for name, value in request.headers)
        return Ask(request.method.decode(), request.target.decode(), headers, content)

    @property
    def goes_on(self) -> bool:
        """Whether another request may come on this connection."""
        return not self.gone and self._connection.our_state is h11.DONE

    async def left(self) -> None:
        """Return when the client closes the connection."""
        while data := await self._reader.read(_READ_BYTES):
            self._connection.receive_data(data)

    async def send_whole(self, reply: Reply) -> None:
        length = () if self._hooks.chunked else ((b"content-length", b"%d" % len(reply.content)),)
        await self.begin(reply.status, (*reply.headers, *length))
        await self.send(h11.Data(reply.content))
        await self.send(h11.EndOfMessage())

    async def begin(self, status: int, headers: Headers) -> None:
        if self._hooks.closes:
            # What h11 frames for HTTP/1.0: no length and no chunks, the end is the end.
            self._connection.their_http_version = b"1.0"
            headers = tuple(header for header in headers if header[0] != b"content-length")
        await self.send(h11.Response(status_code=status, headers=list(headers)))

    async def send(self, event: Any) -> None:
        if self.gone:
            return
        self._writer.write(self._connection.send(event) or b"")
        try:
            await self._writer.drain()
        except ConnectionError:
            self.gone = True
            if not self._hooks.keeps_reading:
                raise

    async def close(self, *, abruptly: bool) -> None:
        if abruptly:
            self._writer.transport.abort()
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()

    async def _next(self) -> Any:
        while (event := self._connection.next_event()) is h11.NEED_DATA:
            try:
                self._connection.receive_data(await self._reader.read(_READ_BYTES))
            except ConnectionError:
                return h11.ConnectionClosed()
        return event


class Proxy:
    """Listens on `listener` and passes everything on to `upstream`, through `hooks`."""

    def __init__(self, upstream: _Upstream, hooks: Hooks, listener: socket.socket) -> None:
        self._upstream, self._hooks, self._listener = upstream, hooks, listener
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def serve(self, stop: asyncio.Event) -> None:
        """Serve until `stop`."""
        self._server = await asyncio.start_server(self._accept, sock=self._listener)
        await stop.wait()
        self._end()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _end(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._start(self._serve(reader, writer))

    def _start(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # or asyncio logs that nobody asked

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client, abruptly = _Client(reader, writer, self._hooks), True
        self._writers.add(writer)
        try:
            while (ask := await client.next_ask()) is not None:
                if not await self._attend(client, ask):
                    break
            abruptly = False
        except (CutError, ConnectionError, h11.RemoteProtocolError):
            pass
        except DeathError:
            self._end()
        finally:
            self._writers.discard(writer)
            await client.close(abruptly=abruptly)

    async def _attend(self, client: _Client, ask: Ask) -> bool:
        """Answer while the client is there; whether another request may come."""
        answering = self._start(self._answer(client, ask))
        left = asyncio.create_task(client.left())
        try:
            await asyncio.wait((answering, left), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                client.gone = True
                if not self._hooks.keeps_reading:
                    answering.cancel()
                    await asyncio.wait((answering,))
                return False
            await answering
            return client.goes_on
        finally:
            left.cancel()
            await asyncio.wait((left,))
            if not left.cancelled():
                left.exception()

    async def _answer(self, client: _Client, ask: Ask) -> None:
        hooks = self._hooks
        async with hooks.around(ask):
            asked = await hooks.ask(ask)
            if isinstance(asked, Reply):
                await client.send_whole(asked)
                return
            async with self._upstream.answer(asked) as (head, chunks):
                raw = ((bytes(n), bytes(v)) for n, v in head.headers.raw_items())
                headers = tuple(one for one in raw if one[0].lower() not in _HOP_BY_HOP)
                headers = hooks.head(asked, headers) if hooks.head else headers
                if asked.streams and head.status_code == 200:
                    await self._stream(client, asked, headers, chunks)
                    return
                content = b"".join([chunk async for chunk in chunks])
                reply = Reply(head.status_code, headers, content)
                await client.send_whole(hooks.reply(asked, reply) if hooks.reply else reply)

    async def _stream(self, client: _Client, ask: Ask, headers: Headers, chunks: Chunks) -> None:
        hooks = self._hooks
        if hooks.events:
            chunks = _written(hooks.events(ask, _read(chunks)))
        if hooks.wire:
            chunks = hooks.wire(ask, chunks)
        await client.begin(200, headers)
        async for chunk in chunks:
            await client.send(h11.Data(chunk))
        await client.send(h11.EndOfMessage())


async def _read(chunks: Chunks) -> Events:
    """The events in what vLLM streams: one `data` line each."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n\n")
        for line in lines:
            data = line.decode().removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


async def _written(events: Events) -> Chunks:
    async for event in events:
        data = event if isinstance(event, str) else dumps(event)
        yield f"data: {data}\n\n".encode()


@contextmanager
def breaking(upstream: str, way: Way, *, key: str | None = None, port: int = 0) -> Iterator[str]:
    """The URL of a proxy before `upstream` that breaks things in this way, while it is open.

    With `key`, that is what the upstream is sent, whatever the client sends.
    """
    with socket.create_server(("127.0.0.1", port)) as listener:
        stop, loops = asyncio.Event(), []
        ready = threading.Event()

        async def serve() -> None:
            loops.append(asyncio.get_running_loop())
            ready.set()
            await Proxy(_Upstream(upstream, key), way.make(), listener).serve(stop)

        thread = threading.Thread(target=asyncio.run, args=(serve(),), name=way.name)
        thread.start()
        ready.wait()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            loops[0].call_soon_threadsafe(stop.set)
            thread.join()


def tables() -> str:
    """Both tables of the documentation, in Markdown."""
    lines = ["| way | what is broken | caught by |", "|---|---|---|"]
    lines += [
        f"| `{way.name}` | {way.sentence} | {', '.join(f'`{id}`' for id in way.owners)} |"
        for way in BROKEN
    ]
    lines += ["", "| way | what is other than vLLM has it, and right |", "|---|---|"]
    lines += [f"| `{way.name}` | {way.sentence} |" for way in HARMLESS]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--upstream", help="the server's URL, such as http://127.0.0.1:8000")
    parser.add_argument("--way", choices=sorted(WAYS), default="nothing", metavar="NAME")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--key", help="the server's key, sent in the stead of the client's")
    parser.add_argument("--tables", action="store_true", help="print the documentation's tables")
    options = parser.parse_args()
    if options.tables or not options.upstream:
        print(tables(), end="")
        return
    way = WAYS[options.way]
    with breaking(options.upstream, way, key=options.key, port=options.port) as url:
        print(f"{options.way} at {url}, until Ctrl-C", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
