"""What an OpenAI-compatible endpoint says, read into values. Pure: no connection, no clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gemma_serve.errors import GemmaServeError

MESSAGE_CHARS = 300
Kind = Literal["unreachable", "timeout", "status", "cut", "invalid"]
TextOf = Callable[[Mapping[str, Any]], str]


class EndpointError(GemmaServeError):
    """The endpoint did not answer as it should.

    `kind`: "unreachable" (no connection), "timeout", "status" (the server answered with an
    error: `status` and its own words in `server_message`), "cut" (the answer broke off),
    "invalid" (what came can't be read as an answer). The problem's code is `endpoint.<kind>`.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: Kind,
        status: int | None = None,
        server_message: str = "",
        hint: str = "",
    ) -> None:
        super().__init__(message, code=f"endpoint.{kind}", hint=hint)
        self.kind = kind
        self.status = status
        self.server_message = server_message

    def without(self, secret: str | None) -> EndpointError:
        """The same error with `secret` struck out: a server may quote what it was sent."""
        problem = self.problems[0]
        if not secret or secret not in problem.message + self.server_message:
            return self
        return EndpointError(
            problem.message.replace(secret, "***"),
            kind=self.kind,
            status=self.status,
            server_message=self.server_message.replace(secret, "***"),
            hint=problem.hint,
        )


@dataclass(frozen=True)
class ServedModel:
    """A model that the endpoint lists.

    vLLM adds the longest sequence in tokens, and in `root` where the weights come from, which
    all names of one model share.
    """

    id: str
    max_model_len: int | None = None
    root: str = ""


@dataclass(frozen=True)
class Usage:
    """The tokens of one request; None where the server did not count them."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer. Counts are None where the server sent no usage."""

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    total_tokens: int | None
    model: str
    duration_s: float


@dataclass(frozen=True)
class StreamedAnswer:
    """An answer that came in events.

    `started_at` is perf_counter() when the request was sent; `token_times_s` are seconds since
    then, one for each event with a token, and `ttft_s` is the first of them. `events` counts
    those that carried text: special tokens have none. `done` says whether `[DONE]` ended it, and
    `out_of_order` what came where it can't belong, "" where nothing did.
    """

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    total_tokens: int | None
    model: str
    duration_s: float
    started_at: float
    token_times_s: tuple[float, ...]
    events: int
    done: bool
    out_of_order: str
    content_type: str

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token; None where none came."""
        return self.token_times_s[0] if self.token_times_s else None


class StreamParts:
    """Gathers the events of one stream, each with the time at which it came."""

    def __init__(self, text_of: TextOf, on_token: Callable[[], None]) -> None:
        self._text_of = text_of
        self._on_token = on_token
        self._texts: list[str] = []
        self._times: list[float] = []
        self._finish_reason: str | None = None
        self._usage = Usage()
        self._model = ""
        self._id = ""
        self._done = False
        self._out_of_order = ""

    def take(self, events: Iterable[str], *, at_s: float) -> None:
        """Add the data of `events`, which came `at_s` seconds after the request.

        Raises:
            EndpointError: an event isn't JSON, or the server reports an error in one.
        """
        for data in events:
            if self._done:
                self._misplaced("an event came after [DONE]")
            if data.strip() == "[DONE]":
                self._done = True
            else:
                self._event(json_object(data), at_s)

    def _event(self, value: Mapping[str, Any], at_s: float) -> None:
        if "error" in value:
            said = server_message(value)
            raise EndpointError(
                f"the server broke off its stream with an error: {said}",
                kind="status",
                server_message=said,
                hint="the engine's log says why; `gemma-serve diagnose` reads it",
            )
        if value.get("usage"):
            self._usage = usage(value)
        self._model = str(value.get("model") or self._model)
        self._same_answer(value)
        choice = first_choice(value, required=False)
        if not choice:  # the last event carries only the usage
            return
        text = self._text_of(choice)
        if text and self._finish_reason is not None:
            self._misplaced(f"text came after finish_reason {self._finish_reason!r}")
        self._finish_reason = _finish_reason(choice) or self._finish_reason
        if not text and _mapping(choice.get("delta")).get("role"):
            return  # a chat's first event only says who speaks
        self._texts.append(text)
        self._times.append(at_s)
        self._on_token()

    def _same_answer(self, value: Mapping[str, Any]) -> None:
        """Every event of a stream carries the id of its answer."""
        id = str(value.get("id") or "")
        if self._id and id and id != self._id:
            self._misplaced(f"events of two answers came, {self._id!r} and {id!r}")
        self._id = id or self._id

    def _misplaced(self, what: str) -> None:
        self._out_of_order = self._out_of_order or what

    def answer(
        self, *, started_at: float, duration_s: float, content_type: str = ""
    ) -> StreamedAnswer:
        """The whole answer, once the stream has ended.

        Raises:
            EndpointError: it ended before the answer did ("cut").
        """
        if not self._done and self._finish_reason is None:
            raise EndpointError(
                f"the stream ended after {len(self._texts)} events, before its answer was whole",
                kind="cut",
                hint="the engine's log says why; `gemma-serve up` tells where it is",
            )
        return StreamedAnswer(
            text="".join(self._texts),
            finish_reason=self._finish_reason,
            prompt_tokens=self._usage.prompt_tokens,
            completion_tokens=self._usage.completion_tokens,
            total_tokens=self._usage.total_tokens,
            model=self._model,
            duration_s=duration_s,
            started_at=started_at,
            token_times_s=tuple(self._times),
            events=sum(map(bool, self._texts)),
            done=self._done,
            out_of_order=self._out_of_order,
            content_type=content_type,
        )


def whole_answer(value: Mapping[str, Any], text_of: TextOf, *, duration_s: float) -> Answer:
    """The answer that is not streamed. Raises EndpointError where it holds no choice."""
    choice = first_choice(value)
    counted = usage(value)
    return Answer(
        text=text_of(choice),
        finish_reason=_finish_reason(choice),
        prompt_tokens=counted.prompt_tokens,
        completion_tokens=counted.completion_tokens,
        total_tokens=counted.total_tokens,
        model=str(value.get("model") or ""),
        duration_s=duration_s,
    )


def served_models(value: Mapping[str, Any]) -> tuple[ServedModel, ...]:
    """What `/v1/models` lists, in its order. Raises EndpointError where there is no list."""
    listed = value.get("data")
    if not isinstance(listed, list):
        raise invalid("the list of models holds no `data`")
    return tuple(
        ServedModel(str(item["id"]), _count(item, "max_model_len"), _text(item.get("root")))
        for item in listed
        if isinstance(item, dict) and "id" in item
    )


def completion_token(choice: Mapping[str, Any]) -> str:
    """The text of a completion's choice, streamed or not."""
    return _text(choice.get("text"))


def message_text(choice: Mapping[str, Any]) -> str:
    """The text of a chat's choice; a model may answer with no content at all."""
    return _spoken(_mapping(choice.get("message")))


def delta_text(choice: Mapping[str, Any]) -> str:
    """The text that an event adds to a streamed chat."""
    return _spoken(_mapping(choice.get("delta")))


def _spoken(message: Mapping[str, Any]) -> str:
    """What was thought, where the server tells that apart, and what was answered."""
    thought = message.get("reasoning") or message.get("reasoning_content")
    return _text(thought) + _text(message.get("content"))


def json_object(text: str) -> Mapping[str, Any]:
    """Parse one JSON object. Raises EndpointError ("invalid") where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise invalid("a JSON object was wanted, but this came", text)
    return value


def first_choice(value: Mapping[str, Any], *, required: bool = True) -> Mapping[str, Any]:
    """The first of `choices`; where none is `required`, an empty mapping stands for it."""
    choices = value.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return _answering(choices[0])
    if required:
        raise invalid("the answer holds no `choices`")
    return {}


def _answering(choice: Mapping[str, Any]) -> Mapping[str, Any]:
    """`choice`, if it is the first one and speaks as the assistant."""
    if choice.get("index", 0) != 0:
        raise invalid(f"the only choice has the index {choice['index']!r}, not 0")
    for part in ("message", "delta"):
        role = _mapping(choice.get(part)).get("role")
        if role not in (None, "assistant"):
            raise invalid(f"the answer speaks as {role!r}, not as the assistant")
    return choice


def usage(value: Mapping[str, Any]) -> Usage:
    """The counts that the server sent."""
    counted = _mapping(value.get("usage"))
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return Usage(*(_count(counted, name) for name in names))


def token_margins(choice: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """Each token's text and how far it stood above the second best, in nats.

    From a completion's or a chat's `logprobs` with the best two; empty where there are none.
    """
    found = _mapping(choice.get("logprobs"))
    if isinstance(chat := found.get("content"), list):
        entries = [
            (_text(one.get("token")), one.get("top_logprobs")) for one in map(_mapping, chat)
        ]
        return tuple((text, _margin(_logprobs_of(best))) for text, best in entries)
    tokens, best = found.get("tokens"), found.get("top_logprobs")
    if not isinstance(tokens, list) or not isinstance(best, list):
        return ()
    pairs = zip(tokens, best, strict=False)
    return tuple((_text(text), _margin(list(_mapping(one).values()))) for text, one in pairs)


def _logprobs_of(best: Any) -> list[Any]:
    return [_mapping(one).get("logprob") for one in best] if isinstance(best, list) else []


def _margin(logprobs: Sequence[Any]) -> float:
    best = sorted((number for number in logprobs if isinstance(number, float)), reverse=True)
    return best[0] - best[1] if len(best) > 1 else 0.0


def token_count(value: Mapping[str, Any]) -> int | None:
    """The count that `/tokenize` answers, where it does."""
    return _count(value, "count")


def server_message(value: Mapping[str, Any]) -> str:
    """The server's own words: `error` holds them, or an object that does (vLLM knows both)."""
    error = value.get("error", value.get("detail", ""))
    return shorten(str(error.get("message", "")) if isinstance(error, dict) else str(error))


def invalid(what: str, found: str = "") -> EndpointError:
    """An answer that can't be read; `found` is shown, shortened."""
    shown = f": {shorten(found, 80)!r}" if found else ""
    return EndpointError(
        f"{what}{shown}",
        kind="invalid",
        hint="is this an OpenAI-compatible endpoint? The URL wanted is the server's own, "
        "such as http://127.0.0.1:8000",
    )


def shorten(text: str, limit: int = MESSAGE_CHARS) -> str:
    """One line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _finish_reason(choice: Mapping[str, Any]) -> str | None:
    reason = choice.get("finish_reason")
    return reason if isinstance(reason, str) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Mapping[str, Any], name: str) -> int | None:
    number = value.get(name)
    return number if isinstance(number, int) and not isinstance(number, bool) else None
