"""What must be refused: and the server lives on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemma_serve.adapters.openai_api import RawReply
from gemma_serve.planning.smoke.questions import too_long_prompt
from gemma_serve.planning.smoke.verdicts import LOGS
from gemma_serve.usecases.smoke.session import Outcome, Session

_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_BAD_REQUEST = 400
# FastAPI's own status for a body of the wrong form is 422; vLLM makes it 400.
_TOO_LONG = (_BAD_REQUEST, 413)
_MALFORMED = (_BAD_REQUEST, 415, 422)
# Gemma 4's template takes turns in any order.
_ANY_TURNS = re.compile(r"gemma-?4", re.IGNORECASE)
_USER = {"role": "user", "content": "Hello!"}


async def wrong_turns(session: Session) -> Outcome:
    """Send two user turns in a row, and no turn at all."""
    none = await session.endpoint.try_request("POST", _CHAT, _chat(session, []))
    if none.status not in _MALFORMED:
        return _not_refused("a chat without turns is answered", none, _CHAT)
    if any(map(_ANY_TURNS.search, session.called)):
        return await _and_lives(session, {"status": none.status})
    two = await session.endpoint.try_request("POST", _CHAT, _chat(session, [_USER, _USER]))
    if two.status != _BAD_REQUEST:
        return _not_refused("two user turns in a row are answered", two, _CHAT)
    return await _and_lives(session, {"status": two.status})


async def prompt_too_long(session: Session) -> Outcome:
    """Send more than the longest sequence holds."""
    limit = session.max_model_len
    if limit is None:
        return Outcome.skipped("the server does not tell its longest sequence")
    for path, body in _requests(session, too_long_prompt(limit)):
        reply = await session.endpoint.try_request("POST", path, body)
        if reply.status not in _TOO_LONG:
            return _not_refused(f"a prompt of over {limit} tokens is answered", reply, path)
    return await _and_lives(session, {"status": _BAD_REQUEST, "max_model_len": limit})


async def malformed_body(session: Session) -> Outcome:
    """Send half a JSON object, a word for a number, and nothing to answer."""
    kinds: list[str] = []
    for path, body in _requests(session, "Hello"):
        whole = json.dumps(body)
        bodies: Mapping[str, bytes | Mapping[str, Any]] = {
            "half a JSON object": whole[: len(whole) // 2].encode(),
            "a word for max_tokens": {**body, "max_tokens": "many"},
            "no prompt": {"model": session.model},
        }
        for what, malformed in bodies.items():
            reply = await session.endpoint.try_request("POST", path, malformed)
            if reply.status not in _MALFORMED:
                return _not_refused(f"{what} is answered", reply, path)
        kinds = list(bodies)
    return await _and_lives(session, {"refused": kinds})


def _not_refused(what: str, reply: RawReply, path: str) -> Outcome:
    return Outcome.failed(f"{what} with {reply.status} by {path}, not 400", LOGS)


async def _and_lives(session: Session, figures: Mapping[str, Any]) -> Outcome:
    await session.lives_on()
    return Outcome("passed", figures)


def _requests(session: Session, prompt: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A request with `prompt` on each path that answers."""
    if "completion" in session.passed:
        yield _COMPLETIONS, {"model": session.model, "prompt": prompt, "max_tokens": 1}
    if "chat" in session.passed:
        yield _CHAT, _chat(session, [{"role": "user", "content": prompt}])


def _chat(session: Session, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    return {"model": session.model, "messages": list(messages), "max_tokens": 1}
