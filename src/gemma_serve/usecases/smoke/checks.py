"""The checks of the smoke test by their ids."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from gemma_serve.usecases.smoke.access import authenticated, models, reachable, unknown_model
from gemma_serve.usecases.smoke.answers import known_answers, language
from gemma_serve.usecases.smoke.chats import (
    chat,
    chat_limits,
    chat_multi_turn,
    chat_stream,
    chat_system,
)
from gemma_serve.usecases.smoke.completions import (
    completion,
    completion_stream,
    greedy,
    max_tokens,
    stop_sequence,
    usage,
    utf_8,
)
from gemma_serve.usecases.smoke.concurrency import staggered, together
from gemma_serve.usecases.smoke.engine import cancelled_stream, prefix_cache
from gemma_serve.usecases.smoke.refusals import malformed_body, prompt_too_long, wrong_turns
from gemma_serve.usecases.smoke.session import Outcome, Session
from gemma_serve.usecases.smoke.speed import first_token, throughput

CHECKS: Mapping[str, Callable[[Session], Awaitable[Outcome]]] = {
    "reachable": reachable,
    "authenticated": authenticated,
    "models": models,
    "unknown-model": unknown_model,
    "completion": completion,
    "completion-stream": completion_stream,
    "max-tokens": max_tokens,
    "stop-sequence": stop_sequence,
    "greedy": greedy,
    "chat": chat,
    "chat-stream": chat_stream,
    "usage": usage,
    "utf-8": utf_8,
    "chat-limits": chat_limits,
    "language": language,
    "known-answers": known_answers,
    "chat-multi-turn": chat_multi_turn,
    "chat-system": chat_system,
    "wrong-turns": wrong_turns,
    "prompt-too-long": prompt_too_long,
    "malformed-body": malformed_body,
    "staggered": staggered,
    "together": together,
    "cancelled-stream": cancelled_stream,
    "prefix-cache": prefix_cache,
    "first-token": first_token,
    "throughput": throughput,
}
