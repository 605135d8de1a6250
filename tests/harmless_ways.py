"""Ways that are other than vLLM's own, and right: the smoke test must let them pass."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from gzip import compress
from typing import Any

from breaking_hooks import (
    KEY,
    NOT_FOUND,
    Ask,
    Chunks,
    Events,
    Headers,
    Hooks,
    Reply,
    asked,
    both,
    by_events,
    choice_of,
    delayed,
    each_chunk,
    each_event,
    finish_of,
    for_generations,
    harmless,
    listing,
    refusals,
    text_of,
    wanting_key,
    with_finish,
    with_header,
    with_text,
)


@harmless()
def nothing() -> Hooks:
    """Everything passes as it is."""
    return Hooks()


@harmless()
def crlf() -> Hooks:
    """Lines of a stream end with CR LF."""
    return each_chunk(lambda _, chunk: chunk.replace(b"\n", b"\r\n"))


@harmless()
def cr() -> Hooks:
    """Lines of a stream end with CR."""
    return each_chunk(lambda _, chunk: chunk.replace(b"\n", b"\r"))


@harmless()
def comments() -> Hooks:
    """Comments and keep-alives stand between the events."""
    return each_chunk(lambda _, chunk: b": keep-alive\n\n:\n" + chunk)


@harmless()
def fields() -> Hooks:
    """Events have the fields `event`, `id` and `retry`."""
    return each_chunk(lambda _, chunk: b"event: message\nid: 7\nretry: 1000\n" + chunk)


@harmless()
def no_space() -> Hooks:
    """No space follows `data:`."""
    return each_chunk(lambda _, chunk: chunk.replace(b"data: ", b"data:", 1))


@harmless()
def data_lines() -> Hooks:
    """An event's JSON stands on several `data` lines."""
    return each_chunk(lambda _, chunk: chunk.replace(b',"choices"', b'\ndata: ,"choices"', 1))


@harmless()
def byte_order_mark() -> Hooks:
    """A stream begins with a byte order mark."""
    return each_chunk(lambda place, chunk: chunk if place else b"\xef\xbb\xbf" + chunk)


def _cut_every(count: int) -> Hooks:
    async def wire(_: Ask, chunks: Chunks) -> Chunks:
        async for chunk in chunks:
            for start in range(0, len(chunk), count):
                yield chunk[start : start + count]

    return Hooks(wire=wire)


@harmless()
def cut_1() -> Hooks:
    """A stream comes in pieces of 1 byte."""
    return _cut_every(1)


@harmless()
def cut_3() -> Hooks:
    """A stream comes in pieces of 3 bytes."""
    return _cut_every(3)


@harmless()
def cut_7() -> Hooks:
    """A stream comes in pieces of 7 bytes."""
    return _cut_every(7)


@harmless()
def joined() -> Hooks:
    """Two events come in one write."""

    async def wire(_: Ask, chunks: Chunks) -> Chunks:
        kept = b""
        async for chunk in chunks:
            if kept:
                yield kept + chunk
            kept = b"" if kept else chunk
        if kept:
            yield kept

    return Hooks(events=by_events, wire=wire)


@harmless()
def merged() -> Hooks:
    """An event holds the text of two tokens."""

    async def events(_: Ask, events: Events) -> Events:
        kept: list[dict[str, Any]] = []
        async for event in events:
            if kept and isinstance(event, dict) and choice_of(event):
                yield with_text(event, text_of(kept.pop()) + text_of(event))
            elif not kept and isinstance(event, dict) and text_of(event) and not finish_of(event):
                kept.append(event)
            else:
                while kept:
                    yield kept.pop()
                yield event

    return Hooks(events=events)


@harmless()
def slow_start() -> Hooks:
    """The first token comes after one second."""
    return delayed(lambda place: 0.0 if place else 1.0)


@harmless()
def jitter() -> Hooks:
    """Whatever passes is late by a random time, 10 ms at most."""
    chance = random.Random(7)

    async def ask(ask: Ask) -> Ask | Reply:
        await asyncio.sleep(chance.random() * 0.01)
        return ask

    return replace(delayed(lambda _: chance.random() * 0.01), ask=ask)


@harmless()
def extra_fields() -> Hooks:
    """Answers and events have fields that nobody knows."""

    def more(_: Ask, value: dict[str, Any]) -> dict[str, Any]:
        choices = [{**choice, "x_score": [1.5, None]} for choice in value.get("choices", [])]
        return {"x_gateway": {"region": "eu", "error": None}, **value, "choices": choices}

    return both(more)


@harmless()
def fewer_fields() -> Hooks:
    """Fields that are null are left out."""
    return both(lambda _, value: _without_nulls(value))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


@harmless()
def role_apart() -> Hooks:
    """A chat's role comes in an event of its own, with content null."""

    def null(_: Ask, event: dict[str, Any]) -> dict[str, Any]:
        delta = choice_of(event).get("delta") or {}
        if not delta.get("role"):
            return event
        return {**event, "choices": [{**choice_of(event), "delta": {**delta, "content": None}}]}

    return Hooks(events=each_event(null))


@harmless()
def finish_apart() -> Hooks:
    """finish_reason comes in an event without text."""

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


@harmless()
def usage_in_finish() -> Hooks:
    """The usage of a stream comes with its finish_reason."""

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


@harmless()
def usage_in_every_event() -> Hooks:
    """Every event holds the usage so far."""

    def counting(ask: Ask) -> Ask | Reply:
        options = {"include_usage": True, "continuous_usage_stats": True}
        return ask.asking(stream_options=options) if ask.streams else ask

    return for_generations(counting)


@harmless()
def usage_null() -> Hooks:
    """Events before the last hold a usage that is null."""
    return Hooks(
        events=each_event(
            lambda _, event: event if event.get("usage") else {**event, "usage": None}
        )
    )


@harmless()
def priced() -> Hooks:
    """The usage holds a price besides the counts."""

    def priced(_: Ask, value: dict[str, Any]) -> dict[str, Any]:
        usage = value.get("usage")
        return {**value, "usage": {**usage, "cost": 0.0001}} if usage else value

    return both(priced)


@harmless()
def escaped() -> Hooks:
    """JSON is written with spaces, and \\uXXXX beyond ASCII."""

    async def events(_: Ask, events: Events) -> Events:
        async for event in events:
            yield json.dumps(event) if isinstance(event, dict) else event

    def reply(_: Ask, reply: Reply) -> Reply:
        spaced = json.dumps(reply.value, indent=2).encode() + b"\n"
        return replace(reply, content=spaced) if reply.value else reply

    return Hooks(reply=reply, events=events)


@harmless()
def header_case() -> Hooks:
    """The names of headers are in capitals."""
    return Hooks(head=lambda _, headers: tuple((n.upper(), v) for n, v in headers))


@harmless()
def bare_content_type() -> Hooks:
    """A stream's content type names no charset, and JSON's does."""

    def head(ask: Ask, headers: Headers) -> Headers:
        kind = dict(headers).get(b"content-type", b"")
        if kind.startswith(b"text/event-stream"):
            return with_header(headers, b"content-type", b"text/event-stream")
        if kind == b"application/json":
            return with_header(headers, b"content-type", b"application/json; charset=utf-8")
        return headers

    return Hooks(head=head)


@harmless()
def unprocessable() -> Hooks:
    """Malformed bodies are answered 422, as FastAPI does by itself."""
    detail = [{"loc": ["body"], "msg": "JSON decode error", "type": "json_invalid"}]
    return refusals("malformed-body", lambda *_: Reply.of(422, {"detail": detail}))


@harmless()
def plain_errors() -> Hooks:
    """Errors are a line of text instead of JSON."""

    def reply(_: Ask, reply: Reply) -> Reply:
        if reply.status < 400:
            return reply
        said = f"{reply.status}: the request was refused".encode()
        return Reply(reply.status, ((b"content-type", b"text/plain"),), said)

    return Hooks(reply=reply)


@harmless()
def no_metrics() -> Hooks:
    """There is no /metrics."""
    return asked(lambda ask: NOT_FOUND if ask.path == "/metrics" else ask)


@harmless()
def no_version() -> Hooks:
    """There is no /version and no /tokenize."""
    return asked(lambda ask: NOT_FOUND if ask.path in ("/version", "/tokenize") else ask)


@harmless()
def only_v1() -> Hooks:
    """There is nothing but /v1."""
    return asked(lambda ask: ask if ask.path.startswith("/v1/") else NOT_FOUND)


@harmless()
def closes() -> Hooks:
    """Connections close after each answer, whose end tells its length."""
    return Hooks(closes=True)


@harmless()
def chunked() -> Hooks:
    """Whole answers come in chunks, without a length."""
    return Hooks(chunked=True)


@harmless()
def gzip() -> Hooks:
    """Whole answers are compressed for clients that take it."""

    def reply(ask: Ask, reply: Reply) -> Reply:
        if b"gzip" not in dict(ask.headers).get(b"accept-encoding", b""):
            return reply
        headers = with_header(reply.headers, b"content-encoding", b"gzip")
        return replace(reply, headers=headers, content=compress(reply.content))

    return Hooks(reply=reply)


@harmless()
def more_models() -> Hooks:
    """Another model is listed after ours."""
    return listing(lambda models: [*models, {**models[0], "id": "an-adapter", "root": "x"}])


@harmless()
def system_in_turn() -> Hooks:
    """A system message is put in front of the first user turn."""

    def joined(ask: Ask) -> Ask | Reply:
        if len(ask.messages) < 2 or ask.messages[0].get("role") != "system":
            return ask
        system, first, *more = ask.messages
        if first.get("role") != "user":
            return ask
        text = f"{system['content']}\n\n{first['content']}"
        return ask.asking(messages=[{**first, "content": text}, *more])

    return for_generations(joined)


@harmless(api_key=KEY)
def guarded() -> Hooks:
    """The key is asked for everything below /v1."""
    return wanting_key("/v1/")


@harmless(api_key=KEY)
def all_guarded() -> Hooks:
    """The key is asked for every path."""
    return wanting_key("/")
