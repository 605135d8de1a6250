"""Ways that break who answers, and what an answer says, counts and refuses."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from breaking_hooks import (
    CHAT,
    COMPLETIONS,
    DEAD,
    KEY,
    NOT_FOUND,
    Ask,
    Events,
    Hooks,
    Reply,
    asked,
    both,
    both_texts,
    broken,
    die,
    each_chunk,
    each_event,
    each_whole,
    error,
    finish_of,
    for_generations,
    listing,
    never,
    numbered,
    refusals,
    refused_for,
    text_of,
    wanting_key,
    with_finish,
    with_text,
)

NO_TEMPLATE = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a "
    "chat template if the tokenizer does not define one."
)


# Whether anybody is there, and who.


@broken("reachable", check_timeout_s=2.0)
def hang() -> Hooks:
    """Every request is taken, and none answered."""

    async def ask(_: Ask) -> Ask | Reply:
        return await never()

    return Hooks(ask=ask)


@broken("reachable")
def dead() -> Hooks:
    """The server is gone: no connection is taken."""
    return asked(die)


@broken("reachable")
def unhealthy() -> Hooks:
    """Every answer is 503, as from a gateway without a server."""
    page = Reply(503, ((b"content-type", b"text/html"),), b"<h1>503 Unavailable</h1>")
    return asked(lambda _: page)


@broken("authenticated", api_key=KEY)
def no_key_asked() -> Hooks:
    """Nobody is asked for the key."""
    return Hooks()


@broken("authenticated", api_key=KEY)
def only_list_guarded() -> Hooks:
    """The key is asked for the list of models only."""
    return wanting_key("/v1/models")


@broken("authenticated", api_key=KEY)
def any_key() -> Hooks:
    """A wrong key does as well as the right one."""
    return wanting_key("/v1/", is_right=lambda key: key.startswith("Bearer "))


@broken("models")
def nothing_listed() -> Hooks:
    """The list of models is empty."""
    return listing(lambda _: [])


@broken("models", model="demo")
def wrong_name_listed() -> Hooks:
    """The list names another model."""
    return listing(lambda models: [{**one, "id": "gemma-from-elsewhere"} for one in models])


@broken("unknown-model")
def any_name_answered() -> Hooks:
    """A model that is not served is answered by the one that is."""
    return for_generations(lambda ask: ask.asking(model="demo") if ask.body else ask)


@broken("unknown-model")
def unknown_model_500() -> Hooks:
    """A model that is not served is an internal error."""

    def reply(_: Ask, reply: Reply) -> Reply:
        return _internal() if reply.status == 404 else reply

    return Hooks(reply=reply)


def _internal(*_: Any) -> Reply:
    return error(500, "Internal Server Error", "InternalServerError")


@broken("completion", "chat")
def wrong_model() -> Hooks:
    """Answers come from a model of another name."""
    return both(lambda _, value: {**value, "model": "gemma-from-elsewhere"})


# Whether the model answers at all.


@broken("completion", "chat")
def engine_dead() -> Hooks:
    """/health is 200, and every generation 500."""
    return for_generations(lambda _: DEAD)


@broken("completion", check_timeout_s=2.0)
def generations_hang() -> Hooks:
    """/health is 200, and no generation ends."""

    async def ask(ask: Ask) -> Ask | Reply:
        return await never() if ask.generates else ask

    return Hooks(ask=ask)


@broken("completion", "chat")
def hidden_error() -> Hooks:
    """An error comes with status 200."""
    return for_generations(lambda _: replace(DEAD, status=200))


@broken("completion", "chat")
def half_json() -> Hooks:
    """The JSON of a whole answer breaks off."""

    def reply(ask: Ask, reply: Reply) -> Reply:
        return replace(reply, content=reply.content[:-40]) if ask.generates else reply

    return Hooks(reply=reply)


@broken("completion", "chat")
def no_choices() -> Hooks:
    """Whole answers hold no choice."""
    return Hooks(reply=each_whole(lambda _, value: {**value, "choices": []}))


@broken("chat")
def no_template() -> Hooks:
    """Chats are refused for want of a chat template."""
    return for_generations(lambda ask: error(400, NO_TEMPLATE) if ask.path == CHAT else ask)


@broken("chat")
def no_chat() -> Hooks:
    """There is no /v1/chat/completions."""
    return asked(lambda ask: NOT_FOUND if ask.path == CHAT else ask)


# Counts.


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


@broken("usage")
def miscounted() -> Hooks:
    """Three tokens more than were written are counted."""
    return both(_counting(_more_tokens))


@broken("usage")
def miscounted_streamed() -> Hooks:
    """Streams count three tokens more than whole answers."""
    return Hooks(events=each_event(_counting(_more_tokens)))


@broken("usage")
def wrong_total() -> Hooks:
    """The counts do not add up."""
    return both(_counting(lambda usage: {**usage, "total_tokens": usage["total_tokens"] + 1}))


@broken("usage")
def no_usage() -> Hooks:
    """No tokens are counted."""
    return both(_counting(lambda _: None))


@broken("usage")
def no_usage_streamed() -> Hooks:
    """Streams count no tokens, though asked to."""
    return for_generations(lambda ask: ask.asking(stream_options=None) if ask.streams else ask)


@broken("usage")
def always_seven() -> Hooks:
    """Every prompt is said to have seven tokens."""
    return both(
        _counting(
            lambda usage: {
                **usage,
                "prompt_tokens": 7,
                "total_tokens": 7 + usage["completion_tokens"],
            }
        )
    )


@broken("usage")
def zero_counts() -> Hooks:
    """All counts are 0."""
    return both(_counting(lambda usage: dict.fromkeys(usage, 0)))


# Where an answer ends.


def _limited(ask: Ask, change: Callable[[int], int]) -> Ask:
    limits = {
        name: change(ask.body[name])
        for name in ("max_tokens", "max_completion_tokens")
        if isinstance(ask.body.get(name), int) and ask.body[name] > 0
    }
    return ask.asking(**limits) if limits else ask


@broken("max-tokens")
def limit_ignored() -> Hooks:
    """Completions go on past max_tokens."""
    return for_generations(
        lambda ask: _limited(ask, lambda n: n + 32) if ask.path == COMPLETIONS else ask
    )


@broken("chat-limits")
def limit_ignored_chat() -> Hooks:
    """Chats go on past max_tokens."""
    return for_generations(lambda ask: _limited(ask, lambda n: n + 32) if ask.path == CHAT else ask)


@broken("max-tokens")
def limit_ignored_streamed() -> Hooks:
    """Streams go on past max_tokens."""
    return for_generations(lambda ask: _limited(ask, lambda n: n + 32) if ask.streams else ask)


@broken("max-tokens", "chat-limits")
def one_token_more() -> Hooks:
    """Answers have one token more than max_tokens."""
    return for_generations(lambda ask: _limited(ask, lambda n: n + 1))


@broken("max-tokens", "chat-limits")
def one_token_less() -> Hooks:
    """Answers end one token before max_tokens."""
    return for_generations(lambda ask: _limited(ask, lambda n: max(1, n - 1)))


def _finishing(change: Callable[[str], str | None]) -> Hooks:
    def finished(_: Ask, value: dict[str, Any]) -> dict[str, Any]:
        reason = finish_of(value)
        return with_finish(value, change(reason)) if reason else value

    return both(finished)


@broken("max-tokens", "chat-limits")
def always_stop() -> Hooks:
    """finish_reason is stop, also where max_tokens was met."""
    return _finishing(lambda _: "stop")


@broken("max-tokens")
def always_length() -> Hooks:
    """finish_reason is length, also where the answer was over."""
    return _finishing(lambda _: "length")


@broken("completion", "chat")
def no_finish() -> Hooks:
    """Whole answers do not say why they ended."""
    return Hooks(reply=each_whole(lambda _, value: with_finish(value, None)))


@broken("completion", "chat")
def unknown_finish() -> Hooks:
    """finish_reason is a word that no client knows."""
    return _finishing(lambda _: "eos_token")


@broken("stop-sequence", "chat-limits")
def stop_ignored() -> Hooks:
    """Stop sequences are ignored."""
    return for_generations(lambda ask: ask.asking(stop=None) if "stop" in ask.body else ask)


@broken("stop-sequence")
def stop_ignored_streamed() -> Hooks:
    """Streams ignore stop sequences."""
    return for_generations(
        lambda ask: ask.asking(stop=None) if ask.streams and "stop" in ask.body else ask
    )


@broken("stop-sequence", "chat-limits")
def stop_echoed() -> Hooks:
    """The stop sequence stands in the answer."""
    return for_generations(
        lambda ask: ask.asking(include_stop_str_in_output=True) if "stop" in ask.body else ask
    )


@broken("stop-sequence")
def stop_as_length() -> Hooks:
    """An answer that a stop sequence ended says length."""

    def finished(ask: Ask, value: dict[str, Any]) -> dict[str, Any]:
        stopped = ask.body.get("stop") and finish_of(value) == "stop"
        return with_finish(value, "length") if stopped else value

    return both(finished)


# What the model says.


@broken("greedy")
def answers_vary() -> Hooks:
    """The same question gets another answer each time."""
    words = itertools.count()

    async def events(_: Ask, events: Events) -> Events:
        async for event in events:
            yield _said(event) if isinstance(event, dict) and finish_of(event) else event

    def _said(value: dict[str, Any]) -> dict[str, Any]:
        return with_text(value, f"{text_of(value)} {next(words)}")

    return Hooks(reply=each_whole(lambda _, value: _said(value)), events=events)


@broken("greedy")
def sampled() -> Hooks:
    """Temperature 0 is overruled, and the likeliest token disturbed."""

    def warm(ask: Ask) -> Ask | Reply:
        if not ask.body:
            return ask
        bias = {str(random.randrange(300, 700)): 60 for _ in range(8)}
        return ask.asking(temperature=2.0, logit_bias=bias)

    return for_generations(warm)


@broken("known-answers")
def other_prefix() -> Hooks:
    """Every answer begins with words that are not the model's."""

    async def events(_: Ask, events: Events) -> Events:
        async for place, event in numbered(events):
            first = place == 0 and isinstance(event, dict)
            yield with_text(event, " Sure!" + text_of(event)) if first else event

    return Hooks(
        reply=each_whole(lambda _, value: with_text(value, " Sure!" + text_of(value))),
        events=events,
    )


@broken("known-answers")
def wrong_facts() -> Hooks:
    """The capital of France is given as Berlin."""
    return both_texts(lambda text: text.replace("Paris", "Berlin"))


@broken("language")
def empty() -> Hooks:
    """Every answer is empty."""
    return both_texts(lambda _: "")


@broken("language")
def blank() -> Hooks:
    """Every answer is spaces."""
    return both_texts(lambda text: " " * len(text))


@broken("language")
def pad() -> Hooks:
    """Every answer is <pad>, as from weights in the wrong type."""
    return both_texts(lambda text: "<pad>" * max(1, len(text) // 4))


@broken("language")
def leaked_token() -> Hooks:
    """A special token stands at the end of every answer."""

    def leaked(_: Ask, value: dict[str, Any]) -> dict[str, Any]:
        return with_text(value, text_of(value) + "<end_of_turn>") if finish_of(value) else value

    return both(leaked)


@broken("language")
def looped() -> Hooks:
    """Every answer is one word over and over."""
    return both_texts(lambda text: " the" * max(1, len(text) // 2))


@broken("language")
def looped_phrase() -> Hooks:
    """Every answer is one phrase over and over."""
    return both_texts(lambda text: " of the sea and" * max(1, len(text) // 2))


# Characters.


def _mangled(change: Callable[[str], str]) -> Hooks:
    return both_texts(lambda text: "".join(c if c.isascii() else change(c) for c in text))


@broken("utf-8")
def mojibake() -> Hooks:
    """UTF-8 is read as Latin-1 and written again."""
    return _mangled(lambda char: char.encode().decode("latin-1"))


@broken("utf-8")
def not_utf_8() -> Hooks:
    """Answers are sent as Latin-1."""

    def latin(content: bytes) -> bytes:
        return content.decode().encode("latin-1", "replace")

    def reply(ask: Ask, reply: Reply) -> Reply:
        return replace(reply, content=latin(reply.content)) if ask.generates else reply

    return replace(each_chunk(lambda _, chunk: latin(chunk)), reply=reply)


@broken("utf-8")
def cut_characters() -> Hooks:
    """Characters cut between events become U+FFFD."""

    def torn(_: Ask, event: dict[str, Any]) -> dict[str, Any]:
        text = "".join(c if c.isascii() else "\ufffd" * len(c.encode()) for c in text_of(event))
        return with_text(event, text) if text else event

    return Hooks(events=each_event(torn))


@broken("utf-8")
def ascii_only() -> Hooks:
    """Characters beyond ASCII become question marks."""
    return _mangled(lambda _: "?")


@broken("utf-8")
def characters_dropped() -> Hooks:
    """Characters of four bytes are dropped."""
    return _mangled(lambda char: "" if len(char.encode()) == 4 else char)


@broken("utf-8")
def escaped_twice() -> Hooks:
    """Characters beyond ASCII arrive as their JSON escapes."""
    return _mangled(lambda char: json.dumps(char)[1:-1])


# Chats.


@broken("chat-multi-turn")
def no_history() -> Hooks:
    """Only the last message reaches the model."""

    def last(ask: Ask) -> Ask | Reply:
        return ask.asking(messages=ask.messages[-1:]) if len(ask.messages) > 1 else ask

    return for_generations(last)


@broken("chat-multi-turn")
def first_turn_only() -> Hooks:
    """Only the first turn reaches the model."""

    def first(ask: Ask) -> Ask | Reply:
        users = [i for i, m in enumerate(ask.messages) if m.get("role") == "user"]
        return ask.asking(messages=ask.messages[: users[0] + 1]) if len(users) > 1 else ask

    return for_generations(first)


def _has_system(ask: Ask) -> bool:
    return any(message.get("role") == "system" for message in ask.messages)


@broken("chat-system")
def system_refused() -> Hooks:
    """The system role is refused, as Gemma 2's own template does."""
    return for_generations(
        lambda ask: error(400, "System role not supported") if _has_system(ask) else ask
    )


@broken("chat-system")
def system_dropped() -> Hooks:
    """System messages do not reach the model."""

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


@broken("wrong-turns")
def turns_merged() -> Hooks:
    """Turns that do not alternate are merged and answered."""

    def mended(ask: Ask) -> Ask | Reply:
        return ask.asking(messages=_alternating(ask.messages)) if ask.messages else ask

    return for_generations(mended)


@broken("wrong-turns")
def turns_500() -> Hooks:
    """Turns that do not alternate are an internal error."""
    return refusals("wrong-turns", _internal)


@broken("wrong-turns")
def turns_kill() -> Hooks:
    """Turns that do not alternate end the server."""
    return refusals("wrong-turns", die)


# What no engine should choke on.


def _kills_engine(what: str) -> Hooks:
    """The refusal is right, and after it every generation fails."""
    dead = False

    def reply(ask: Ask, reply: Reply) -> Reply:
        nonlocal dead
        dead = dead or refused_for(ask, reply) == what
        return reply

    async def ask(ask: Ask) -> Ask | Reply:
        return DEAD if dead and ask.generates else ask

    return Hooks(ask=ask, reply=reply)


@broken("wrong-turns")
def turns_kill_engine() -> Hooks:
    """Turns that do not alternate are refused, and end the engine."""
    return _kills_engine("wrong-turns")


@broken("prompt-too-long")
def truncated() -> Hooks:
    """A prompt beyond the context is cut silently."""

    def cut(ask: Ask) -> Ask | Reply:
        return ask.asking(truncate_prompt_tokens=512) if len(ask.content) > 1500 else ask

    return for_generations(cut)


@broken("prompt-too-long")
def too_long_500() -> Hooks:
    """A prompt beyond the context is an internal error."""
    return refusals("prompt-too-long", _internal)


@broken("prompt-too-long")
def too_long_empty() -> Hooks:
    """A prompt beyond the context gets an empty answer."""
    return refusals("prompt-too-long", lambda ask, _: _canned(ask, ""))


@broken("prompt-too-long")
def too_long_kills() -> Hooks:
    """A prompt beyond the context ends the server."""
    return refusals("prompt-too-long", die)


@broken("prompt-too-long")
def too_long_kills_engine() -> Hooks:
    """A prompt beyond the context is refused, and ends the engine."""
    return _kills_engine("prompt-too-long")


def _canned(ask: Ask, text: str) -> Reply:
    """A whole answer that no model gave."""
    said = (
        {"message": {"role": "assistant", "content": text}} if ask.path == CHAT else {"text": text}
    )
    usage = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    choice = {"index": 0, **said, "finish_reason": "stop"}
    return Reply.of(200, {"id": "x", "model": "demo", "choices": [choice], "usage": usage})


@broken("malformed-body")
def malformed_500() -> Hooks:
    """A body that is no request is an internal error."""
    return refusals("malformed-body", _internal)


@broken("malformed-body")
def malformed_answered() -> Hooks:
    """A body that is no request is answered."""
    return refusals("malformed-body", lambda ask, _: _canned(ask, " Paris."))


@broken("malformed-body")
def malformed_kills() -> Hooks:
    """A body that is no request ends the server."""
    return refusals("malformed-body", die)


@broken("malformed-body")
def malformed_kills_engine() -> Hooks:
    """A body that is no request is refused, and ends the engine."""
    return _kills_engine("malformed-body")
