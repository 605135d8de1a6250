"""The checks of the smoke test: what each promises, and which others it needs first."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """One promise of an endpoint.

    It is tried only after all the checks that it `needs` have passed, and after one of
    `needs_one_of` has, where there are any. It would say nothing new after one of
    `pointless_after` failed.
    """

    text: str
    needs: tuple[str, ...] = ()
    needs_one_of: tuple[str, ...] = ()
    pointless_after: tuple[str, ...] = ()


_EITHER = ("completion", "chat")
_EITHER_STREAM = ("completion-stream", "chat-stream")
_WRONG_ANSWERS = ("language", "known-answers")

# In the order in which they run: what a check needs comes before it.
PROMISES: Mapping[str, Promise] = {
    "reachable": Promise("A server answers at the address"),
    "authenticated": Promise(
        "With a key set, requests without it or with a wrong one are refused with 401",
        needs=("reachable",),
    ),
    "models": Promise("The endpoint lists the model that it serves", needs=("reachable",)),
    "unknown-model": Promise("A model that is not served is refused with 404", needs=("models",)),
    "completion": Promise("A prompt is continued by the model that was asked", needs=("models",)),
    "completion-stream": Promise(
        "A streamed completion comes piece by piece, ends with [DONE], and equals the plain one",
        needs=("completion",),
    ),
    "max-tokens": Promise(
        "An answer ends at max_tokens with finish_reason length, or before it with stop",
        needs=("completion", "completion-stream"),
    ),
    "stop-sequence": Promise(
        "A stop sequence ends the answer and is left out of it",
        needs=("completion", "completion-stream"),
    ),
    "greedy": Promise(
        "At temperature 0 the same question gets the same answer", needs=("completion",)
    ),
    "chat": Promise("A chat message is answered", needs=("models",)),
    "chat-stream": Promise(
        "A streamed chat comes piece by piece, ends with [DONE], and equals the plain one",
        needs=("chat",),
    ),
    "usage": Promise(
        "Tokens are counted, add up, and are the same plain and streamed",
        needs_one_of=_EITHER_STREAM,
    ),
    "utf-8": Promise(
        "Characters of several bytes arrive whole, also across events",
        needs_one_of=_EITHER_STREAM,
    ),
    "chat-limits": Promise(
        "A chat, too, ends at max_tokens and at a stop sequence", needs=("chat", "chat-stream")
    ),
    "language": Promise(
        "Answers are language: not empty, no special tokens, no loop", needs_one_of=_EITHER
    ),
    "known-answers": Promise(
        "Answers that are known are right", needs_one_of=_EITHER, pointless_after=("language",)
    ),
    "chat-multi-turn": Promise(
        "A chat takes its earlier turns into account",
        needs=("chat",),
        pointless_after=_WRONG_ANSWERS,
    ),
    "chat-system": Promise(
        "A system message is accepted and reaches the model",
        needs=("chat",),
        pointless_after=_WRONG_ANSWERS,
    ),
    "wrong-turns": Promise(
        "Turns that do not alternate are refused with 400, and the server lives on",
        needs=("chat",),
    ),
    "prompt-too-long": Promise(
        "A prompt beyond the context is refused with 400, and the server lives on",
        needs_one_of=_EITHER,
    ),
    "malformed-body": Promise(
        "A body that is no request is refused with 4xx, and the server lives on",
        needs_one_of=_EITHER,
    ),
    "staggered": Promise(
        "A second request is answered while the first still runs",
        needs_one_of=_EITHER_STREAM,
        pointless_after=_WRONG_ANSWERS,
    ),
    "together": Promise(
        "Requests at once are answered together, each with its own answer",
        needs_one_of=_EITHER_STREAM,
        pointless_after=_WRONG_ANSWERS,
    ),
    "cancelled-stream": Promise(
        "A stream that its client leaves frees its place", needs_one_of=_EITHER_STREAM
    ),
    "prefix-cache": Promise(
        "With prefix caching on, a prompt seen before is found in the cache",
        needs=("completion",),
    ),
    "first-token": Promise("The first token comes within --max-ttft", needs_one_of=_EITHER_STREAM),
    "throughput": Promise(
        "Requests at once get --min-tokens-per-second in all",
        needs_one_of=("together", *_EITHER_STREAM),
    ),
}


def needed_in_any_case(ids: Collection[str]) -> frozenset[str]:
    """The checks without which one of `ids` can't be tried, whatever else passes."""
    needs = {need for id in ids for need in PROMISES[id].needs}
    return frozenset(needs | needed_in_any_case(needs)) if needs else frozenset()


def with_needs(ids: Collection[str]) -> tuple[str, ...]:
    """The checks `ids` and those that they need, in order."""
    wanted = set(ids)
    for id in reversed(tuple(PROMISES)):  # what a check needs comes before it
        if id in wanted:
            wanted |= {*PROMISES[id].needs, *PROMISES[id].needs_one_of}
    return tuple(id for id in PROMISES if id in wanted)
