"""The failures that are known: how each shows in a log, what it means, and what mends it.

The catalogue is data (`data/failures.yaml`, where its schema stands); this is its shape, and how
its words are filled with the numbers that a log or a check found.
"""

from __future__ import annotations

import math
import re
import shlex
import signal
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gemma_serve.errors import Problem

Kind = Literal["start", "death", "request"]
Rank = Literal["cause", "symptom", "notice", "wrapper"]
Remedy = Literal[
    "shorten-context",
    "another-port",
    "purge-compile-cache",
    "wait-for-memory",
    "longer-ready-timeout",
]
Numbers = Mapping[str, str]

# What stands in a command for a model that nobody has named.
_SOME_MODEL = "MODEL"


@dataclass(frozen=True)
class MessagePart:
    """A stable part of a message, without its whitespace.

    `near` must stand close to it and `without` must not, both without whitespace. A `cause` is
    one; behind a `symptom` there may be a deeper one; a `notice` also stands in a healthy log;
    a `wrapper` only says that something else went wrong. A notice that a log ends with is a cause
    once it was printed `times` times.
    """

    text: str
    rank: Rank = "cause"
    near: str | None = None
    without: str | None = None
    times: int | None = None


@dataclass(frozen=True)
class Change:
    """A fix as settings of ours (by field name) and variables for the engine."""

    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Explained:
    """A failure in words, with what was found filled in; `change` is None where none is certain."""

    cause: str
    fix: str
    command: str
    change: Change | None


@dataclass(frozen=True)
class Failure:
    """One entry of the catalogue.

    `causes`, `fixes` and `commands` are templates, the most exact first. `numbers` are regular
    expressions with named groups, in which a space stands for any whitespace or none. Where one
    of `yields_to` is found in the same log, that one is the cause.
    """

    id: str
    title: str
    kind: Kind
    severity: str
    parts: tuple[MessagePart, ...]
    causes: tuple[str, ...]
    fixes: tuple[str, ...]
    commands: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    derive: tuple[str, ...] = ()
    change: Change | None = None
    remedy: Remedy | None = None
    yields_to: tuple[str, ...] = ()
    versions: str = ""
    references: tuple[str, ...] = ()

    def find_numbers(self, passage: str) -> dict[str, str]:
        """What `passage` tells, also where its lines were wrapped."""
        found: dict[str, str] = {}
        squeezed = without_whitespace(passage)
        for pattern in self.numbers:
            match = re.search(pattern.replace(" ", r"\s*"), passage)
            # A wrap within a word, or a number.
            match = match or re.search(pattern.replace(" ", ""), squeezed)
            for name, value in (match.groupdict() if match else {}).items():
                if value is not None:
                    found.setdefault(name, _plain(" ".join(value.split())))
        return found

    def with_derived(self, numbers: Numbers) -> dict[str, str]:
        """`numbers`, and what can be computed from them."""
        found = dict(numbers)
        for name in self.derive:
            value = _DERIVED[name](found)
            if value is not None:
                found[name] = value
        return found

    def explain(self, numbers: Numbers) -> Explained:
        """Its words with `numbers` in them; `model` is one of them."""
        return Explained(
            cause=_fill_first(self.causes, numbers),
            fix=_fill_first(self.fixes, numbers),
            command=_fill_first(
                self.commands,
                {name: shlex.quote(v) for name, v in {"model": _SOME_MODEL, **numbers}.items()},
            ),
            change=None if self.change is None else _fill_change(self.change, numbers),
        )

    def problem(self, numbers: Numbers, *, blocking: bool = True) -> Problem:
        """The failure as a problem that keeps a start from being tried."""
        words = self.explain(self.with_derived(numbers))
        return Problem(self.id, words.cause, words.fix, blocking=blocking)


class FailureCatalogue:
    """All failures, by their ids."""

    def __init__(self, failures: Sequence[Failure]) -> None:
        self.failures = tuple(failures)
        self._by_id = {failure.id: failure for failure in failures}

    def __getitem__(self, id_: str) -> Failure:
        return self._by_id[id_]

    def __contains__(self, id_: object) -> bool:
        return id_ in self._by_id

    def titled(self, problem: Problem) -> Problem:
        """The problem with its failure's title in front, unless it says that already."""
        failure = self._by_id.get(problem.code)
        if failure is None or failure.title in problem.message:
            return problem
        return replace(problem, message=f"{failure.title}: {problem.message}")


def parse_failures(data: Mapping[str, Any]) -> FailureCatalogue:
    """The catalogue from its YAML.

    Raises:
        KeyError, TypeError, ValueError: it is not as its schema says.
    """
    failures = [_read_failure(entry) for entry in data["failures"]]
    names = [failure.id for failure in failures]
    if len(set(names)) < len(names):
        raise ValueError("an id stands twice")
    for failure in failures:
        if unknown := set(failure.yields_to) - set(names):
            raise ValueError(f"{failure.id} yields to {', '.join(sorted(unknown))}, which is none")
    return FailureCatalogue(failures)


def without_whitespace(text: str) -> str:
    """The text as the catalogue matches it: a line that was wrapped still has its message."""
    return "".join(text.split())


def _read_failure(entry: Mapping[str, Any]) -> Failure:
    unknown = entry.keys() - _KEYS
    if unknown:
        raise ValueError(f"{entry['id']}: unknown keys {', '.join(sorted(unknown))}")
    derive = tuple(entry.get("derive", ()))
    for name in derive:
        _DERIVED[name]
    return Failure(
        id=entry["id"],
        title=entry["title"],
        kind=entry["kind"],
        severity=entry["severity"],
        parts=tuple(_read_part(part) for part in entry.get("match", ())),
        causes=_templates(entry["cause"]),
        fixes=_templates(entry["fix"]),
        commands=_templates(entry.get("command", ())),
        numbers=tuple(entry.get("numbers", ())),
        derive=derive,
        change=_read_change(entry["change"]) if "change" in entry else None,
        remedy=entry.get("auto"),
        yields_to=tuple(entry.get("yields_to", ())),
        versions=str(entry.get("versions", "")),
        references=tuple(entry.get("references", ())),
    )


_KEYS = frozenset(
    {"id", "title", "kind", "severity", "versions", "references", "match", "numbers", "derive",
     "cause", "fix", "command", "change", "auto", "yields_to"}
)  # fmt: skip


def _read_part(part: str | Mapping[str, Any]) -> MessagePart:
    if isinstance(part, str):
        return MessagePart(without_whitespace(part))
    rank: Rank = part.get("rank", "cause")
    near, without = part.get("with"), part.get("without")
    return MessagePart(
        without_whitespace(part["text"]),
        rank,
        None if near is None else without_whitespace(near),
        None if without is None else without_whitespace(without),
        part.get("times"),
    )


def _read_change(entry: Mapping[str, Any]) -> Change:
    settings = {name: str(value) for name, value in entry.items() if name != "env"}
    return Change(settings, {name: str(value) for name, value in entry.get("env", {}).items()})


def _templates(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _plain(value: str) -> str:
    """A number without the commas between its thousands; any other text as it is."""
    return value.replace(",", "") if re.fullmatch(r"\d{1,3}(,\d{3})+", value) else value


def _fill_first(templates: Sequence[str], numbers: Numbers) -> str:
    """The first of `templates` whose fields are all known; the last one needs none."""
    return next((said for t in templates if (said := _fill(t, numbers)) is not None), "")


def _fill(template: str, numbers: Numbers) -> str | None:
    fields = {name for _, name, _, _ in string.Formatter().parse(template) if name}
    return template.format_map(numbers) if fields <= numbers.keys() else None


def _fill_change(change: Change, numbers: Numbers) -> Change | None:
    settings = {name: _fill(value, numbers) for name, value in change.settings.items()}
    environment = {name: _fill(value, numbers) for name, value in change.environment.items()}
    known = {name: value for name, value in settings.items() if value is not None}
    known_env = {name: value for name, value in environment.items() if value is not None}
    if len(known) < len(settings) or len(known_env) < len(environment):
        return None
    return Change(known, known_env)


def _legal_tensor_parallel_size(numbers: Numbers) -> str | None:
    """The largest size below the one that was wanted which divides the heads."""
    heads, wanted = _integer(numbers, "heads"), _integer(numbers, "tensor_parallel_size")
    if heads is None or wanted is None or heads < 1:
        return None
    return str(next((n for n in range(wanted - 1, 1, -1) if heads % n == 0), 1))


# With less of a card no Gemma is served; then only ending who holds it helps.
_LEAST_SHARE = 0.2


def _fitting_utilization(numbers: Numbers) -> str | None:
    """What is free as a share of the whole, less a margin for what the driver takes meanwhile."""
    try:
        free, total = float(numbers["free_gib"]), float(numbers["total_gib"])
    except (KeyError, ValueError):
        return None
    share = math.floor((free / total - 0.02) * 100) / 100 if total > 0 else 0.0
    return f"{share:g}" if share >= _LEAST_SHARE else None


def _cuda_version(numbers: Numbers) -> str | None:
    """The driver's number as people write it: 12080 is CUDA 12.8."""
    number = _integer(numbers, "cuda_number")
    return None if number is None else f"{number // 1000}.{number % 1000 // 10}"


def _doubled_timeout_s(numbers: Numbers) -> str | None:
    timeout_s = _integer(numbers, "timeout_s")
    return None if timeout_s is None else str(max(2 * timeout_s, 1200))


def _needed_power_of_two(numbers: Numbers) -> str | None:
    needed = _integer(numbers, "needed_batched_tokens")
    return None if needed is None else str(1 << max(0, needed - 1).bit_length())


def _signal_name(numbers: Numbers) -> str | None:
    number = _integer(numbers, "signal")
    try:
        return None if number is None else signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _signal_meaning(numbers: Numbers) -> str | None:
    number = _integer(numbers, "signal")
    if number is None:
        return None
    if number == signal.SIGKILL:
        return "somebody sent that, or the system for want of memory"
    crashed = number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL)
    return "it crashed" if crashed else "somebody sent that"


def _integer(numbers: Numbers, name: str) -> int | None:
    try:
        return int(numbers[name])
    except (KeyError, ValueError):
        return None


_DERIVED: Mapping[str, Callable[[Numbers], str | None]] = {
    "legal_tensor_parallel_size": _legal_tensor_parallel_size,
    "fitting_utilization": _fitting_utilization,
    "cuda_version": _cuda_version,
    "doubled_timeout_s": _doubled_timeout_s,
    "needed_power_of_two": _needed_power_of_two,
    "signal_name": _signal_name,
    "signal_meaning": _signal_meaning,
}
