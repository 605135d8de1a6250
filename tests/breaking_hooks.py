"""What a way of the breaking proxy is made of: where it takes hold, and how it changes what passes.

A function that is decorated with `broken` or `harmless` becomes a `Way`: its name is the way's,
its docstring what the way does, and what it returns, anew for each proxy, are the `Hooks`. What a
way must see as a stream it handles event by event, so that it does not hold back what it should
not.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

# What the smoke test is told where a way is about keys; the proxy's own, not the server's.
KEY = "the-key-of-the-breaking-proxy"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
Headers = tuple[tuple[bytes, bytes], ...]
# An event's data: a JSON object, or what is none, such as [DONE].
Event = dict[str, Any] | str
Events = AsyncIterator[Event]
Chunks = AsyncIterator[bytes]


class CutError(Exception):
    """The connection to the client breaks off here."""


class DeathError(Exception):
    """The whole server ends here: every connection breaks off, and none is taken any more."""


@dataclass(frozen=True)
class Ask:
    """A request."""

    method: str
    path: str
    headers: Headers
    content: bytes

    @cached_property
    def body(self) -> dict[str, Any]:
        """The JSON object that was sent; empty where it is none."""
        return _object(self.content)

    @property
    def generates(self) -> bool:
        return self.path in (COMPLETIONS, CHAT)

    @property
    def streams(self) -> bool:
        return self.generates and self.body.get("stream") is True

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The turns of a chat; empty where the body is no such request."""
        messages = self.body.get("messages")
        right = isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
        return messages if self.path == CHAT and right and messages else []

    @property
    def key(self) -> str:
        return dict(self.headers).get(b"authorization", b"").decode("latin-1")

    def asking(self, **changes: Any) -> Ask:
        """The same request with other fields in its body; those that are None are left out."""
        body = {k: v for k, v in {**self.body, **changes}.items() if v is not None}
        return replace(self, content=json.dumps(body).encode())


@dataclass(frozen=True)
class Reply:
    """An answer that is whole."""

    status: int
    headers: Headers
    content: bytes

    @classmethod
    def of(cls, status: int, value: Any) -> Reply:
        return cls(status, ((b"content-type", b"application/json"),), dumps(value).encode())

    @property
    def value(self) -> dict[str, Any]:
        """The JSON object in it; empty where it holds none."""
        return _object(self.content)

    def with_value(self, value: Any) -> Reply:
        return replace(self, content=dumps(value).encode())


async def _same(ask: Ask) -> Ask | Reply:
    return ask


@asynccontextmanager
async def at_once(_: Ask) -> AsyncIterator[None]:
    """Hold nothing."""
    yield


@dataclass(frozen=True)
class Hooks:
    """Where a way takes hold of what passes, from the request to the bytes of the answer.

    `around` is held during the whole exchange; `ask` may also answer by itself; `reply` gets
    every whole answer, of any status; `events` and `wire` get the streams, `head` the headers of
    both. With `keeps_reading`, a request goes on when its client has left.
    """

    around: Callable[[Ask], AbstractAsyncContextManager[Any]] = at_once
    ask: Callable[[Ask], Awaitable[Ask | Reply]] = _same
    head: Callable[[Ask, Headers], Headers] | None = None
    reply: Callable[[Ask, Reply], Reply] | None = None
    events: Callable[[Ask, Events], Events] | None = None
    wire: Callable[[Ask, Chunks], Chunks] | None = None
    keeps_reading: bool = False
    closes: bool = False
    chunked: bool = False


@dataclass(frozen=True)
class Way:
    """One way to stand in between.

    `owners` are the checks whose promise is broken, each of which must say so; `options` what
    the smoke test must be told for that, as keyword arguments of its own.
    """

    name: str
    sentence: str
    kind: Literal["broken", "harmless"]
    owners: tuple[str, ...]
    make: Callable[[], Hooks]
    options: Mapping[str, Any]


def broken(*owners: str, **options: Any) -> Callable[[Callable[[], Hooks]], Way]:
    """Make a function a way that breaks the promise of each of `owners`."""
    return lambda make: _way(make, "broken", owners, options)


def harmless(**options: Any) -> Callable[[Callable[[], Hooks]], Way]:
    """Make a function a way that breaks nothing."""
    return lambda make: _way(make, "harmless", (), options)


def _way(
    make: Callable[[], Hooks],
    kind: Literal["broken", "harmless"],
    owners: tuple[str, ...],
    options: Mapping[str, Any],
) -> Way:
    assert make.__doc__, make
    sentence = " ".join(make.__doc__.split()).removesuffix(".")
    return Way(make.__name__.replace("_", "-"), sentence, kind, owners, make, options)


# What an answer holds, and the same with something else in it.


def dumps(value: Any) -> str:
    """JSON as vLLM writes it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def choice_of(value: Event) -> dict[str, Any]:
    """The first choice of an answer or event; empty where there is none."""
    choices = value.get("choices") if isinstance(value, dict) else None
    return choices[0] if choices else {}


def text_of(value: Event) -> str:
    """The text of an answer, or of an event of it."""
    choice = choice_of(value)
    holder = choice.get("message") or choice.get("delta") or {}
    return choice.get("text") or holder.get("content") or ""


def finish_of(value: Event) -> str | None:
    """Why the answer ended; None where it goes on."""
    return choice_of(value).get("finish_reason")


def with_text(value: dict[str, Any], text: str) -> dict[str, Any]:
    """The same answer or event with another text."""
    choice = dict(choice_of(value))
    if "text" in choice:
        choice["text"] = text
    for name in ("message", "delta"):
        if name in choice:
            choice[name] = {**choice[name], "content": text}
    return {**value, "choices": [choice]}


def with_finish(value: dict[str, Any], reason: str | None) -> dict[str, Any]:
    """The same answer or event with another finish_reason."""
    return {**value, "choices": [{**choice_of(value), "finish_reason": reason}]}


def with_header(headers: Headers, name: bytes, value: bytes) -> Headers:
    """The same headers with one of them set."""
    return (*(h for h in headers if h[0].lower() != name), (name, value))


def error(status: int, message: str, kind: str = "BadRequestError") -> Reply:
    """An error as vLLM words it."""
    return Reply.of(
        status, {"error": {"message": message, "type": kind, "param": None, "code": status}}
    )


NOT_FOUND = Reply.of(404, {"detail": "Not Found"})
DEAD = error(500, "EngineCore encountered an issue. See stack trace above.", "EngineDeadError")


async def numbered(events: Events) -> AsyncIterator[tuple[int, Event]]:
    """Each event, with its place from 0 among those that hold text; -1 for the others."""
    place = itertools.count()
    async for event in events:
        yield (next(place) if text_of(event) else -1), event


# Hooks that several ways have.


async def never() -> Any:
    """Wait for ever."""
    await asyncio.Event().wait()


def asked(change: Callable[[Ask], Ask | Reply]) -> Hooks:
    """Change, or answer, every request."""

    async def ask(ask: Ask) -> Ask | Reply:
        return change(ask)

    return Hooks(ask=ask)


def for_generations(change: Callable[[Ask], Ask | Reply]) -> Hooks:
    """Change, or answer, what is asked of the model."""
    return asked(lambda ask: change(ask) if ask.generates else ask)


def die(*_: Any) -> Reply:
    """End the server in the stead of an answer."""
    raise DeathError


def _is_key(sent: str) -> bool:
    return sent == f"Bearer {KEY}"


def wanting_key(*paths: str, is_right: Callable[[str], bool] = _is_key) -> Hooks:
    """Ask for a key at what begins with one of `paths`."""
    refused = Reply.of(401, {"error": "Unauthorized"})
    return asked(
        lambda ask: ask if is_right(ask.key) or not ask.path.startswith(paths) else refused
    )


def listing(change: Callable[[list[Any]], list[Any]]) -> Hooks:
    """Change the list of models."""

    def reply(ask: Ask, reply: Reply) -> Reply:
        if ask.path != "/v1/models" or reply.status != 200:
            return reply
        return reply.with_value({**reply.value, "data": change(reply.value["data"])})

    return Hooks(reply=reply)


def each_event(change: Callable[[Ask, dict[str, Any]], dict[str, Any]]) -> Any:
    """An `events` hook that changes every event that is JSON."""

    async def events(ask: Ask, events: Events) -> Events:
        async for event in events:
            yield change(ask, event) if isinstance(event, dict) else event

    return events


def each_whole(change: Callable[[Ask, dict[str, Any]], dict[str, Any]]) -> Any:
    """A `reply` hook that changes every whole answer of the model."""

    def reply(ask: Ask, reply: Reply) -> Reply:
        if not ask.generates or reply.status != 200:
            return reply
        return reply.with_value(change(ask, reply.value))

    return reply


def both(change: Callable[[Ask, dict[str, Any]], dict[str, Any]]) -> Hooks:
    """Change whole answers and events alike."""
    return Hooks(reply=each_whole(change), events=each_event(change))


def both_texts(change: Callable[[str], str]) -> Hooks:
    """Change the texts of whole answers and of events alike."""
    return both(
        lambda _, value: with_text(value, change(text_of(value))) if text_of(value) else value
    )


# An `events` hook that changes nothing: after it, each chunk on the wire is one event.
by_events = each_event(lambda _, event: event)


def each_chunk(change: Callable[[int, bytes], bytes]) -> Hooks:
    """Change the bytes of each event of a stream, by its place from 0."""

    async def wire(_: Ask, chunks: Chunks) -> Chunks:
        place = itertools.count()
        async for chunk in chunks:
            yield change(next(place), chunk)

    return Hooks(events=by_events, wire=wire)


def delayed(seconds: Callable[[int], float]) -> Hooks:
    """Write each event of a stream so much later, by its place from 0."""

    async def wire(_: Ask, chunks: Chunks) -> Chunks:
        place = itertools.count()
        async for chunk in chunks:
            await asyncio.sleep(seconds(next(place)))
            yield chunk

    return Hooks(events=by_events, wire=wire)


def refusals(what: str, change: Callable[[Ask, Reply], Reply]) -> Hooks:
    """Answer otherwise what the engine refuses, where it does so for `what`."""

    def reply(ask: Ask, reply: Reply) -> Reply:
        return change(ask, reply) if refused_for(ask, reply) == what else reply

    return Hooks(reply=reply)


def refused_for(ask: Ask, reply: Reply) -> str:
    """The check that wants this refusal; "" where the answer is none."""
    if reply.status != 400 or not ask.generates:
        return ""
    said = reply.content.decode().lower()
    if "maximum context length" in said:
        return "prompt-too-long"
    turns = ("must alternate", "user turn", "empty conversation")
    return "wrong-turns" if any(one in said for one in turns) else "malformed-body"
