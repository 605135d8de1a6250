"""One run of the smoke test: how a check asks, and what it reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_serve.adapters.openai_api import (
    Answer,
    Endpoint,
    Sampling,
    ServedModel,
    StreamedAnswer,
    shorten,
)
from gemma_serve.planning.smoke import Answers, Question, Questions, Status, answer_tokens
from gemma_serve.planning.smoke_verdicts import Fault, judge_answer

_SHOWN_CHARS = 200


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    `look_again`: a starved client reads events late and all at once, which looks as if one
    request had waited for another; a second measurement tells.
    """

    status: Status
    figures: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    hint: str = ""
    look_again: bool = False

    @classmethod
    def of(
        cls, fault: Fault | None, figures: Mapping[str, Any], *, look_again: bool = False
    ) -> Outcome:
        """Passed, unless there is a fault."""
        if fault is None:
            return cls("passed", figures)
        return cls("failed", figures, fault.reason, fault.hint, look_again)

    @classmethod
    def failed(cls, reason: str, hint: str) -> Outcome:
        """Failed before anything was measured."""
        return cls("failed", {}, reason, hint)


@dataclass
class Session:
    """One run of the smoke test: whom it asks, and what later checks need of earlier ones."""

    endpoint: Endpoint
    wanted: str | None
    answers: Answers
    questions: Questions
    model: str
    served: tuple[ServedModel, ...] = ()
    plain: Answer | None = None
    tokens_per_second: float | None = None
    can_chat: bool = False
    lost_at: str = ""

    @property
    def max_model_len(self) -> int | None:
        """The longest sequence of the model under test, in tokens, where the server says it."""
        return next((one.max_model_len for one in self.served if one.id == self.model), None)

    async def ask(self, question: Question, *, stop: tuple[str, ...] = ()) -> Answer:
        """Ask and wait for the whole answer."""
        sampling = Sampling(answer_tokens(question, self.max_model_len), stop=stop)
        if question.messages:
            return await self.endpoint.chat(self.model, question.messages, sampling)
        return await self.endpoint.complete(self.model, question.prompt, sampling)

    async def stream(self, question: Question) -> StreamedAnswer:
        """Ask and take the answer as it comes."""
        return await self._stream(
            question, Sampling(answer_tokens(question, self.max_model_len)), lambda: None
        )

    async def stream_on(
        self, question: Question, tokens: int, on_token: Callable[[], None] = lambda: None
    ) -> StreamedAnswer:
        """Make the model write `tokens` tokens, past the end of its answer."""
        return await self._stream(question, Sampling(tokens, ignore_eos=True), on_token)

    async def _stream(
        self, question: Question, sampling: Sampling, on_token: Callable[[], None]
    ) -> StreamedAnswer:
        if question.messages:
            return await self.endpoint.stream_chat(
                self.model, question.messages, sampling, on_token
            )
        return await self.endpoint.stream_completion(
            self.model, question.prompt, sampling, on_token
        )

    def judge(
        self, reply: Answer | StreamedAnswer, question: Question, *, open_ended: bool = False
    ) -> Fault | None:
        """Whether `reply` is an answer to `question`."""
        served = [one.id for one in self.served]
        return judge_answer(reply, question, served, open_ended=open_ended)


def answer_figures(question: Question, reply: Answer | StreamedAnswer) -> dict[str, Any]:
    """What a report shows of one answer."""
    figures: dict[str, Any] = {
        "prompt": question.prompt,
        "answer": shorten(reply.text, _SHOWN_CHARS),
        "prompt_tokens": reply.prompt_tokens,
        "tokens": reply.completion_tokens,
        "tokens_per_second": rounded(pace(reply), 1),
    }
    if isinstance(reply, StreamedAnswer):
        figures |= {"ttft_s": rounded(reply.ttft_s), "events": reply.events}
    return figures


def joint_figures(
    asked: Sequence[Question], replies: Sequence[StreamedAnswer], busy_s: float
) -> dict[str, Any]:
    """What a report shows of answers that were written in the same `busy_s` seconds."""
    tokens = sum(reply.completion_tokens or 0 for reply in replies)
    return {
        "tokens": tokens,
        "tokens_per_second": rounded(tokens / busy_s if busy_s else None, 1),
        "answers": [
            {"prompt": question.prompt, "answer": _beginning(question, reply.text)}
            for question, reply in zip(asked, replies, strict=True)
        ],
    }


def pace(reply: Answer | StreamedAnswer) -> float | None:
    """Tokens a second: of a stream after its first token, of a plain answer over the whole."""
    tokens, seconds = reply.completion_tokens or 0, reply.duration_s
    # Tokens that a starved client read in one go tell nothing of when they were sent.
    if isinstance(reply, StreamedAnswer) and len(set(reply.token_times_s)) > tokens / 2 > 1:
        tokens, seconds = tokens - 1, reply.token_times_s[-1] - reply.token_times_s[0]
    return tokens / seconds if tokens > 0 and seconds > 0 else None


def rounded(value: float | None, digits: int = 4) -> float | None:
    """`value` as a report shows it."""
    return None if value is None else round(value, digits)


def _beginning(question: Question, text: str) -> str:
    """The answer without what the model was made to write after its end."""
    if question.known is not None and text.startswith(question.known):
        return question.known.strip()
    return shorten(text.strip().partition("\n")[0], _SHOWN_CHARS // 2)
