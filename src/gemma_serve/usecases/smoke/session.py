"""One run of the smoke test: how a check asks, and what it reports."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_serve.adapters.metrics import EngineMetrics, parse_metrics
from gemma_serve.adapters.openai_api import (
    Answer,
    Endpoint,
    EndpointError,
    Sampling,
    ServedModel,
    StreamedAnswer,
    shorten,
)
from gemma_serve.planning.smoke.concurrency import Token, parts_at_a_tie
from gemma_serve.planning.smoke.questions import (
    Answers,
    Question,
    Questions,
    answer_tokens,
    many_questions,
)
from gemma_serve.planning.smoke.report import Status
from gemma_serve.planning.smoke.streams import spread_s
from gemma_serve.planning.smoke.verdicts import Fault, judge_finish, judge_model

CONCURRENCY = 8
_METRICS_TIMEOUT_S = 2.0
_SHOWN_CHARS = 200
_TAUGHT_TO_CHAT = re.compile(r"(?:^|/)gemma-[\w.-]+-it\b", re.IGNORECASE)


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

    @classmethod
    def skipped(cls, reason: str, hint: str = "") -> Outcome:
        """Not tried, or of no meaning here."""
        return cls("skipped", {}, reason, hint)


def usual_concurrency(max_num_seqs: int | None) -> int:
    """How many requests to send at once to an engine that takes so many."""
    return min(CONCURRENCY, max_num_seqs or CONCURRENCY)


@dataclass(frozen=True)
class SmokeOptions:
    """How the smoke test is run.

    `concurrency` requests are sent at once. `max_ttft_s` and `min_tokens_per_second` are limits
    that the endpoint must meet, if given. The whole ends within `timeout_s` seconds, and each
    check within `check_timeout_s`. The checks `required` may not be skipped, and those `left_out`
    are not tried.
    """

    concurrency: int = CONCURRENCY
    max_ttft_s: float | None = None
    min_tokens_per_second: float | None = None
    timeout_s: float = 300.0
    check_timeout_s: float = 60.0
    required: frozenset[str] = frozenset()
    left_out: frozenset[str] = frozenset()


@dataclass
class Session:
    """One run of the smoke test: whom it asks, and what later checks need of earlier ones.

    `answered` are the whole answers so far. `closed` says why nothing more can be asked, once
    that is so.
    """

    endpoint: Endpoint
    url: str
    api_key: str | None
    wanted: str | None
    answers: Answers
    questions: Questions
    options: SmokeOptions
    model: str
    served: tuple[ServedModel, ...] = ()
    engine_version: str = ""
    answered: list[tuple[Question, Answer | StreamedAnswer]] = field(default_factory=list)
    tokens_per_second: float | None = None
    together_tokens_per_second: float | None = None
    passed: set[str] = field(default_factory=set)
    closed: str = ""

    @property
    def max_model_len(self) -> int | None:
        """The longest sequence of the model under test, in tokens, where the server says it."""
        return self._served.max_model_len if self._served else None

    @property
    def names(self) -> tuple[str, ...]:
        """What the model may call itself: the name that was asked, or another name of its own."""
        root = self._served.root if self._served else ""
        same = (one.id for one in self.served if root and one.root == root)
        return tuple(dict.fromkeys((self.model, *same)))

    @property
    def called(self) -> tuple[str, ...]:
        """What may tell which model it is: its names, and where its weights come from."""
        return (*self.names, self._served.root if self._served else "")

    @property
    def is_taught_to_chat(self) -> bool:
        """Whether it is called as Google calls Gemma's instruction-tuned models."""
        return any(map(_TAUGHT_TO_CHAT.search, self.called))

    @property
    def _served(self) -> ServedModel | None:
        return next((one for one in self.served if one.id == self.model), None)

    def either(self, chat: Question, completion: Question) -> Question:
        """The chat where the model can chat, else the completion."""
        return chat if "chat" in self.passed else completion

    def many(self, count: int) -> tuple[Question, ...]:
        """So many questions, as chats where the model can stream a chat."""
        asked = many_questions(self.questions, count)
        if "chat-stream" in self.passed:
            return asked
        return tuple(one.as_completion() for one in asked)

    async def ask(self, question: Question) -> Answer:
        """Ask and wait for the whole answer."""
        sampling = Sampling(answer_tokens(question, self.max_model_len))
        reply = await self.ask_with(question, sampling)
        self.answered.append((question, reply))
        return reply

    async def ask_with(self, question: Question, sampling: Sampling) -> Answer:
        """Ask for an answer made in a certain way."""
        if question.messages:
            return await self.endpoint.chat(self.model, question.messages, sampling)
        return await self.endpoint.complete(self.model, question.prompt, sampling)

    async def stream(self, question: Question) -> StreamedAnswer:
        """Ask and take the answer as it comes."""
        sampling = Sampling(answer_tokens(question, self.max_model_len))
        reply = await self.stream_with(question, sampling)
        self.answered.append((question, reply))
        return reply

    async def stream_on(
        self, question: Question, tokens: int, on_token: Callable[[], None] = lambda: None
    ) -> StreamedAnswer:
        """Make the model write `tokens` tokens, past the end of its answer."""
        return await self.stream_with(question, Sampling(tokens, ignore_eos=True), on_token)

    async def stream_with(
        self,
        question: Question,
        sampling: Sampling,
        on_token: Callable[[], None] = lambda: None,
    ) -> StreamedAnswer:
        """Ask for a stream made in a certain way; `on_token` is called for each token."""
        if question.messages:
            return await self.endpoint.stream_chat(
                self.model, question.messages, sampling, on_token
            )
        return await self.endpoint.stream_completion(
            self.model, question.prompt, sampling, on_token
        )

    async def lives_on(self) -> None:
        """Return once the model has generated a token. Raises EndpointError."""
        await self.ask_with(
            self.either(self.questions.chat, self.questions.completion), Sampling(1)
        )

    def judge(self, *replies: Answer | StreamedAnswer) -> Fault | None:
        """Whether each is an answer of the model that was asked, with a reason for its end."""
        faults = (judge_model(reply, self.names) or judge_finish(reply) for reply in replies)
        return next((fault for fault in faults if fault), None)

    async def unless_a_tie(self, fault: Fault | None, question: Question) -> Fault | None:
        """`fault`, unless it is that two texts part where two tokens were about as likely.

        The model is asked for its log-probabilities only then: the first time that takes long.
        """
        if fault is None or fault.texts is None or question.known is not None:
            return fault
        limit = answer_tokens(question, self.max_model_len)
        tokens = await self.margins(question, Sampling(limit))
        if tokens and all(parts_at_a_tie(text, tokens) for text in fault.texts):
            return None
        return fault

    async def margins(self, question: Question, sampling: Sampling) -> tuple[Token, ...]:
        """The tokens of the answer with their margins; none where the server tells none."""
        try:
            found = await self.endpoint.token_margins(
                self.model, question.prompt, question.messages, sampling
            )
        except EndpointError as error:
            if error.kind != "status":
                raise
            return ()  # `--max-logprobs 0`
        return tuple(Token(text, margin) for text, margin in found)

    async def metrics(self) -> EngineMetrics | None:
        """What the engine reports of itself, where it does."""
        try:
            async with asyncio.timeout(_METRICS_TIMEOUT_S):
                reply = await self.endpoint.try_request("GET", "/metrics")
            return parse_metrics(reply.text)
        except (EndpointError, TimeoutError):
            return None


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
        "answers": stream_figures(asked, replies),
    }


def stream_figures(
    asked: Sequence[Question], replies: Sequence[StreamedAnswer]
) -> list[dict[str, Any]]:
    """Each answer and when its tokens came, in seconds since the first request was sent."""
    begun = min((reply.started_at for reply in replies), default=0.0)
    return [
        {
            "prompt": question.prompt,
            "answer": _beginning(question, reply.text),
            "started_s": round(reply.started_at - begun, 4),
            "token_times_s": [
                round(reply.started_at - begun + time_s, 4) for time_s in reply.token_times_s
            ],
        }
        for question, reply in zip(asked, replies, strict=True)
    ]


def pace(reply: Answer | StreamedAnswer) -> float | None:
    """Tokens a second: of a stream after its first token, of a plain answer over the whole."""
    tokens, seconds = reply.completion_tokens or 0, reply.duration_s
    # Tokens that a starved client read in one go tell nothing of when they were sent.
    if isinstance(reply, StreamedAnswer) and spread_s(reply) > seconds / 4:
        tokens, seconds = tokens - 1, spread_s(reply)
    return tokens / seconds if tokens > 0 and seconds > 0 else None


def rounded(value: float | None, digits: int = 4) -> float | None:
    """`value` as a report shows it."""
    return None if value is None else round(value, digits)


def _beginning(question: Question, text: str) -> str:
    """The answer without what the model was made to write after its end."""
    if question.known is not None and text.startswith(question.known):
        return question.known.strip()
    return shorten(text.strip().partition("\n")[0], _SHOWN_CHARS // 2)
