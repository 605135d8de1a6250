"""What the answers of all checks say: language, and what is known to be right."""

from __future__ import annotations

from gemma_serve.planning.smoke.language import SAME_ANSWERS, judge_language, judge_variety
from gemma_serve.planning.smoke.verdicts import judge_known
from gemma_serve.usecases.smoke.completions import plain_answer
from gemma_serve.usecases.smoke.session import Outcome, Session, answer_figures


async def language(session: Session) -> Outcome:
    """Look at every whole answer so far."""
    for question in session.many(SAME_ANSWERS + 1):
        if len({asked.prompt for asked, _ in session.answered}) < SAME_ANSWERS:
            await plain_answer(session, question)
    for question, reply in session.answered:
        if fault := judge_language(reply, is_chat=bool(question.messages)):
            return Outcome.of(fault, answer_figures(question, reply))
    said = {question.prompt: reply.text for question, reply in session.answered}
    if fault := judge_variety(said):
        return Outcome.of(fault, {"answers_read": len(session.answered)})
    tokens = sum(reply.completion_tokens or 0 for _, reply in session.answered)
    return Outcome("passed", {"answers_read": len(session.answered), "tokens": tokens})


async def known_answers(session: Session) -> Outcome:
    """Compare every answer whose right one is known."""
    known = [pair for pair in session.answered if pair[0].known is not None or pair[0].holds]
    for question, reply in known:
        if fault := judge_known(reply, question):
            return Outcome.of(fault, answer_figures(question, reply))
    if not known:
        return Outcome.skipped("what this model should answer is not known")
    return Outcome("passed", {"answers_read": len(known)})
