"""What the smoke test asks, and the answers that are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gemma_serve.errors import GemmaServeError

DEMO_MODEL = "demo"
STAGGER_S = 0.3
TOGETHER_TOKENS = 64
FEW_TOKENS = 5
# What the model is made to write to see whether characters of two, three and four bytes arrive.
BEYOND_ASCII = "café, Zürich, 東京, 🌍"
_ANSWER_TOKENS = 64
_KNOWN_ANSWER_TOKENS = 256
_STAGGERED_TOKENS = (64, 512)
# The first of the two staggered requests is to run for four times the stagger, by the pace so far.
_STAGGERED_S = 4 * STAGGER_S
_PROMPT_BLOCKS = 3
_WORD = "a "  # one token in every tokenizer of Gemma


_Known = TypeVar("_Known", "KnownCompletion", "KnownChat")


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

    For a chat, `prompt` is its last message. `known` is the only right answer, where one is;
    every right answer has `holds` in it.
    """

    prompt: str
    messages: tuple[Mapping[str, str], ...] = ()
    known: str | None = None
    holds: str = ""

    def as_completion(self) -> Question:
        """The same words as a prompt to continue, for a model that can't chat."""
        return Question(self.prompt)

    def is_as(self, other: Question) -> bool:
        """Whether both ask the same, whatever is known of the answer."""
        return (self.prompt, self.messages) == (other.prompt, other.messages)

    def last_turn_alone(self) -> Question:
        """The last message without those before it."""
        return Question(self.prompt, self.messages[-1:])


@dataclass(frozen=True)
class Questions:
    """What each check asks. `many` are different ones, for requests at the same time."""

    completion: Question
    count: Question
    chat: Question
    chat_count: Question
    second_turn: Question
    system: Question
    many: tuple[Question, ...]


def questions(answers: Answers, *, known: bool) -> Questions:
    """The questions in `answers`, with their answers if those are `known` to be right."""

    def completion(id: str) -> Question:
        found = answers.completion(id)
        return Question(found.prompt, known=found.answer if known else None)

    def chat(id: str) -> Question:
        return _chat_question(answers.chat(id), known=known)

    return Questions(
        completion=completion("capital-of-france"),
        count=completion("count"),
        chat=chat("capital-of-france"),
        chat_count=chat("count-to-ten"),
        second_turn=chat("second-fun-fact"),
        system=chat("system-one-word"),
        many=tuple(
            _chat_question(one, known=known) for one in answers.chats if len(one.messages) == 1
        ),
    )


def of_instruction_tuned_gemma(asked: Questions) -> Questions:
    """The same questions, and what every Gemma that was taught to chat says to one of them."""
    return replace(asked, chat=replace(asked.chat, holds="Paris"))


def many_questions(asked: Questions, count: int) -> tuple[Question, ...]:
    """`count` questions, all different as long as there are enough."""
    return tuple(asked.many[index % len(asked.many)] for index in range(count))


def answer_tokens(question: Question, max_model_len: int | None) -> int:
    """How many tokens to ask for: a known answer is wanted whole, of others a few lines do."""
    wanted = _ANSWER_TOKENS if question.known is None else _KNOWN_ANSWER_TOKENS
    return with_room(wanted, max_model_len)


def together_tokens(max_model_len: int | None, *, attempt: int = 0) -> int:
    """How many tokens each of several answers at once is made to have."""
    return with_room(TOGETHER_TOKENS * 2**attempt, max_model_len)


def staggered_tokens(
    tokens_per_second: float | None, max_model_len: int | None, *, attempt: int
) -> int:
    """How many tokens keep the first request running when the second comes.

    Each `attempt` after the first, which is 0, takes more: on a busy machine the pace is a guess.
    """
    least, most = _STAGGERED_TOKENS
    wanted = max(round((tokens_per_second or 0.0) * _STAGGERED_S), least) * 4**attempt
    return with_room(min(wanted, most), max_model_len)


def with_room(tokens: int, max_model_len: int | None) -> int:
    """At most half of the longest sequence: the rest is left to the question."""
    return tokens if max_model_len is None else max(1, min(tokens, max_model_len // 2))


def long_prompt(block_size: int, max_model_len: int | None) -> str:
    """A prompt that fills a few whole blocks of the KV cache, as far as the model takes it."""
    words = _PROMPT_BLOCKS * max(block_size, 16) + 1
    return "Once more: " + _WORD * with_room(words, max_model_len)


def too_long_prompt(max_model_len: int) -> str:
    """A prompt of more tokens than the longest sequence has."""
    return _WORD * (max_model_len + 16)


def _chat_question(chat: KnownChat, *, known: bool) -> Question:
    last = chat.messages[-1]["content"]
    return Question(last, chat.messages, chat.answer if known else None)


def _with_id(known: tuple[_Known, ...], id: str) -> _Known:
    for one in known:
        if one.id == id:
            return one
    raise GemmaServeError(f"the known answers lack {id!r}", code="smoke.answers")
