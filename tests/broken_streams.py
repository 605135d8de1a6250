"""Ways that break what is streamed, and what is asked at once."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any

from breaking_hooks import (
    CHAT,
    DEAD,
    Ask,
    Chunks,
    CutError,
    Event,
    Events,
    Headers,
    Hooks,
    Reply,
    at_once,
    broken,
    choice_of,
    delayed,
    die,
    dumps,
    each_chunk,
    each_event,
    error,
    finish_of,
    for_generations,
    never,
    numbered,
    text_of,
    with_finish,
    with_header,
    with_text,
)

STREAMS = ("completion-stream", "chat-stream")
AT_ONCE = ("together", "staggered")
# How long a request waits for another to change places with, or to start with.
_TOGETHER_S = 0.05


# Each stream by itself.


def _each(change: Callable[[int, Event], Iterable[Event]]) -> Hooks:
    """Send what `change` makes of each event, whose place it gets as `numbered` counts it."""

    async def events(_: Ask, events: Events) -> Events:
        async for place, event in numbered(events):
            for other in change(place, event):
                yield other

    return Hooks(events=events)


def _fourth(change: Callable[[dict[str, Any]], Iterable[Event]]) -> Hooks:
    """Send what `change` makes of the fourth event that holds text."""
    return _each(
        lambda place, event: change(event) if place == 3 and isinstance(event, dict) else (event,)
    )


def _until(place: int, *last: Event) -> Hooks:
    """Send `last` in the stead of the text event at `place` and of all that follow."""

    async def events(_: Ask, events: Events) -> Events:
        async for here, event in numbered(events):
            if here == place:
                break
            yield event
        for event in last:
            yield event

    return Hooks(events=events)


def _from_middle(wait: Callable[[], Awaitable[Any]]) -> Hooks:
    async def events(_: Ask, events: Events) -> Events:
        async for place, event in numbered(events):
            if place == 3:
                await wait()
            yield event

    return Hooks(events=events)


@broken(*STREAMS)
def one_chunk() -> Hooks:
    """The whole stream comes in one piece, at its end."""

    async def wire(_: Ask, chunks: Chunks) -> Chunks:
        yield b"".join([chunk async for chunk in chunks])

    return Hooks(wire=wire)


@broken(*STREAMS)
def kept_back() -> Hooks:
    """The stream is kept back to its end, then sent event by event."""

    async def events(_: Ask, events: Events) -> Events:
        for event in [event async for event in events]:
            await asyncio.sleep(0)
            yield event

    return Hooks(events=events)


@broken(*STREAMS)
def one_event() -> Hooks:
    """The whole text comes in one event of a right stream."""

    async def events(_: Ask, events: Events) -> Events:
        text = ""
        async for event in events:
            text += text_of(event)
            if isinstance(event, dict) and finish_of(event):
                yield with_text(event, text)
            elif not text_of(event):
                yield event

    return Hooks(events=events)


@broken(*STREAMS)
def not_streamed() -> Hooks:
    """A stream is asked for, and a whole answer comes."""
    return for_generations(
        lambda ask: ask.asking(stream=None, stream_options=None) if ask.streams else ask
    )


@broken(*STREAMS)
def wrong_model_streamed() -> Hooks:
    """Only streamed answers name another model."""
    return Hooks(events=each_event(lambda _, event: {**event, "model": "gemma-from-elsewhere"}))


@broken(*STREAMS)
def lost_first() -> Hooks:
    """The first text of a stream is lost."""
    return _each(lambda place, event: () if place == 0 else (event,))


@broken(*STREAMS)
def lost_event() -> Hooks:
    """An event from the middle of a stream is lost."""
    return _fourth(lambda _: ())


@broken(*STREAMS)
def lost_last() -> Hooks:
    """The last text of a stream is lost."""

    async def events(_: Ask, events: Events) -> Events:
        held: list[Event] = []
        async for event in events:
            if text_of(event):
                for kept in held:
                    yield kept
                held = []
            held.append(event)
        for kept in held:
            yield with_text(kept, "") if isinstance(kept, dict) and text_of(kept) else kept

    return Hooks(events=events)


@broken(*STREAMS)
def doubled_event() -> Hooks:
    """An event comes twice."""
    return _fourth(lambda event: (event, event))


@broken(*STREAMS)
def swapped_events() -> Hooks:
    """Two events come in the wrong order."""

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


@broken(*STREAMS)
def foreign_events() -> Hooks:
    """Events of another stream are mixed in."""
    foreign = {"id": "cmpl-of-another"}
    return _fourth(
        lambda event: ({**with_text(with_finish(event, None), " Rome"), **foreign}, event)
    )


@broken(*STREAMS)
def whole_so_far() -> Hooks:
    """Each event repeats the whole text so far."""

    async def events(_: Ask, events: Events) -> Events:
        text = ""
        async for event in events:
            text += text_of(event)
            yield with_text(event, text) if isinstance(event, dict) and text_of(event) else event

    return Hooks(events=events)


@broken(*STREAMS)
def trimmed() -> Hooks:
    """The text of each event is stripped of its spaces."""
    return Hooks(
        events=each_event(
            lambda _, event: with_text(event, text_of(event).strip()) if text_of(event) else event
        )
    )


@broken(*STREAMS)
def no_done() -> Hooks:
    """A stream ends without [DONE]."""
    return _each(lambda _, event: () if event == "[DONE]" else (event,))


@broken(*STREAMS)
def early_done() -> Hooks:
    """[DONE] comes before the last events."""

    def early(_: int, event: Event) -> Iterable[Event]:
        if finish_of(event):
            return "[DONE]", event
        return () if event == "[DONE]" else (event,)

    return _each(early)


@broken(*STREAMS)
def text_after_finish() -> Hooks:
    """Text comes after finish_reason."""

    def more(_: int, event: Event) -> Iterable[Event]:
        if isinstance(event, dict) and finish_of(event):
            return event, with_text(with_finish(event, None), " And more.")
        return (event,)

    return _each(more)


@broken(*STREAMS)
def early_finish() -> Hooks:
    """finish_reason comes three events before the last text."""

    async def events(_: Ask, events: Events) -> Events:
        held: list[dict[str, Any]] = []
        async for event in events:
            if not isinstance(event, dict) or not choice_of(event):
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


@broken(*STREAMS)
def no_finish_streamed() -> Hooks:
    """Streams never say why they ended."""
    return Hooks(
        events=each_event(lambda _, event: with_finish(event, None) if choice_of(event) else event)
    )


@broken(*STREAMS)
def ends_early() -> Hooks:
    """A stream ends in the middle, as if it were whole."""
    return _until(4)


@broken(*STREAMS)
def done_early() -> Hooks:
    """A stream ends in the middle, with [DONE]."""
    return _until(4, "[DONE]")


@broken(*STREAMS)
def half_json_event() -> Hooks:
    """The JSON of one event breaks off."""
    return _fourth(lambda event: (dumps(event)[:-9],))


@broken(*STREAMS)
def invalid_bytes() -> Hooks:
    """An event holds a byte that is no UTF-8."""
    return each_chunk(
        lambda place, chunk: chunk.replace(b'"index"', b'"ind\xffex"') if place == 3 else chunk
    )


@broken(*STREAMS)
def error_event() -> Hooks:
    """A stream breaks off with an error in an event."""
    return _until(3, DEAD.value, "[DONE]")


@broken(*STREAMS, check_timeout_s=2.0)
def hang_in_stream() -> Hooks:
    """A stream stands still in its middle for ever."""
    return _from_middle(never)


@broken(*STREAMS)
def cut_stream() -> Hooks:
    """The connection breaks off in the middle of a stream."""

    async def cut() -> None:
        raise CutError

    return _from_middle(cut)


@broken(*STREAMS)
def stream_as_json() -> Hooks:
    """A stream calls itself application/json."""

    def head(ask: Ask, headers: Headers) -> Headers:
        json = with_header(headers, b"content-type", b"application/json")
        return json if ask.streams else headers

    return Hooks(head=head)


@broken("first-token", max_ttft_s=0.3)
def slow_first() -> Hooks:
    """The first token comes after 0.4 s, where 0.3 are allowed."""
    return delayed(lambda place: 0.0 if place else 0.4)


@broken("throughput", min_tokens_per_second=1000.0, concurrency=2)
def slow_tokens() -> Hooks:
    """Tokens come at less than the pace that is wanted."""
    return delayed(lambda _: 0.015)


# Many at once.


class _Running:
    """The generations that run, and a wait for what becomes true when one of them ends."""

    def __init__(self) -> None:
        self.ids: set[int] = set()
        self._next, self._ended = itertools.count(), asyncio.Condition()

    @asynccontextmanager
    async def one(self) -> AsyncIterator[int]:
        """Count one more; gives its id."""
        me = next(self._next)
        self.ids.add(me)
        try:
            yield me
        finally:
            self.ids.discard(me)
            async with self._ended:
                self._ended.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with self._ended:
            await self._ended.wait_for(condition)


def _generations(hold: Callable[[], AbstractAsyncContextManager[Any]]) -> Hooks:
    """Hold something during each exchange with the model."""
    return Hooks(around=lambda ask: hold() if ask.generates else at_once(ask))


def _places(count: int) -> Hooks:
    places = asyncio.Semaphore(count)
    return _generations(lambda: places)


@broken(*AT_ONCE, concurrency=2)
def serial() -> Hooks:
    """One request is answered at a time."""
    return _places(1)


@broken("staggered")
def serial_streams() -> Hooks:
    """One stream is answered at a time."""
    place = asyncio.Semaphore(1)
    return Hooks(around=lambda ask: place if ask.streams else at_once(ask))


@broken("together", concurrency=3)
def two_at_a_time() -> Hooks:
    """No more than two requests are answered at a time."""
    return _places(2)


@broken("staggered")
def waves() -> Hooks:
    """Requests start together, and new ones wait until all of those ended."""
    running, waiting = _Running(), set[object]()

    @asynccontextmanager
    async def around() -> AsyncIterator[None]:
        await running.until(lambda: not running.ids or bool(waiting))
        first, me = not waiting, object()
        waiting.add(me)
        if first:
            try:
                await asyncio.sleep(_TOGETHER_S)
            finally:
                waiting.clear()
        async with running.one():
            yield

    return _generations(around)


def _beside_two(answer: Callable[[], Reply]) -> Hooks:
    """Answer by itself what is asked while two generations run."""
    running = _Running()

    async def ask(ask: Ask) -> Ask | Reply:
        return answer() if ask.generates and len(running.ids) > 2 else ask

    return replace(_generations(running.one), ask=ask)


@broken("together", concurrency=3)
def refused_when_busy() -> Hooks:
    """Of more than two requests at once, the others get 429."""
    return _beside_two(lambda: error(429, "Too many requests", "RateLimitError"))


@broken("together", concurrency=3)
def dies_when_busy() -> Hooks:
    """The server ends when three requests are asked at once."""
    return _beside_two(die)


@broken("together", concurrency=4)
def dies_in_time() -> Hooks:
    """The server ends at its twelfth generation."""
    count = itertools.count(1)
    return for_generations(lambda ask: die() if next(count) >= 12 else ask)


def _question(ask: Ask) -> dict[str, Any]:
    name = "messages" if ask.path == CHAT else "prompt"
    return {name: ask.body.get(name)}


@broken("together", concurrency=2)
def crossed() -> Hooks:
    """Of two requests at once, each gets the other's answer."""
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


@broken("together", concurrency=2)
def events_crossed() -> Hooks:
    """Of streams at once, one gets the text of another's events."""
    latest: dict[object, str] = {}

    async def events(_: Ask, events: Events) -> Events:
        me = object()
        try:
            async for place, event in numbered(events):
                others = [text for stream, text in latest.items() if stream is not me]
                if place >= 0:
                    latest[me] = text_of(event)
                crossed = 1 <= place < 6 and others and isinstance(event, dict)
                yield with_text(event, others[-1]) if crossed else event
        finally:
            latest.pop(me, None)

    return Hooks(events=events)


@broken("together", concurrency=3)
def one_starves() -> Hooks:
    """Of requests at once, the third waits until the others ended."""
    running, starving = _Running(), set[object]()

    @asynccontextmanager
    async def around() -> AsyncIterator[None]:
        me = object()
        try:
            if len(running.ids) == 2 and not starving:
                starving.add(me)
                await running.until(lambda: not running.ids)
            async with running.one():
                yield
        finally:
            starving.discard(me)

    return _generations(around)


@broken("together", concurrency=3)
def one_stands_still() -> Hooks:
    """Of streams at once, the third stops after its first tokens."""
    running = _Running()

    async def events(_: Ask, events: Events) -> Events:
        async with running.one() as me:
            last = len(running.ids) == 3
            async for place, event in numbered(events):
                if last and place == 2:
                    await running.until(lambda: running.ids == {me})
                yield event

    return Hooks(events=events)


@broken("cancelled-stream")
def keeps_reading() -> Hooks:
    """A stream that its client left is written to its end."""
    return Hooks(keeps_reading=True)


@broken("prefix-cache")
def no_prefix() -> Hooks:
    """Every prompt is made unique, so that no cache finds it."""
    salts = itertools.count()

    def salted(ask: Ask) -> Ask:
        salt = f"salt-{next(salts)}-{random.random()}"
        return ask.asking(cache_salt=salt) if ask.body else ask

    return for_generations(salted)
