"""The smoke test as values: its checks, what they ask, and what they report."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gemma_serve.errors import GemmaServeError

Status = Literal["passed", "failed", "skipped"]

# Each check and what it promises, in the order in which they run.
PROMISES: Mapping[str, str] = {
    "models": "The endpoint lists the model that it serves",
    "completion": "A prompt is continued with text, and its tokens are counted",
    "completion-stream": "A streamed completion comes piece by piece and equals the plain one",
    "stop-sequence": "A stop sequence ends the answer and is left out of it",
    "chat": "A chat message is answered",
    "chat-multi-turn": "A streamed chat takes the earlier turns into account",
    "chat-system": "A system message is accepted and reaches the model",
    "two-staggered": "A second request is answered while the first still runs",
    "eight-together": "Eight requests at once are answered together, each with its own answer",
}

# A check is tried only after all of these have passed ...
NEEDS: Mapping[str, tuple[str, ...]] = {
    "models": (),
    "completion": ("models",),
    "completion-stream": ("models", "completion"),
    "stop-sequence": ("models", "completion"),
    "chat": ("models",),
    "chat-multi-turn": ("models", "chat"),
    "chat-system": ("models", "chat"),
    "two-staggered": ("models",),
    "eight-together": ("models",),
}

# ... and one of these, which then decides how it asks.
NEEDS_ONE_OF: Mapping[str, tuple[str, ...]] = {
    "two-staggered": ("completion", "chat"),
    "eight-together": ("completion", "chat"),
}

DEMO_MODEL = "demo"
STAGGER_S = 0.5
STAGGER_ATTEMPTS = 3
TOGETHER_TOKENS = 64
_ANSWER_TOKENS = 64
_KNOWN_ANSWER_TOKENS = 256
_STAGGERED_TOKENS = (64, 512)
# The first of the two staggered requests is to run for six times the stagger, by the pace so far.
_STAGGERED_S = 6 * STAGGER_S
_EIGHT = ("france", "italy", "spain", "portugal", "germany", "japan", "egypt", "greece")


_Known = TypeVar("_Known", "KnownCompletion", "KnownChat")


@dataclass(frozen=True)
class CheckResult:
    """One promise, tested. `reason` says why it failed or was skipped.

    `figures` are what was measured: times in seconds (`_s`), counts, and the answer's text.
    """

    id: str
    promise: str
    status: Status
    reason: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    hint: str = ""
    duration_s: float = 0.0


@dataclass(frozen=True)
class SmokeReport:
    """Every check of one run against `model` at `url`, in order."""

    url: str
    model: str
    checks: tuple[CheckResult, ...]

    @property
    def ok(self) -> bool:
        """Whether the endpoint kept its promises: nothing failed, and something was shown."""
        statuses = [check.status for check in self.checks]
        return "failed" not in statuses and "passed" in statuses


def with_needs(ids: Collection[str]) -> tuple[str, ...]:
    """The checks `ids` and those that they need, in order."""
    wanted = set(ids)
    for id in reversed(tuple(PROMISES)):  # what a check needs comes before it
        if id in wanted:
            wanted |= {*NEEDS[id], *NEEDS_ONE_OF.get(id, ())}
    return tuple(id for id in PROMISES if id in wanted)


class KnownCompletion(BaseModel):
    """A prompt and what the demo model continues it with."""

    model_config = ConfigDict(frozen=True)
    id: str
    prompt: str
    answer: str


class KnownChat(BaseModel):
    """A chat (messages with `role` and `content`) and what the demo model answers."""

    model_config = ConfigDict(frozen=True)
    id: str
    messages: tuple[dict[str, str], ...]
    answer: str


class Answers(BaseModel):
    """The questions of the smoke test and the demo model's answers, as the package ships them."""

    model_config = ConfigDict(frozen=True)
    completions: tuple[KnownCompletion, ...]
    chats: tuple[KnownChat, ...]

    def completion(self, id: str) -> KnownCompletion:
        """The completion with this id. Raises GemmaServeError where there is none."""
        return _with_id(self.completions, id)

    def chat(self, id: str) -> KnownChat:
        """The chat with this id. Raises GemmaServeError where there is none."""
        return _with_id(self.chats, id)


def parse_answers(text: str) -> Answers:
    """Read `answers.json`. Raises GemmaServeError where it hasn't the form of one."""
    try:
        return Answers.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise GemmaServeError(
            f"the known answers can't be read: {place or 'the file'}: {first['msg']}",
            code="smoke.answers",
        ) from None


@dataclass(frozen=True)
class Question:
    """What to ask: a chat's `messages`, or where there are none, a `prompt` to continue.

    For a chat, `prompt` is its last message. `known` is the only right answer, where one is.
    """

    prompt: str
    messages: tuple[Mapping[str, str], ...] = ()
    known: str | None = None

    def as_completion(self) -> Question:
        """The same words as a prompt to continue, for a model that can't chat."""
        return Question(self.prompt)

    def last_turn_alone(self) -> Question:
        """The last message without those before it."""
        return Question(self.prompt, self.messages[-1:])


@dataclass(frozen=True)
class Questions:
    """What each check asks."""

    completion: Question
    stop: Question
    chat: Question
    second_turn: Question
    system: Question
    eight: tuple[Question, ...]


def questions(answers: Answers, *, known: bool) -> Questions:
    """The questions in `answers`, with their answers if those are `known` to be right."""

    def completion(id: str) -> Question:
        found = answers.completion(id)
        return Question(found.prompt, known=found.answer if known else None)

    def chat(id: str) -> Question:
        found = answers.chat(id)
        last = found.messages[-1]["content"]
        return Question(last, found.messages, found.answer if known else None)

    return Questions(
        completion=completion("capital-of-france"),
        stop=completion("count"),
        chat=chat("capital-of-france"),
        second_turn=chat("second-fun-fact"),
        system=chat("system-one-word"),
        eight=tuple(chat(f"capital-of-{country}") for country in _EIGHT),
    )


def answer_tokens(question: Question, max_model_len: int | None) -> int:
    """How many tokens to ask for: a known answer is wanted whole, of others a few lines do."""
    wanted = _ANSWER_TOKENS if question.known is None else _KNOWN_ANSWER_TOKENS
    return _with_room(wanted, max_model_len)


def together_tokens(max_model_len: int | None) -> int:
    """How many tokens each of eight answers at once is made to have."""
    return _with_room(TOGETHER_TOKENS, max_model_len)


def staggered_tokens(
    tokens_per_second: float | None, max_model_len: int | None, *, attempt: int
) -> int:
    """How many tokens keep the first request running when the second comes.

    Each `attempt` after the first, which is 0, takes more: on a busy machine the pace is a guess.
    """
    least, most = _STAGGERED_TOKENS
    wanted = max(round((tokens_per_second or 0.0) * _STAGGERED_S), least) * 4**attempt
    return _with_room(min(wanted, most), max_model_len)


def _with_room(tokens: int, max_model_len: int | None) -> int:
    """Half of the longest sequence is left to the question."""
    return tokens if max_model_len is None else max(1, min(tokens, max_model_len // 2))


def _with_id(known: tuple[_Known, ...], id: str) -> _Known:
    for one in known:
        if one.id == id:
            return one
    raise GemmaServeError(f"the known answers lack {id!r}", code="smoke.answers")
