"""Each check of the smoke test: what is asked, what is measured, which verdict decides."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from gemma_serve.adapters.openai_api import EndpointError
from gemma_serve.planning.smoke import DEMO_MODEL, questions
from gemma_serve.planning.smoke_verdicts import (
    judge_history,
    judge_models,
    judge_pieces,
    judge_stop,
    judge_stream,
    judge_system,
    stop_string,
)
from gemma_serve.usecases.smoke_concurrency import eight_together, two_staggered
from gemma_serve.usecases.smoke_session import Outcome, Session, answer_figures, pace


async def models(session: Session) -> Outcome:
    """Find out who is served here, and how long a sequence may be."""
    session.served = await session.endpoint.list_models()
    names = [one.id for one in session.served]
    fault = judge_models(names, session.wanted)
    if fault is None:
        session.model = session.wanted or names[0]
        if session.model == DEMO_MODEL:
            session.questions = questions(session.answers, known=True)
    figures = {"models": names, "max_model_len": session.max_model_len}
    return Outcome.of(fault, figures)


async def completion(session: Session) -> Outcome:
    """Continue a prompt."""
    question = session.questions.completion
    session.plain = await session.ask(question)
    return Outcome.of(
        session.judge(session.plain, question), answer_figures(question, session.plain)
    )


async def completion_stream(session: Session) -> Outcome:
    """Continue the same prompt as a stream."""
    question = session.questions.completion
    plain = session.plain or await session.ask(question)
    streamed = await session.stream(question)
    fault = judge_stream(plain, streamed)
    if fault is None:
        session.tokens_per_second = pace(streamed)
    return Outcome.of(fault, answer_figures(question, streamed))


async def stop_sequence(session: Session) -> Outcome:
    """Ask twice: for the whole answer, and with a word from its middle as the stop sequence."""
    question = session.questions.stop
    whole = await session.ask(question)
    stop = stop_string(whole.text)
    if stop is None:
        return Outcome(
            "skipped", answer_figures(question, whole), "the answer is too short to be cut"
        )
    stopped = await session.ask(question, stop=(stop,))
    fault = session.judge(whole, question) or judge_stop(whole.text, stop, stopped)
    return Outcome.of(fault, {**answer_figures(question, stopped), "stop": stop})


async def chat(session: Session) -> Outcome:
    """Ask one question."""
    question = session.questions.chat
    try:
        reply = await session.ask(question)
    except EndpointError as error:
        if "chat template" not in error.server_message.lower():
            raise
        if session.model.endswith("-it"):
            raise  # made to chat, and deployed without its template
        hint = "to chat, serve an instruction-tuned model: their names end in -it"
        return Outcome("skipped", {}, "a base model: it has no chat template", hint)
    return Outcome.of(session.judge(reply, question), answer_figures(question, reply))


async def chat_multi_turn(session: Session) -> Outcome:
    """Ask what only the earlier turns give sense to, with them and without."""
    question = session.questions.second_turn
    reply = await session.stream(question)
    alone = await session.ask(question.last_turn_alone())
    fault = session.judge(reply, question) or judge_history(reply, alone) or judge_pieces(reply)
    figures = {**answer_figures(question, reply), "prompt_tokens_alone": alone.prompt_tokens}
    return Outcome.of(fault, figures)


async def chat_system(session: Session) -> Outcome:
    """Ask with a system message, and without."""
    question = session.questions.system
    reply = await session.ask(question)
    alone = await session.ask(question.last_turn_alone())
    fault = session.judge(reply, question) or judge_system(reply, alone)
    system = question.messages[0]["content"]
    figures = {**answer_figures(question, reply), "prompt_tokens_alone": alone.prompt_tokens}
    return Outcome.of(fault, {"system": system, **figures})


CHECKS: Mapping[str, Callable[[Session], Awaitable[Outcome]]] = {
    "models": models,
    "completion": completion,
    "completion-stream": completion_stream,
    "stop-sequence": stop_sequence,
    "chat": chat,
    "chat-multi-turn": chat_multi_turn,
    "chat-system": chat_system,
    "two-staggered": two_staggered,
    "eight-together": eight_together,
}
