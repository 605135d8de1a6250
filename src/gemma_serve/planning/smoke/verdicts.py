"""What the verdicts on an answer share: each is None, or the fault that was found.

Speed is never a fault by itself. What counts is the text, the counts, and what came while what
else ran.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from gemma_serve.planning.smoke.questions import Question

LOGS = "the engine's log may say why; `gemma-serve logs` shows that of a deployment here"
GARBAGE = (
    "the weights or their type are wrong: Gemma 2 and later break in float16, "
    "serve them with `--dtype bfloat16`"
)
PROXY = "look at what stands between: a proxy or gateway may rewrite what passes"


@dataclass(frozen=True)
class Fault:
    """Why a promise counts as broken, and what to do about it.

    `texts` are two answers that should be one and part in their middle, where that is all.
    """

    reason: str
    hint: str = ""
    texts: tuple[str, str] | None = None


class Reply(Protocol):
    """What the verdicts look at in an answer."""

    @property
    def text(self) -> str: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def prompt_tokens(self) -> int | None: ...
    @property
    def completion_tokens(self) -> int | None: ...
    @property
    def total_tokens(self) -> int | None: ...
    @property
    def model(self) -> str: ...


class StreamedReply(Reply, Protocol):
    """An answer in events. Times are seconds since `started_at`, on a clock that all share."""

    @property
    def started_at(self) -> float: ...
    @property
    def duration_s(self) -> float: ...
    @property
    def token_times_s(self) -> tuple[float, ...]: ...
    @property
    def events(self) -> int: ...
    @property
    def done(self) -> bool: ...
    @property
    def out_of_order(self) -> str: ...
    @property
    def content_type(self) -> str: ...


def judge_models(served: Collection[str], wanted: str | None) -> Fault | None:
    """Some model is listed, and the wanted one if one is."""
    if not served:
        return Fault("the endpoint lists no model", LOGS)
    if wanted is not None and wanted not in served:
        names = ", ".join(served)
        return Fault(
            f"{wanted!r} is not served here, but {names}", f"use `--model {_first(served)}`"
        )
    return None


def judge_model(reply: Reply, names: Collection[str]) -> Fault | None:
    """The model that was asked answered: `names` are all that it goes by."""
    if reply.model in names:
        return None
    asked = " or ".join(map(repr, names))
    said = f"{reply.model!r} answered" if reply.model else "the answer names no model"
    return Fault(f"{said}, where {asked} was asked", PROXY)


def judge_finish(reply: Reply) -> Fault | None:
    """The answer says why it ended."""
    if reply.finish_reason in ("stop", "length"):
        return None
    return Fault(f"finish_reason is {reply.finish_reason!r}, not 'stop' or 'length'", LOGS)


def judge_known(reply: Reply, question: Question, *, open_ended: bool = False) -> Fault | None:
    """The answer is right, where that is known.

    An `open_ended` answer goes on after its end (`ignore_eos`), so it must only begin right.
    """
    if question.holds and question.holds.lower() not in reply.text.lower():
        said = f"to {question.prompt!r} it says {head(reply.text)!r}"
        hint = f"another model may be served under this name, or {GARBAGE}"
        return Fault(f"{said}, without {question.holds!r}", hint)
    known = question.known
    if known is None or reply.text == known:
        return None
    cut_short = reply.finish_reason == "length" and known.startswith(reply.text) and reply.text
    if cut_short or (open_ended and reply.text.startswith(known)):
        return None
    found, wanted = where_they_part(reply.text, known)
    return Fault(f"to {question.prompt!r} it reads {found!r} where {wanted!r} is right", LOGS)


def where_they_part(found: str, wanted: str) -> tuple[str, str]:
    """Both texts from a little before their first difference."""
    start = max(0, common_length(found, wanted) - 12)
    return head(found[start:]), head(wanted[start:])


def parting(found: str, wanted: str) -> tuple[str, str] | None:
    """Both texts, if they part before either ends: one that only breaks off is another fault."""
    at = common_length(found, wanted)
    return (found, wanted) if at < min(len(found), len(wanted)) else None


def common_length(first: str, second: str) -> int:
    """How many characters both begin with."""
    pairs = zip(first, second, strict=False)
    shorter = min(len(first), len(second))
    return next((index for index, (a, b) in enumerate(pairs) if a != b), shorter)


def head(text: str) -> str:
    """The beginning of `text`, as a message quotes it."""
    return text if len(text) <= 40 else text[:39] + "…"


def _first(names: Collection[str]) -> str:
    return next(iter(names))
