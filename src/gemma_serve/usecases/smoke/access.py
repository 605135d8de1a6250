"""Whether somebody is there, lets in whom it should, and serves the right model."""

from __future__ import annotations

import secrets

from gemma_serve.adapters.openai_answers import EndpointError, json_object
from gemma_serve.adapters.openai_api import Endpoint, RawReply
from gemma_serve.planning.smoke.questions import DEMO_MODEL, of_instruction_tuned_gemma, questions
from gemma_serve.planning.smoke.verdicts import LOGS, PROXY, Fault, judge_models
from gemma_serve.usecases.smoke.session import Outcome, Session

_REACHABLE_TIMEOUT_S = 15.0
_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _SERVER_ERROR = 401, 403, 404, 500
_KEY_HINT = "set GEMMA_SERVE_API_KEY to the server's key, or name its file with --api-key-file"


async def reachable(session: Session) -> Outcome:
    """Ask for the server's health and its version."""
    timeout_s = min(_REACHABLE_TIMEOUT_S, session.options.check_timeout_s)
    async with Endpoint(session.url, api_key=session.api_key, timeout_s=timeout_s) as endpoint:
        health = await endpoint.try_request("GET", "/health")
        session.engine_version = _version(await endpoint.try_request("GET", "/version"))
    fault = None
    if health.status >= _SERVER_ERROR:
        fault = Fault(f"/health answers {health.status}: the engine behind it is dead", LOGS)
    return Outcome.of(fault, {"status": health.status, "version": session.engine_version})


async def authenticated(session: Session) -> Outcome:
    """With a key: ask with it, without it, and with another one."""
    own = await session.endpoint.try_request("GET", "/v1/models")
    if own.status in (_UNAUTHORIZED, _FORBIDDEN):
        session.closed = "`authenticated` failed"
        said = "the key is refused" if session.api_key else "the server wants a key"
        return Outcome.failed(f"{said}: /v1/models answers {own.status}", _KEY_HINT)
    if session.api_key is None:
        return Outcome.skipped("no key was given, and the server asks for none")
    refused = []
    for key, what in ((None, "without a key"), (secrets.token_hex(16), "with a wrong key")):
        async with Endpoint(
            session.url, api_key=key, timeout_s=session.options.check_timeout_s
        ) as endpoint:
            for method, path, body in _requests(session, session.wanted or "any"):
                reply = await endpoint.try_request(method, path, body)
                if reply.status != _UNAUTHORIZED:
                    return Outcome.failed(
                        f"{path} answers {reply.status} {what}, not 401",
                        "start the server with a key; if it is meant to be open, give none here "
                        "(is GEMMA_SERVE_API_KEY set?)",
                    )
                refused.append(f"{path} {what}")
    return Outcome("passed", {"refused": refused})


async def models(session: Session) -> Outcome:
    """Find out who is served here, and how long a sequence may be."""
    session.served = await session.endpoint.list_models()
    names = [one.id for one in session.served]
    fault = judge_models(names, session.wanted)
    if fault is None:
        session.model = session.wanted or names[0]
        if session.model == DEMO_MODEL:
            session.questions = questions(session.answers, known=True)
        elif session.is_taught_to_chat:
            session.questions = of_instruction_tuned_gemma(session.questions)
    return Outcome.of(fault, {"models": names, "max_model_len": session.max_model_len})


async def unknown_model(session: Session) -> Outcome:
    """Ask for a model that nobody serves."""
    name = f"{session.model}-that-is-not-served"
    for method, path, body in _requests(session, name):
        if body is None:
            continue
        reply = await session.endpoint.try_request(method, path, body)
        if reply.status != _NOT_FOUND:
            said = f"{name!r} was asked, and {path} answers {reply.status}, not 404"
            return Outcome.failed(said, PROXY)
    return Outcome("passed", {"status": _NOT_FOUND})


def _version(reply: RawReply) -> str:
    """What vLLM says of itself at /version; "" where nobody answers there."""
    try:
        return str(json_object(reply.text).get("version", ""))
    except EndpointError:
        return ""


def _requests(
    session: Session, model: str
) -> tuple[tuple[str, str, dict[str, object] | None], ...]:
    prompt = {"model": model, "max_tokens": 1}
    chat = session.questions.chat
    return (
        ("GET", "/v1/models", None),
        ("POST", "/v1/completions", {**prompt, "prompt": chat.prompt}),
        ("POST", "/v1/chat/completions", {**prompt, "messages": list(chat.messages)}),
    )
