"""A proxy that stands before a real engine and breaks one promise of the endpoint at a time.

    python tests/breaking_proxy.py --upstream http://127.0.0.1:8000 --way lost-event [--port 9000]
    python tests/breaking_proxy.py --tables

Without a way it changes nothing: bytes pass as they come, and when a client leaves, its request
is given up upstream. Each way in `WAYS` says what it does and, where it breaks a promise, which
check owns that. What a way must see as a stream it handles event by event, so that it does not
hold back what it should not.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import itertools
import json
import random
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal
from urllib.parse import urlsplit

import h11

KEY = "the-key-of-the-breaking-proxy"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
NO_TEMPLATE = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a "
    "chat template if the tokenizer does not define one."
)
Headers = tuple[tuple[bytes, bytes], ...]
# An event's data: a JSON object, or what is none, such as [DONE].
Event = dict[str, Any] | str
_HOP_BY_HOP = {b"connection", b"content-length", b"keep-alive", b"transfer-encoding", b"host"}
_READ_BYTES = 65536
# How long a request waits for another to change places with, or to start with.
_TOGETHER_S = 0.05


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
        try:
            body = json.loads(self.content)
        except ValueError:
            return {}
        return body if isinstance(body, dict) else {}

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
        return cls(status, ((b"content-type", b"application/json"),), _dumps(value).encode())

    @property
    def value(self) -> dict[str, Any]:
        """The JSON object in it; empty where it holds none."""
        try:
            value = json.loads(self.content)
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def with_value(self, value: Any) -> Reply:
        return replace(self, content=_dumps(value).encode())


Events = AsyncIterator[Event]
Chunks = AsyncIterator[bytes]


async def _same(ask: Ask) -> Ask | Reply:
    return ask


@asynccontextmanager
async def _at_once(_: Ask) -> AsyncIterator[None]:
    yield


@dataclass(frozen=True)
class Hooks:
    """Where a way takes hold of what passes, from the request to the bytes of the answer.

    `around` is held during the whole exchange; `ask` may also answer by itself; `reply` gets
    every whole answer, of any status; `events` and `wire` get the streams, `head` the headers of
    both.
    """

    around: Callable[[Ask], AbstractAsyncContextManager[Any]] = _at_once
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
    options: Mapping[str, Any] = field(default_factory=dict)


WAYS: dict[str, Way] = {}
Make = Callable[[], Hooks]


def broken(name: str, sentence: str, *owners: str, **options: Any) -> Callable[[Make], Make]:
    """Register a way that breaks the promise of each of `owners`."""
    return _register(name, sentence, "broken", owners, options)


def harmless(name: str, sentence: str, **options: Any) -> Callable[[Make], Make]:
    """Register a way that breaks nothing."""
    return _register(name, sentence, "harmless", (), options)


def _register(
    name: str,
    sentence: str,
    kind: Literal["broken", "harmless"],
    owners: tuple[str, ...],
    options: Mapping[str, Any],
) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        assert name not in WAYS, name
        WAYS[name] = Way(name, sentence, kind, owners, make, options)
        return make

    return register


# What an answer holds, and how a way changes it.


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _choice(value: Event) -> dict[str, Any]:
    choices = value.get("choices") if isinstance(value, dict) else None
    return choices[0] if choices else {}


def text_of(value: Event) -> str:
    """The text of an answer, or of an event of it."""
    choice = _choice(value)
    holder = choice.get("message") or choice.get("delta") or {}
    return choice.get("text") or holder.get("content") or ""


def finish_of(value: Event) -> str | None:
    """Why the answer ended; None where it goes on."""
    return _choice(value).get("finish_reason")


def with_text(value: dict[str, Any], text: str) -> dict[str, Any]:
    """The same answer or event with another text."""
    choice = dict(_choice(value))
    if "text" in choice:
        choice["text"] = text
    for name in ("message", "delta"):
        if name in choice:
            choice[name] = {**choice[name], "content": text}
    return {**value, "choices": [choice]}


def with_finish(value: dict[str, Any], reason: str | None) -> dict[str, Any]:
    """The same answer or event with another finish_reason."""
    return {**value, "choices": [{**_choice(value), "finish_reason": reason}]}


def error(status: int, message: str, kind: str = "BadRequestError") -> Reply:
    """An error as vLLM words it."""
    return Reply.of(
        status, {"error": {"message": message, "type": kind, "param": None, "code": status}}
    )


_DEAD = error(500, "EngineCore encountered an issue. See stack trace above.", "EngineDeadError")


async def numbered(events: Events) -> AsyncIterator[tuple[int, Event]]:
    """Each event, with its place from 0 among those that hold text; -1 for the others."""
    place = itertools.count()
    async for event in events:
        yield (next(place) if text_of(event) else -1), event


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


def for_generations(change: Callable[[Ask], Ask | Reply]) -> Hooks:
    """Change, or answer, what is asked of the model."""

    async def ask(ask: Ask) -> Ask | Reply:
        return change(ask) if ask.generates else ask

    return Hooks(ask=ask)


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


# Broken: whether anybody is there, and who.


async def _never() -> Any:
    await asyncio.Event().wait()


@broken("hang", "Every request is taken, and none answered", "reachable", check_timeout_s=2.0)
def _() -> Hooks:
    async def ask(_: Ask) -> Ask | Reply:
        return await _never()

    return Hooks(ask=ask)


@broken("dead", "The server is gone: no connection is taken", "reachable")
def _() -> Hooks:
    async def ask(_: Ask) -> Ask | Reply:
        raise DeathError

    return Hooks(ask=ask)


@broken("unhealthy", "Every answer is 503, as from a gateway without a server", "reachable")
def _() -> Hooks:
    async def ask(_: Ask) -> Ask | Reply:
        return Reply(503, ((b"content-type", b"text/html"),), b"<h1>503 Unavailable</h1>")

    return Hooks(ask=ask)


def _guarded(ask: Ask, is_right: Callable[[str], bool], paths: Sequence[str]) -> Ask | Reply:
    if is_right(ask.key) or not any(map(ask.path.startswith, paths)):
        return ask
    return Reply.of(401, {"error": "Unauthorized"})


@broken("no-key-asked", "Nobody is asked for the key", "authenticated", api_key=KEY)
def _() -> Hooks:
    return Hooks()


@broken(
    "only-list-guarded",
    "The key is asked for the list of models only",
    "authenticated",
    api_key=KEY,
)
def _() -> Hooks:
    async def ask(ask: Ask) -> Ask | Reply:
        return _guarded(ask, lambda key: key == f"Bearer {KEY}", ("/v1/models",))

    return Hooks(ask=ask)


@broken("any-key", "A wrong key does as well as the right one", "authenticated", api_key=KEY)
def _() -> Hooks:
    async def ask(ask: Ask) -> Ask | Reply:
        return _guarded(ask, lambda key: key.startswith("Bearer "), ("/v1/",))

    return Hooks(ask=ask)


def _listing(change: Callable[[list[Any]], list[Any]]) -> Hooks:
    def reply(ask: Ask, reply: Reply) -> Reply:
        if ask.path != "/v1/models" or reply.status != 200:
            return reply
        return reply.with_value({**reply.value, "data": change(reply.value["data"])})

    return Hooks(reply=reply)


@broken("nothing-listed", "The list of models is empty", "models")
def _() -> Hooks:
    return _listing(lambda _: [])


@broken("wrong-name-listed", "The list names another model", "models", model="demo")
def _() -> Hooks:
    return _listing(lambda models: [{**one, "id": "gemma-from-elsewhere"} for one in models])


@broken(
    "any-name-answered",
    "A model that is not served is answered by the one that is",
    "unknown-model",
)
def _() -> Hooks:
    return for_generations(lambda ask: ask.asking(model="demo") if ask.body else ask)


@broken("unknown-model-500", "A model that is not served is an internal error", "unknown-model")
def _() -> Hooks:
    def reply(_: Ask, reply: Reply) -> Reply:
        return error(500, "KeyError", "InternalServerError") if reply.status == 404 else reply

    return Hooks(reply=reply)


@broken("wrong-model", "Answers come from a model of another name", "completion", "chat")
def _() -> Hooks:
    return both(lambda _, value: {**value, "model": "gemma-from-elsewhere"})


@broken(
    "wrong-model-streamed",
    "Only streamed answers name another model",
    "completion-stream",
    "chat-stream",
)
def _() -> Hooks:
    return Hooks(events=each_event(lambda _, event: {**event, "model": "gemma-from-elsewhere"}))


# Broken: whether the model answers at all.


@broken("engine-dead", "/health is 200, and every generation 500", "completion", "chat")
def _() -> Hooks:
    return for_generations(lambda _: _DEAD)


@broken(
    "generations-hang", "/health is 200, and no generation ends", "completion", check_timeout_s=2.0
)
def _() -> Hooks:
    async def ask(ask: Ask) -> Ask | Reply:
        return await _never() if ask.generates else ask

    return Hooks(ask=ask)


@broken("hidden-error", "An error comes with status 200", "completion", "chat")
def _() -> Hooks:
    return for_generations(lambda _: replace(_DEAD, status=200))


@broken("half-json", "The JSON of a whole answer breaks off", "completion", "chat")
def _() -> Hooks:
    def reply(ask: Ask, reply: Reply) -> Reply:
        return replace(reply, content=reply.content[:-40]) if ask.generates else reply

    return Hooks(reply=reply)


@broken("no-choices", "Whole answers hold no choice", "completion", "chat")
def _() -> Hooks:
    return Hooks(reply=each_whole(lambda _, value: {**value, "choices": []}))


@broken("no-template", "Chats are refused for want of a chat template", "chat")
def _() -> Hooks:
    return for_generations(lambda ask: error(400, NO_TEMPLATE) if ask.path == CHAT else ask)


@broken("no-chat", "There is no /v1/chat/completions", "chat")
def _() -> Hooks:
    async def ask(ask: Ask) -> Ask | Reply:
        return Reply.of(404, {"detail": "Not Found"}) if ask.path == CHAT else ask

    return Hooks(ask=ask)


# Broken: streams.

_STREAMS = ("completion-stream", "chat-stream")


@broken("one-chunk", "The whole stream comes in one piece, at its end", *_STREAMS)
def _() -> Hooks:
    async def wire(_: Ask, chunks: Chunks) -> Chunks:
        yield b"".join([chunk async for chunk in chunks])

    return Hooks(wire=wire)


@broken("kept-back", "The stream is kept back to its end, then sent event by event", *_STREAMS)
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        for event in [event async for event in events]:
            await asyncio.sleep(0)
            yield event

    return Hooks(events=events)


@broken("one-event", "The whole text comes in one event of a right stream", *_STREAMS)
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        text = ""
        async for event in events:
            text += text_of(event)
            if finish_of(event):
                assert isinstance(event, dict)
                yield with_text(event, text)
            elif not text_of(event):
                yield event

    return Hooks(events=events)


@broken("not-streamed", "A stream is asked for, and a whole answer comes", *_STREAMS)
def _() -> Hooks:
    def whole(ask: Ask) -> Ask | Reply:
        return ask.asking(stream=None, stream_options=None) if ask.streams else ask

    return for_generations(whole)


@broken("lost-first", "The first text of a stream is lost", *_STREAMS)
def _() -> Hooks:
    return Hooks(events=_without(0))


@broken("lost-event", "An event from the middle of a stream is lost", *_STREAMS)
def _() -> Hooks:
    return Hooks(events=_without(3))


def _without(lost: int) -> Any:
    async def events(_: Ask, events: Events) -> Events:
        async for place, event in numbered(events):
            if place != lost:
                yield event

    return events


@broken("lost-last", "The last text of a stream is lost", *_STREAMS)
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        last: list[Event] = []
        async for event in events:
            if text_of(event):
                for kept in last:
                    yield kept
                last = [event]
            elif last:
                last.append(event)
            else:
                yield event
        for kept in last:
            yield with_text(kept, "") if isinstance(kept, dict) and text_of(kept) else kept

    return Hooks(events=events)


@broken("doubled-event", "An event comes twice", *_STREAMS)
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        async for place, event in numbered(events):
            yield event
            if place == 3:
                yield event

    return Hooks(events=events)


@broken("swapped-events", "Two events come in the wrong order", *_STREAMS)
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        held: list[Event] = []
        async for place, event in numbered(events):
            if place == 3 and not finish_of(event):
                held.append(event)
                continue
            yield event
            while held:
                yield held.pop()
        for event in held:
            yield event

    return Hooks(events=events)


@broken("foreign-events", "Events of another stream are mixed in", *_STREAMS)
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        async for place, event in numbered(events):
            if place == 3 and isinstance(event, dict):
                yield {**with_text(with_finish(event, None), " Rome"), "id": "cmpl-of-another"}
            yield event

    return Hooks(events=events)


@broken("whole-so-far", "Each event repeats the whole text so far", *_STREAMS)
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        text = ""
        async for event in events:
            text += text_of(event)
            yield with_text(event, text) if isinstance(event, dict) and text_of(event) else event

    return Hooks(events=events)


@broken("trimmed", "The text of each event is stripped of its spaces", *_STREAMS)
def _() -> Hooks:
    return Hooks(
        events=each_event(
            lambda _, event: with_text(event, text_of(event).strip()) if text_of(event) else event
        )
    )


@broken("no-done", "A stream ends without [DONE]", *_STREAMS)
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        async for event in events:
            if event != "[DONE]":
                yield event

    return Hooks(events=events)


@broken("early-done", "[DONE] comes before the last events", *_STREAMS)
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        async for event in events:
            if finish_of(event):
                yield "[DONE]"
            if event != "[DONE]":
                yield event

    return Hooks(events=events)


@broken("text-after-finish", "Text comes after finish_reason", *_STREAMS)
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        async for event in events:
            yield event
            if finish_of(event):
                assert isinstance(event, dict)
                yield with_text(with_finish(event, None), " And more.")

    return Hooks(events=events)


@broken("early-finish", "finish_reason comes three events before the last text", *_STREAMS)
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        held: list[dict[str, Any]] = []
        async for event in events:
            if not isinstance(event, dict) or not _choice(event):
                yield event
                continue
            held.append(event)
            if reason := finish_of(event):
                yield with_finish(held.pop(0), reason)
                for late in held:
                    yield with_finish(late, None)
            elif len(held) > 3:
                yield held.pop(0)

    return Hooks(events=events)


@broken("no-finish-streamed", "Streams never say why they ended", *_STREAMS)
def _() -> Hooks:
    return Hooks(
        events=each_event(lambda _, event: with_finish(event, None) if _choice(event) else event)
    )


@broken("ends-early", "A stream ends in the middle, as if it were whole", *_STREAMS)
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        async for place, event in numbered(events):
            if place == 4:
                return
            yield event

    return Hooks(events=events)


@broken("done-early", "A stream ends in the middle, with [DONE]", *_STREAMS)
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        async for place, event in numbered(events):
            if place == 4:
                yield "[DONE]"
                return
            yield event

    return Hooks(events=events)


@broken("half-json-event", "The JSON of one event breaks off", *_STREAMS)
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        async for place, event in numbered(events):
            yield _dumps(event)[:-9] if place == 3 else event

    return Hooks(events=events)


@broken("error-event", "A stream breaks off with an error in an event", *_STREAMS)
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        async for place, event in numbered(events):
            if place == 3:
                yield _DEAD.value
                yield "[DONE]"
                return
            yield event

    return Hooks(events=events)


def _from_middle(after: Callable[[], Awaitable[Any]]) -> Any:
    async def events(_: Ask, events: Events) -> Events:
        async for place, event in numbered(events):
            if place == 3:
                await after()
            yield event

    return events


@broken(
    "hang-in-stream", "A stream stands still in its middle for ever", *_STREAMS, check_timeout_s=2.0
)
def _() -> Hooks:
    return Hooks(events=_from_middle(_never))


@broken("cut-stream", "The connection breaks off in the middle of a stream", *_STREAMS)
def _() -> Hooks:
    async def cut() -> None:
        raise CutError

    return Hooks(events=_from_middle(cut))


@broken("stream-as-json", "A stream calls itself application/json", *_STREAMS)
def _() -> Hooks:
    def head(ask: Ask, headers: Headers) -> Headers:
        return (
            _with_header(headers, b"content-type", b"application/json") if ask.streams else headers
        )

    return Hooks(head=head)


def _with_header(headers: Headers, name: bytes, value: bytes) -> Headers:
    return (*(h for h in headers if h[0].lower() != name), (name, value))


# Broken: counts.


def _counting(change: Callable[[dict[str, int]], dict[str, int] | None]) -> Any:
    def counted(_: Ask, value: dict[str, Any]) -> dict[str, Any]:
        return {**value, "usage": change(value["usage"])} if value.get("usage") else value

    return counted


def _more_tokens(usage: dict[str, int]) -> dict[str, int]:
    return {
        **usage,
        "completion_tokens": usage["completion_tokens"] + 3,
        "total_tokens": usage["total_tokens"] + 3,
    }


@broken("miscounted", "Three tokens more than were written are counted", "usage")
def _() -> Hooks:
    return both(_counting(_more_tokens))


@broken("miscounted-streamed", "Streams count three tokens more than whole answers", "usage")
def _() -> Hooks:
    return Hooks(events=each_event(_counting(_more_tokens)))


@broken("wrong-total", "The counts do not add up", "usage")
def _() -> Hooks:
    return both(_counting(lambda usage: {**usage, "total_tokens": usage["total_tokens"] + 1}))


@broken("no-usage", "No tokens are counted", "usage")
def _() -> Hooks:
    return both(_counting(lambda _: None))


@broken("no-usage-streamed", "Streams count no tokens, though asked to", "usage")
def _() -> Hooks:
    def unasked(ask: Ask) -> Ask | Reply:
        return ask.asking(stream_options=None) if ask.streams else ask

    return for_generations(unasked)


@broken("always-seven", "Every prompt is said to have seven tokens", "usage")
def _() -> Hooks:
    return both(
        _counting(
            lambda usage: {
                **usage,
                "prompt_tokens": 7,
                "total_tokens": 7 + usage["completion_tokens"],
            }
        )
    )


@broken("zero-counts", "All counts are 0", "usage")
def _() -> Hooks:
    return both(_counting(lambda usage: dict.fromkeys(usage, 0)))


# Broken: where an answer ends.


def _limited(ask: Ask, change: Callable[[int], int]) -> Ask:
    limits = {
        name: change(ask.body[name])
        for name in ("max_tokens", "max_completion_tokens")
        if isinstance(ask.body.get(name), int) and ask.body[name] > 0
    }
    return ask.asking(**limits) if limits else ask


@broken("limit-ignored", "Completions go on past max_tokens", "max-tokens")
def _() -> Hooks:
    return for_generations(
        lambda ask: _limited(ask, lambda n: n + 32) if ask.path == COMPLETIONS else ask
    )


@broken("limit-ignored-chat", "Chats go on past max_tokens", "chat-limits")
def _() -> Hooks:
    return for_generations(lambda ask: _limited(ask, lambda n: n + 32) if ask.path == CHAT else ask)


@broken("limit-ignored-streamed", "Streams go on past max_tokens", "max-tokens")
def _() -> Hooks:
    return for_generations(lambda ask: _limited(ask, lambda n: n + 32) if ask.streams else ask)


@broken(
    "one-token-more", "Answers have one token more than max_tokens", "max-tokens", "chat-limits"
)
def _() -> Hooks:
    return for_generations(lambda ask: _limited(ask, lambda n: n + 1))


@broken("one-token-less", "Answers end one token before max_tokens", "max-tokens", "chat-limits")
def _() -> Hooks:
    return for_generations(lambda ask: _limited(ask, lambda n: max(1, n - 1)))


def _finishing(change: Callable[[str], str | None]) -> Hooks:
    def finished(_: Ask, value: dict[str, Any]) -> dict[str, Any]:
        reason = finish_of(value)
        return with_finish(value, change(reason)) if reason else value

    return both(finished)


@broken(
    "always-stop",
    "finish_reason is stop, also where max_tokens was met",
    "max-tokens",
    "chat-limits",
)
def _() -> Hooks:
    return _finishing(lambda _: "stop")


@broken("always-length", "finish_reason is length, also where the answer was over", "max-tokens")
def _() -> Hooks:
    return _finishing(lambda _: "length")


@broken("no-finish", "Whole answers do not say why they ended", "completion", "chat")
def _() -> Hooks:
    return Hooks(reply=each_whole(lambda _, value: with_finish(value, None)))


@broken("unknown-finish", "finish_reason is a word that no client knows", "completion", "chat")
def _() -> Hooks:
    return _finishing(lambda _: "eos_token")


@broken("stop-ignored", "Stop sequences are ignored", "stop-sequence", "chat-limits")
def _() -> Hooks:
    return for_generations(lambda ask: ask.asking(stop=None) if "stop" in ask.body else ask)


@broken("stop-ignored-streamed", "Streams ignore stop sequences", "stop-sequence")
def _() -> Hooks:
    return for_generations(
        lambda ask: ask.asking(stop=None) if ask.streams and "stop" in ask.body else ask
    )


@broken("stop-echoed", "The stop sequence stands in the answer", "stop-sequence", "chat-limits")
def _() -> Hooks:
    return for_generations(
        lambda ask: ask.asking(include_stop_str_in_output=True) if "stop" in ask.body else ask
    )


@broken("stop-as-length", "An answer that a stop sequence ended says length", "stop-sequence")
def _() -> Hooks:
    def finished(ask: Ask, value: dict[str, Any]) -> dict[str, Any]:
        stopped = ask.body.get("stop") and finish_of(value) == "stop"
        return with_finish(value, "length") if stopped else value

    return both(finished)


# Broken: what the model says.


@broken("answers-vary", "The same question gets another answer each time", "greedy")
def _() -> Hooks:
    words = itertools.count()

    async def events(_: Ask, events: Events) -> Events:
        async for event in events:
            yield _said(event) if isinstance(event, dict) and finish_of(event) else event

    def _said(value: dict[str, Any]) -> dict[str, Any]:
        return with_text(value, f"{text_of(value)} {next(words)}")

    return Hooks(reply=each_whole(lambda _, value: _said(value)), events=events)


@broken("sampled", "Temperature 0 is overruled, and the likeliest token disturbed", "greedy")
def _() -> Hooks:
    def warm(ask: Ask) -> Ask | Reply:
        if not ask.body:
            return ask
        bias = {str(random.randrange(300, 700)): 60 for _ in range(8)}
        return ask.asking(temperature=2.0, logit_bias=bias)

    return for_generations(warm)


@broken("other-prefix", "Every answer begins with words that are not the model's", "known-answers")
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        async for place, event in numbered(events):
            first = place == 0 and isinstance(event, dict)
            yield with_text(event, " Sure!" + text_of(event)) if first else event

    return Hooks(
        reply=each_whole(lambda _, value: with_text(value, " Sure!" + text_of(value))),
        events=events,
    )


@broken("wrong-facts", "The capital of France is given as Berlin", "known-answers")
def _() -> Hooks:
    return both_texts(lambda text: text.replace("Paris", "Berlin"))


@broken("empty", "Every answer is empty", "language")
def _() -> Hooks:
    return both_texts(lambda _: "")


@broken("blank", "Every answer is spaces", "language")
def _() -> Hooks:
    return both_texts(lambda text: " " * len(text))


@broken("pad", "Every answer is <pad>, as from weights in the wrong type", "language")
def _() -> Hooks:
    return both_texts(lambda text: "<pad>" * max(1, len(text) // 4))


@broken("leaked-token", "A special token stands at the end of every answer", "language")
def _() -> Hooks:
    def leaked(_: Ask, value: dict[str, Any]) -> dict[str, Any]:
        return with_text(value, text_of(value) + "<end_of_turn>") if finish_of(value) else value

    return both(leaked)


@broken("looped", "Every answer is one word over and over", "language")
def _() -> Hooks:
    return both_texts(lambda text: " the" * max(1, len(text) // 2))


@broken("looped-phrase", "Every answer is one phrase over and over", "language")
def _() -> Hooks:
    return both_texts(lambda text: " of the sea and" * max(1, len(text) // 2))


# Broken: characters.


def _mangled(change: Callable[[str], str]) -> Hooks:
    return both_texts(lambda text: "".join(c if c.isascii() else change(c) for c in text))


@broken("mojibake", "UTF-8 is read as Latin-1 and written again", "utf-8")
def _() -> Hooks:
    return _mangled(lambda char: char.encode().decode("latin-1"))


@broken("not-utf-8", "Answers are sent as Latin-1", "utf-8")
def _() -> Hooks:
    def latin(content: bytes) -> bytes:
        return content.decode().encode("latin-1", "replace")

    async def wire(_: Ask, chunks: Chunks) -> Chunks:
        async for chunk in chunks:
            yield latin(chunk)

    def reply(ask: Ask, reply: Reply) -> Reply:
        return replace(reply, content=latin(reply.content)) if ask.generates else reply

    # Through `events`, so that a chunk holds whole characters.
    return Hooks(reply=reply, events=each_event(lambda _, event: event), wire=wire)


@broken("cut-characters", "Characters cut between events become U+FFFD", "utf-8")
def _() -> Hooks:
    def torn(_: Ask, event: dict[str, Any]) -> dict[str, Any]:
        text = "".join(c if c.isascii() else "\ufffd" * len(c.encode()) for c in text_of(event))
        return with_text(event, text) if text else event

    return Hooks(events=each_event(torn))


@broken("ascii-only", "Characters beyond ASCII become question marks", "utf-8")
def _() -> Hooks:
    return _mangled(lambda _: "?")


@broken("characters-dropped", "Characters of four bytes are dropped", "utf-8")
def _() -> Hooks:
    return _mangled(lambda char: "" if len(char.encode()) == 4 else char)


@broken("escaped-twice", "Characters beyond ASCII arrive as their JSON escapes", "utf-8")
def _() -> Hooks:
    return _mangled(lambda char: json.dumps(char)[1:-1])


@broken("invalid-bytes", "An event holds a byte that is no UTF-8", *_STREAMS)
def _() -> Hooks:
    async def wire(_: Ask, chunks: Chunks) -> Chunks:
        async for place, chunk in _enumerated(chunks):
            yield chunk.replace(b'"index"', b'"ind\xffex"') if place == 3 else chunk

    return Hooks(events=each_event(lambda _, event: event), wire=wire)


async def _enumerated(chunks: Chunks) -> AsyncIterator[tuple[int, bytes]]:
    place = itertools.count()
    async for chunk in chunks:
        yield next(place), chunk


# Broken: chats.


@broken("no-history", "Only the last message reaches the model", "chat-multi-turn")
def _() -> Hooks:
    def last(ask: Ask) -> Ask | Reply:
        return ask.asking(messages=ask.messages[-1:]) if len(ask.messages) > 1 else ask

    return for_generations(last)


@broken("first-turn-only", "Only the first turn reaches the model", "chat-multi-turn")
def _() -> Hooks:
    def first(ask: Ask) -> Ask | Reply:
        users = [i for i, m in enumerate(ask.messages) if m.get("role") == "user"]
        return ask.asking(messages=ask.messages[: users[0] + 1]) if len(users) > 1 else ask

    return for_generations(first)


def _has_system(ask: Ask) -> bool:
    return any(message.get("role") == "system" for message in ask.messages)


@broken(
    "system-refused", "The system role is refused, as Gemma 2's own template does", "chat-system"
)
def _() -> Hooks:
    return for_generations(
        lambda ask: error(400, "System role not supported") if _has_system(ask) else ask
    )


@broken("system-dropped", "System messages do not reach the model", "chat-system")
def _() -> Hooks:
    def dropped(ask: Ask) -> Ask | Reply:
        rest = [message for message in ask.messages if message.get("role") != "system"]
        return ask.asking(messages=rest) if _has_system(ask) else ask

    return for_generations(dropped)


def _alternating(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same words in turns that any template takes."""
    merged: list[dict[str, Any]] = []
    for place, message in enumerate(messages):
        role = "user" if message.get("role") == "system" and place else message.get("role")
        if merged and merged[-1]["role"] == role:
            merged[-1]["content"] = f"{merged[-1]['content']}\n{message['content']}"
        elif merged or role != "assistant":
            merged.append({**message, "role": role})
    return merged


@broken("turns-merged", "Turns that do not alternate are merged and answered", "wrong-turns")
def _() -> Hooks:
    def mended(ask: Ask) -> Ask | Reply:
        return ask.asking(messages=_alternating(ask.messages)) if ask.messages else ask

    return for_generations(mended)


def _internal(_: Ask, __: Reply) -> Reply:
    return error(500, "Internal Server Error", "InternalServerError")


@broken("turns-500", "Turns that do not alternate are an internal error", "wrong-turns")
def _() -> Hooks:
    return refusals("wrong-turns", _internal)


def _dies(_: Ask, __: Reply) -> Reply:
    raise DeathError


@broken("turns-kill", "Turns that do not alternate end the server", "wrong-turns")
def _() -> Hooks:
    return refusals("wrong-turns", _dies)


# Broken: what no engine should choke on.


def _kills_engine(what: str) -> Hooks:
    """The refusal is right, and after it every generation fails."""
    dead = False

    def reply(ask: Ask, reply: Reply) -> Reply:
        nonlocal dead
        dead = dead or refused_for(ask, reply) == what
        return reply

    async def ask(ask: Ask) -> Ask | Reply:
        return _DEAD if dead and ask.generates else ask

    return Hooks(ask=ask, reply=reply)


@broken(
    "turns-kill-engine",
    "Turns that do not alternate are refused, and end the engine",
    "wrong-turns",
)
def _() -> Hooks:
    return _kills_engine("wrong-turns")


@broken("truncated", "A prompt beyond the context is cut silently", "prompt-too-long")
def _() -> Hooks:
    def cut(ask: Ask) -> Ask | Reply:
        return ask.asking(truncate_prompt_tokens=512) if len(ask.content) > 1500 else ask

    return for_generations(cut)


@broken("too-long-500", "A prompt beyond the context is an internal error", "prompt-too-long")
def _() -> Hooks:
    return refusals("prompt-too-long", _internal)


@broken("too-long-empty", "A prompt beyond the context gets an empty answer", "prompt-too-long")
def _() -> Hooks:
    return refusals("prompt-too-long", lambda ask, _: _canned(ask, ""))


@broken("too-long-kills", "A prompt beyond the context ends the server", "prompt-too-long")
def _() -> Hooks:
    return refusals("prompt-too-long", _dies)


@broken(
    "too-long-kills-engine",
    "A prompt beyond the context is refused, and ends the engine",
    "prompt-too-long",
)
def _() -> Hooks:
    return _kills_engine("prompt-too-long")


def _canned(ask: Ask, text: str) -> Reply:
    """A whole answer that no model gave."""
    said = (
        {"message": {"role": "assistant", "content": text}} if ask.path == CHAT else {"text": text}
    )
    usage = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    choice = {"index": 0, **said, "finish_reason": "stop"}
    return Reply.of(200, {"id": "x", "model": "demo", "choices": [choice], "usage": usage})


@broken("malformed-500", "A body that is no request is an internal error", "malformed-body")
def _() -> Hooks:
    return refusals("malformed-body", _internal)


@broken("malformed-answered", "A body that is no request is answered", "malformed-body")
def _() -> Hooks:
    return refusals("malformed-body", lambda ask, _: _canned(ask, " Paris."))


@broken("malformed-kills", "A body that is no request ends the server", "malformed-body")
def _() -> Hooks:
    return refusals("malformed-body", _dies)


@broken(
    "malformed-kills-engine",
    "A body that is no request is refused, and ends the engine",
    "malformed-body",
)
def _() -> Hooks:
    return _kills_engine("malformed-body")


# Broken: many at once.

_AT_ONCE = ("staggered", "together")


def _places(count: int, *, streams_only: bool = False) -> Hooks:
    places = asyncio.Semaphore(count)

    def around(ask: Ask) -> AbstractAsyncContextManager[Any]:
        held = ask.streams if streams_only else ask.generates
        return places if held else _at_once(ask)

    return Hooks(around=around)


@broken("serial", "One request is answered at a time", *_AT_ONCE, concurrency=2)
def _() -> Hooks:
    return _places(1)


@broken("serial-streams", "One stream is answered at a time", "staggered")
def _() -> Hooks:
    return _places(1, streams_only=True)


@broken(
    "two-at-a-time",
    "No more than two requests are answered at a time",
    "together",
    concurrency=3,
)
def _() -> Hooks:
    return _places(2)


@broken("waves", "Requests start together, and new ones wait until all of those ended", "staggered")
def _() -> Hooks:
    ended = asyncio.Condition()
    running = waiting = 0

    @asynccontextmanager
    async def around(ask: Ask) -> AsyncIterator[None]:
        nonlocal running, waiting
        if not ask.generates:
            yield
            return
        async with ended:
            await ended.wait_for(lambda: running == 0 or waiting > 0)
            first = waiting == 0
            waiting += 1
        if first:
            try:
                await asyncio.sleep(_TOGETHER_S)
            finally:
                waiting = 0
        running += 1
        try:
            yield
        finally:
            running -= 1
            async with ended:
                ended.notify_all()

    return Hooks(around=around)


@broken(
    "refused-when-busy",
    "Of more than two requests at once, the others get 429",
    "together",
    concurrency=3,
)
def _() -> Hooks:
    running = 0

    @asynccontextmanager
    async def around(_: Ask) -> AsyncIterator[None]:
        nonlocal running
        running += 1
        try:
            yield
        finally:
            running -= 1

    async def ask(ask: Ask) -> Ask | Reply:
        busy = ask.generates and running > 2
        return error(429, "Too many requests", "RateLimitError") if busy else ask

    return Hooks(around=around, ask=ask)


@broken(
    "dies-when-busy",
    "The server ends when three requests are asked at once",
    "together",
    concurrency=3,
)
def _() -> Hooks:
    running = 0

    @asynccontextmanager
    async def around(_: Ask) -> AsyncIterator[None]:
        nonlocal running
        running += 1
        if running > 2:
            raise DeathError
        try:
            yield
        finally:
            running -= 1

    return Hooks(around=around)


@broken("dies-in-time", "The server ends at its twelfth generation", "together", concurrency=4)
def _() -> Hooks:
    asked = itertools.count(1)

    async def ask(ask: Ask) -> Ask | Reply:
        if ask.generates and next(asked) >= 12:
            raise DeathError
        return ask

    return Hooks(ask=ask)


def _question(ask: Ask) -> dict[str, Any]:
    name = "messages" if ask.path == CHAT else "prompt"
    return {name: ask.body.get(name)}


@broken(
    "crossed", "Of two requests at once, each gets the other's answer", "together", concurrency=2
)
def _() -> Hooks:
    waiting: list[tuple[Ask, asyncio.Future[Ask]]] = []

    async def ask(ask: Ask) -> Ask | Reply:
        if not ask.generates or not ask.body:
            return ask
        for place, (other, partner) in enumerate(waiting):
            if other.path == ask.path:
                del waiting[place]
                partner.set_result(ask)
                return ask.asking(**_question(other))
        mine = (ask, asyncio.get_running_loop().create_future())
        waiting.append(mine)
        try:
            async with asyncio.timeout(_TOGETHER_S):
                return ask.asking(**_question(await mine[1]))
        except TimeoutError:
            return ask
        finally:
            if mine in waiting:
                waiting.remove(mine)

    return Hooks(ask=ask)


@broken(
    "events-crossed",
    "Of streams at once, one gets the text of another's events",
    "together",
    concurrency=2,
)
def _() -> Hooks:
    latest: dict[int, str] = {}
    ids = itertools.count()

    async def events(_: Ask, events: Events) -> Events:
        me = next(ids)
        try:
            async for place, event in numbered(events):
                others = [text for stream, text in latest.items() if stream != me]
                if place >= 0:
                    latest[me] = text_of(event)
                crossed = 1 <= place < 6 and others and isinstance(event, dict)
                yield with_text(event, others[-1]) if crossed else event
        finally:
            latest.pop(me, None)

    return Hooks(events=events)


@broken(
    "one-starves",
    "Of requests at once, the third waits until the others ended",
    "together",
    concurrency=3,
)
def _() -> Hooks:
    running: set[int] = set()
    starving: set[int] = set()
    ended = asyncio.Condition()
    ids = itertools.count()

    @asynccontextmanager
    async def around(ask: Ask) -> AsyncIterator[None]:
        if not ask.generates:
            yield
            return
        me = next(ids)
        if len(running) == 2 and not starving:
            starving.add(me)
            async with ended:
                await ended.wait_for(lambda: not running)
        running.add(me)
        try:
            yield
        finally:
            running.discard(me)
            starving.discard(me)
            async with ended:
                ended.notify_all()

    return Hooks(around=around)


@broken(
    "one-stands-still",
    "Of streams at once, the third stops after its first tokens",
    "together",
    concurrency=3,
)
def _() -> Hooks:
    running: set[int] = set()
    ended = asyncio.Condition()
    ids = itertools.count()

    async def events(_: Ask, events: Events) -> Events:
        me = next(ids)
        last = len(running) == 2
        running.add(me)
        try:
            async for place, event in numbered(events):
                if last and place == 2:
                    async with ended:
                        await ended.wait_for(lambda: running == {me})
                yield event
        finally:
            running.discard(me)
            async with ended:
                ended.notify_all()

    return Hooks(events=events)


@broken("keeps-reading", "A stream that its client left is written to its end", "cancelled-stream")
def _() -> Hooks:
    return Hooks(keeps_reading=True)


@broken("no-prefix", "Every prompt is made unique, so that no cache finds it", "prefix-cache")
def _() -> Hooks:
    salts = itertools.count()
    return for_generations(
        lambda ask: (
            ask.asking(cache_salt=f"salt-{next(salts)}-{random.random()}") if ask.body else ask
        )
    )


@broken(
    "slow-first",
    "The first token comes after 0.4 s, where 0.3 are allowed",
    "first-token",
    max_ttft_s=0.3,
)
def _() -> Hooks:
    return Hooks(wire=_delayed(0.4))


@broken(
    "slow-tokens",
    "Tokens come at less than the pace that is wanted",
    "throughput",
    min_tokens_per_second=1000.0,
    concurrency=2,
)
def _() -> Hooks:
    async def wire(_: Ask, chunks: Chunks) -> Chunks:
        async for chunk in chunks:
            await asyncio.sleep(0.015)
            yield chunk

    return Hooks(events=each_event(lambda _, event: event), wire=wire)


def _delayed(seconds: float) -> Any:
    async def wire(_: Ask, chunks: Chunks) -> Chunks:
        async for place, chunk in _enumerated(chunks):
            if place == 0:
                await asyncio.sleep(seconds)
            yield chunk

    return wire


# Harmless.


def _rewritten(change: Callable[[bytes], bytes]) -> Hooks:
    """Each event's bytes, written otherwise."""

    async def wire(_: Ask, chunks: Chunks) -> Chunks:
        async for chunk in chunks:
            yield change(chunk)

    return Hooks(events=each_event(lambda _, event: event), wire=wire)


@harmless("nothing", "Everything passes as it is")
def _() -> Hooks:
    return Hooks()


@harmless("crlf", "Lines of a stream end with CR LF")
def _() -> Hooks:
    return _rewritten(lambda chunk: chunk.replace(b"\n", b"\r\n"))


@harmless("cr", "Lines of a stream end with CR")
def _() -> Hooks:
    return _rewritten(lambda chunk: chunk.replace(b"\n", b"\r"))


@harmless("comments", "Comments and keep-alives stand between the events")
def _() -> Hooks:
    return _rewritten(lambda chunk: b": keep-alive\n\n:\n" + chunk)


@harmless("fields", "Events have the fields `event`, `id` and `retry`")
def _() -> Hooks:
    return _rewritten(lambda chunk: b"event: message\nid: 7\nretry: 1000\n" + chunk)


@harmless("no-space", "No space follows `data:`")
def _() -> Hooks:
    return _rewritten(lambda chunk: chunk.replace(b"data: ", b"data:", 1))


@harmless("data-lines", "An event's JSON stands on several `data` lines")
def _() -> Hooks:
    return _rewritten(lambda chunk: chunk.replace(b',"choices"', b'\ndata: ,"choices"', 1))


@harmless("byte-order-mark", "A stream begins with a byte order mark")
def _() -> Hooks:
    async def wire(_: Ask, chunks: Chunks) -> Chunks:
        async for place, chunk in _enumerated(chunks):
            yield chunk if place else b"\xef\xbb\xbf" + chunk

    return Hooks(wire=wire)


def _cut_every(count: int) -> Hooks:
    async def wire(_: Ask, chunks: Chunks) -> Chunks:
        async for chunk in chunks:
            for start in range(0, len(chunk), count):
                yield chunk[start : start + count]

    return Hooks(wire=wire)


@harmless("cut-1", "A stream comes in pieces of 1 byte")
def _() -> Hooks:
    return _cut_every(1)


@harmless("cut-3", "A stream comes in pieces of 3 bytes")
def _() -> Hooks:
    return _cut_every(3)


@harmless("cut-7", "A stream comes in pieces of 7 bytes")
def _() -> Hooks:
    return _cut_every(7)


@harmless("joined", "Two events come in one write")
def _() -> Hooks:
    async def wire(_: Ask, chunks: Chunks) -> Chunks:
        kept = b""
        async for chunk in chunks:
            if kept:
                yield kept + chunk
            kept = b"" if kept else chunk
        if kept:
            yield kept

    return Hooks(events=each_event(lambda _, event: event), wire=wire)


@harmless("merged", "An event holds the text of two tokens")
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        kept: dict[str, Any] | None = None
        async for event in events:
            if kept is not None and isinstance(event, dict) and _choice(event):
                yield with_text(event, text_of(kept) + text_of(event))
                kept = None
            elif (
                kept is None and isinstance(event, dict) and text_of(event) and not finish_of(event)
            ):
                kept = event
            else:
                if kept is not None:
                    yield kept
                    kept = None
                yield event

    return Hooks(events=events)


@harmless("slow-start", "The first token comes after one second")
def _() -> Hooks:
    return Hooks(wire=_delayed(1.0))


@harmless("jitter", "Whatever passes is late by a random time, 10 ms at most")
def _() -> Hooks:
    chance = random.Random(7)

    async def ask(ask: Ask) -> Ask | Reply:
        await asyncio.sleep(chance.random() * 0.01)
        return ask

    async def wire(_: Ask, chunks: Chunks) -> Chunks:
        async for chunk in chunks:
            await asyncio.sleep(chance.random() * 0.01)
            yield chunk

    return Hooks(ask=ask, wire=wire)


@harmless("extra-fields", "Answers and events have fields that nobody knows")
def _() -> Hooks:
    def more(_: Ask, value: dict[str, Any]) -> dict[str, Any]:
        choices = [{**choice, "x_score": [1.5, None]} for choice in value.get("choices", [])]
        return {"x_gateway": {"region": "eu", "error": None}, **value, "choices": choices}

    return both(more)


@harmless("fewer-fields", "Fields that are null are left out")
def _() -> Hooks:
    return both(lambda _, value: _without_nulls(value))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


@harmless("role-apart", "A chat's role comes in an event of its own, with content null")
def _() -> Hooks:
    def null(_: Ask, event: dict[str, Any]) -> dict[str, Any]:
        delta = _choice(event).get("delta") or {}
        if not delta.get("role"):
            return event
        return {**event, "choices": [{**_choice(event), "delta": {**delta, "content": None}}]}

    return Hooks(events=each_event(null))


@harmless("finish-apart", "finish_reason comes in an event without text")
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        async for event in events:
            reason = finish_of(event)
            if reason and isinstance(event, dict):
                if text_of(event):
                    yield with_finish(event, None)
                yield with_text(with_finish(event, reason), "")
            else:
                yield event

    return Hooks(events=events)


@harmless("usage-in-finish", "The usage of a stream comes with its finish_reason")
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        finish: dict[str, Any] | None = None
        async for event in events:
            if finish_of(event) and isinstance(event, dict):
                finish = event
            elif finish is not None:
                usage = event.get("usage") if isinstance(event, dict) else None
                yield {**finish, "usage": usage} if usage else finish
                finish = None
                if not usage:
                    yield event
            else:
                yield event

    return Hooks(events=events)


@harmless("usage-in-every-event", "Every event holds the usage so far")
def _() -> Hooks:
    def counting(ask: Ask) -> Ask | Reply:
        options = {"include_usage": True, "continuous_usage_stats": True}
        return ask.asking(stream_options=options) if ask.streams else ask

    return for_generations(counting)


@harmless("usage-null", "Events before the last hold a usage that is null")
def _() -> Hooks:
    return Hooks(
        events=each_event(
            lambda _, event: event if event.get("usage") else {**event, "usage": None}
        )
    )


@harmless("priced", "The usage holds a price besides the counts")
def _() -> Hooks:
    def priced(_: Ask, value: dict[str, Any]) -> dict[str, Any]:
        usage = value.get("usage")
        return {**value, "usage": {**usage, "cost": 0.0001}} if usage else value

    return both(priced)


@harmless("escaped", "JSON is written with spaces, and \\uXXXX beyond ASCII")
def _() -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        async for event in events:
            yield json.dumps(event) if isinstance(event, dict) else event

    def reply(_: Ask, reply: Reply) -> Reply:
        spaced = json.dumps(reply.value, indent=2).encode() + b"\n"
        return replace(reply, content=spaced) if reply.value else reply

    return Hooks(reply=reply, events=events)


@harmless("header-case", "The names of headers are in capitals")
def _() -> Hooks:
    return Hooks(head=lambda _, headers: tuple((n.upper(), v) for n, v in headers))


@harmless("bare-content-type", "A stream's content type names no charset, and JSON's does")
def _() -> Hooks:
    def head(ask: Ask, headers: Headers) -> Headers:
        kind = dict(headers).get(b"content-type", b"")
        if kind.startswith(b"text/event-stream"):
            return _with_header(headers, b"content-type", b"text/event-stream")
        if kind == b"application/json":
            return _with_header(headers, b"content-type", b"application/json; charset=utf-8")
        return headers

    return Hooks(head=head)


@harmless("unprocessable", "Malformed bodies are answered 422, as FastAPI does by itself")
def _() -> Hooks:
    detail = [{"loc": ["body"], "msg": "JSON decode error", "type": "json_invalid"}]
    return refusals("malformed-body", lambda *_: Reply.of(422, {"detail": detail}))


@harmless("plain-errors", "Errors are a line of text instead of JSON")
def _() -> Hooks:
    def reply(_: Ask, reply: Reply) -> Reply:
        if reply.status < 400:
            return reply
        said = f"{reply.status}: the request was refused".encode()
        return Reply(reply.status, ((b"content-type", b"text/plain"),), said)

    return Hooks(reply=reply)


def _hidden(*paths: str) -> Hooks:
    async def ask(ask: Ask) -> Ask | Reply:
        return Reply.of(404, {"detail": "Not Found"}) if ask.path in paths else ask

    return Hooks(ask=ask)


@harmless("no-metrics", "There is no /metrics")
def _() -> Hooks:
    return _hidden("/metrics")


@harmless("no-version", "There is no /version and no /tokenize")
def _() -> Hooks:
    return _hidden("/version", "/tokenize")


@harmless("only-v1", "There is nothing but /v1")
def _() -> Hooks:
    async def ask(ask: Ask) -> Ask | Reply:
        return ask if ask.path.startswith("/v1/") else Reply.of(404, {"detail": "Not Found"})

    return Hooks(ask=ask)


@harmless("closes", "Connections close after each answer, whose end tells its length")
def _() -> Hooks:
    return Hooks(closes=True)


@harmless("chunked", "Whole answers come in chunks, without a length")
def _() -> Hooks:
    return Hooks(chunked=True)


@harmless("gzip", "Whole answers are compressed for clients that take it")
def _() -> Hooks:
    def reply(ask: Ask, reply: Reply) -> Reply:
        if b"gzip" not in dict(ask.headers).get(b"accept-encoding", b""):
            return reply
        headers = _with_header(reply.headers, b"content-encoding", b"gzip")
        return replace(reply, headers=headers, content=gzip.compress(reply.content))

    return Hooks(reply=reply)


@harmless("more-models", "Another model is listed after ours")
def _() -> Hooks:
    return _listing(lambda models: [*models, {**models[0], "id": "an-adapter", "root": "x"}])


@harmless("system-in-turn", "A system message is put in front of the first user turn")
def _() -> Hooks:
    def joined(ask: Ask) -> Ask | Reply:
        if len(ask.messages) < 2 or ask.messages[0].get("role") != "system":
            return ask
        system, first, *more = ask.messages
        if first.get("role") != "user":
            return ask
        text = f"{system['content']}\n\n{first['content']}"
        return ask.asking(messages=[{**first, "content": text}, *more])

    return for_generations(joined)


@harmless("guarded", "The key is asked for everything below /v1", api_key=KEY)
def _() -> Hooks:
    async def ask(ask: Ask) -> Ask | Reply:
        return _guarded(ask, lambda key: key == f"Bearer {KEY}", ("/v1/",))

    return Hooks(ask=ask)


@harmless("all-guarded", "The key is asked for every path", api_key=KEY)
def _() -> Hooks:
    async def ask(ask: Ask) -> Ask | Reply:
        return _guarded(ask, lambda key: key == f"Bearer {KEY}", ("/",))

    return Hooks(ask=ask)


# The proxy.


class _Upstream:
    """The server behind, as a client sees it: one connection for each request."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._host, self._port = parts.hostname, parts.port

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
        kept = [header for header in ask.headers if header[0].lower() not in _HOP_BY_HOP]
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

    def __init__(self, upstream: str, hooks: Hooks, listener: socket.socket) -> None:
        self._upstream, self._hooks, self._listener = _Upstream(upstream), hooks, listener
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
        data = event if isinstance(event, str) else _dumps(event)
        yield f"data: {data}\n\n".encode()


@contextmanager
def breaking(upstream: str, way: Way, *, port: int = 0) -> Iterator[str]:
    """The URL of a proxy before `upstream` that breaks things in this way, while it is open."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        stop, loops = asyncio.Event(), []
        ready = threading.Event()

        async def serve() -> None:
            loops.append(asyncio.get_running_loop())
            ready.set()
            await Proxy(upstream, way.make(), listener).serve(stop)

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
        for way in WAYS.values()
        if way.kind == "broken"
    ]
    lines += ["", "| way | what is other than vLLM has it, and right |", "|---|---|"]
    lines += [
        f"| `{way.name}` | {way.sentence} |" for way in WAYS.values() if way.kind == "harmless"
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--upstream", help="the server's URL, such as http://127.0.0.1:8000")
    parser.add_argument("--way", choices=sorted(WAYS), default="nothing", metavar="NAME")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--tables", action="store_true", help="print the documentation's tables")
    options = parser.parse_args()
    if options.tables or not options.upstream:
        print(tables(), end="")
        return
    with breaking(options.upstream, WAYS[options.way], port=options.port) as url:
        print(f"{options.way} at {url}, until Ctrl-C", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
