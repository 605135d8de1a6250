"""Chats: one message, several turns, a system message, and no chat at all."""

from __future__ import annotations

from gemma_serve.adapters.openai_api import Answer, EndpointError, Sampling, StreamedAnswer
from gemma_serve.planning.smoke.limits import judge_beginning, judge_history, judge_system
from gemma_serve.planning.smoke.questions import DEMO_MODEL, FEW_TOKENS, Question, answer_tokens
from gemma_serve.planning.smoke.streams import judge_stream
from gemma_serve.planning.smoke.verdicts import PROXY, Fault, judge_known
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
        refused = error.status == _BAD_REQUEST
        if not refused or "chat template" not in error.server_message.lower():
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
    question = session.questions.chat
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
        or await _judge_other_way(session, question, reply)
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
        session.judge(reply, alone)
        or judge_known(reply, question)
        or judge_system(reply, alone)
        or await _judge_other_way(session, question, reply)
    )
    system = question.messages[0]["content"]
    figures = {**answer_figures(question, reply), "prompt_tokens_alone": alone.prompt_tokens}
    return Outcome.of(fault, {"system": system, **figures})


async def _judge_other_way(
    session: Session, question: Question, whole: Answer | StreamedAnswer
) -> Fault | None:
    """Whether a stream begins as the plain answer does, or a plain one as the stream, and costs
    as many prompt tokens: what is dropped may be dropped in one of both only."""
    few = Sampling(min(FEW_TOKENS, answer_tokens(question, session.max_model_len)))
    short: Answer | StreamedAnswer
    if isinstance(whole, StreamedAnswer):
        short, way = await session.ask_with(question, few), "plain"
    else:
        short, way = await session.stream_with(question, few), "streamed"
    if short.prompt_tokens != whole.prompt_tokens:
        return Fault(
            f"{short.prompt_tokens} prompt tokens {way}, {whole.prompt_tokens} otherwise: "
            "not all messages reached the model",
            PROXY,
        )
    return await session.unless_a_tie(judge_beginning(whole, short), question)
