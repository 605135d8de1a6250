"""Chats: one message, several turns, a system message, and no chat at all."""

from __future__ import annotations

from gemma_serve.adapters.openai_api import EndpointError
from gemma_serve.planning.smoke.limits import judge_history, judge_system
from gemma_serve.planning.smoke.questions import DEMO_MODEL
from gemma_serve.planning.smoke.streams import judge_stream
from gemma_serve.planning.smoke.verdicts import judge_known
from gemma_serve.usecases.smoke.completions import (
    ends_at_its_limit,
    plain_answer,
    stops_at_its_sequence,
    stream_like_plain,
)
from gemma_serve.usecases.smoke.session import Outcome, Session, answer_figures

_BAD_REQUEST = 400


async def chat(session: Session) -> Outcome:
    """Ask one question."""
    question = session.questions.chat
    try:
        reply = await session.ask(question)
    except EndpointError as error:
        if "chat template" not in error.server_message.lower():
            raise
        if session.model == DEMO_MODEL or session.is_taught_to_chat:
            hint = "it was made to chat: give its template with `--chat-template`"
            return Outcome.failed(str(error), hint)
        hint = "to chat, serve an instruction-tuned model: their names end in -it"
        return Outcome.skipped("a base model: it has no chat template", hint)
    return Outcome.of(session.judge(reply), answer_figures(question, reply))


async def chat_stream(session: Session) -> Outcome:
    """Ask the same question as a stream."""
    asked = session.questions
    return await stream_like_plain(session, asked.chat, longer=asked.chat_count)


async def chat_limits(session: Session) -> Outcome:
    """Ask for few tokens, and with a stop sequence."""
    question = session.questions.chat_count
    limited = await ends_at_its_limit(session, question)
    return limited if limited.status == "failed" else await stops_at_its_sequence(session, question)


async def chat_multi_turn(session: Session) -> Outcome:
    """Ask what only the earlier turns give sense to, with them and without."""
    question = session.questions.second_turn
    reply = await session.stream(question)
    alone = await session.ask(question.last_turn_alone())
    fault = (
        judge_stream(reply)
        or session.judge(reply, alone)
        or judge_known(reply, question)
        or judge_history(reply, alone)
    )
    figures = {**answer_figures(question, reply), "prompt_tokens_alone": alone.prompt_tokens}
    return Outcome.of(fault, figures)


async def chat_system(session: Session) -> Outcome:
    """Ask with a system message, and without."""
    question = session.questions.system
    try:
        reply = await session.ask(question)
    except EndpointError as error:
        if error.status != _BAD_REQUEST:
            raise
        return Outcome.failed(
            str(error),
            "the templates of Gemma 1 and 2 take none: serve with gemma-serve's own, "
            "which `gemma-serve up` does by itself",
        )
    alone = await plain_answer(session, question.last_turn_alone())
    fault = (
        session.judge(reply, alone) or judge_known(reply, question) or judge_system(reply, alone)
    )
    system = question.messages[0]["content"]
    figures = {**answer_figures(question, reply), "prompt_tokens_alone": alone.prompt_tokens}
    return Outcome.of(fault, {"system": system, **figures})
