"""Which checks are tried: from ids as they were typed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from gemma_serve.errors import UsageError
from gemma_serve.planning.smoke.promises import PROMISES, needed_in_any_case

_LIMIT_OPTIONS = {"first-token": "--max-ttft", "throughput": "--min-tokens-per-second"}


@dataclass(frozen=True)
class Choice:
    """The checks to try, those among them that may not be skipped, and those to leave out."""

    ids: tuple[str, ...]
    required: frozenset[str]
    left_out: frozenset[str]


def choose(
    *,
    only: Sequence[str] | None,
    skip: Sequence[str] | None,
    require: Sequence[str] | None,
    limits: Mapping[str, float | None],
) -> Choice:
    """The choice that was typed; each text may hold several ids with commas between them.

    `limits` are those of the checks that need one, None where none was given. One that is given
    is judged, whatever else is chosen.

    Raises:
        UsageError: an id is no check's, or the choice contradicts itself or leaves nothing.
    """
    chosen, left_out = _known_ids("--only", only), _known_ids("--skip", skip)
    required = _known_ids("--require", require)
    limited = tuple(id for id, limit in limits.items() if limit is not None)
    wanted = (*chosen, *required, *limited)
    _refuse_contradictions(wanted, left_out, limits)
    ids = wanted if chosen else tuple(PROMISES)
    return Choice(ids, frozenset(required), frozenset(left_out))


def _known_ids(option: str, given: Sequence[str] | None) -> tuple[str, ...]:
    ids = [id.strip() for text in given or () for id in text.split(",") if id.strip()]
    for id in ids:
        if id not in PROMISES:
            close = get_close_matches(id, PROMISES, 1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise UsageError(
                f"{option} {id}: there is no such check",
                code="usage",
                hint=f"{meant}the checks are {', '.join(PROMISES)}",
            )
    if given and not ids:
        raise UsageError(f"{option} names no check", code="usage", hint="such as --only chat")
    return tuple(ids)


def _refuse_contradictions(
    wanted: Collection[str], left_out: Collection[str], limits: Mapping[str, float | None]
) -> None:
    needed = needed_in_any_case({*wanted, "completion"})  # without these nothing is left
    for id in left_out:
        if id in wanted or id in needed:
            what = "it is to be tried" if id in wanted else "what is to be tried needs it"
            raise UsageError(f"--skip {id}: {what}", code="usage", hint="leave one of them out")
    for id, limit in limits.items():
        if id in wanted and limit is None:
            hint = f"give {_LIMIT_OPTIONS[id]}"
            raise UsageError(f"{id} has no limit to test", code="usage", hint=hint)
