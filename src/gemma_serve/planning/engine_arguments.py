"""Which of vLLM's arguments its parser would refuse, given the flags that it knows. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from gemma_serve.errors import Problem
from gemma_serve.planning.settings import SETTINGS

# What newer Pythons take for a negative number; older ones take less.
_NUMBER = re.compile(r"-\.?\d")
# How much two names must have in common for one to be a slip for the other (difflib's ratio).
_ALIKE = 0.75
# What turns the meaning of the rest around.
_SENSES = ("enable-", "disable-", "no-")


def unknown_flags(args: Sequence[str], known: frozenset[str]) -> tuple[str, ...]:
    """The flags of `args` that the engine refuses as unrecognized or ambiguous, as they are given.

    vLLM's parser takes underscores for dashes, parts of an object (`--NAME.KEY VALUE`),
    beginnings that fit one flag only, and `-O3`. Where releases of Python or vLLM differ, a flag
    that any of them takes is not refused. Values and positional arguments are not judged.

    Args:
        args: the arguments, without the program.
        known: every flag with its dashes, `--no-NAME` among them.
    """
    refused = (name for name, arg in _flags(args) if _is_refused(name, arg, known))
    return tuple(dict.fromkeys(refused))


def unknown_flag_problem(
    args: Sequence[str], known: frozenset[str], version: str | None
) -> Problem | None:
    """Why the engine would not take `args`; the arguments are those of `unknown_flags`."""
    refused = unknown_flags(args, known)
    if not refused:
        return None
    listed = " and ".join(f"`{flag}`" for flag in refused)
    closest = closest_flags(refused[0], known)
    meant = [f"`{flag}`" for flag in closest]
    asked = f"did you mean {' or '.join(meant)}? else " if meant else ""
    return Problem(
        "flag-unknown",
        f"vLLM {version or 'here'} has no {listed}",
        f"{asked}leave out the `--engine-arg` that gives `{refused[0]}`{_as_ours(closest)}",
    )


def _as_ours(flags: Sequence[str]) -> str:
    """That the flag which was meant is one of ours, and is given without `--engine-arg`."""
    ours = {setting.flag for setting in SETTINGS}
    own = [flag for flag in flags[:1] if flag in ours]
    return f"; `{own[0]}` is given without `--engine-arg`" if own else ""


def closest_flags(flag: str, known: frozenset[str]) -> tuple[str, ...]:
    """At most two flags that may have been meant by one that is refused, the likeliest first.

    None of them has the opposite sense, as `--enable-NAME` has of `--disable-NAME`.
    """
    name = _dashed(flag).lstrip("-")
    if f"-{name}" in known:
        return (f"-{name}",)
    senses = ("", _sense(name) or "enable-")
    names = [other[2:] for other in sorted(known) if other.startswith("--")]
    names = [other for other in names if _sense(other) in senses]
    longer = sorted((other for other in names if other.startswith(name)), key=len)
    alike = longer or difflib.get_close_matches(name, names, n=2, cutoff=_ALIKE)
    return tuple(f"--{other}" for other in alike[:2])


def _sense(name: str) -> str:
    return next((sense for sense in _SENSES if name.startswith(sense)), "")


def _flags(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each flag's name, as it is given, and the argument that argparse sees in its place."""
    rest = iter(args)
    for arg in rest:
        if arg == "--":
            return
        name, equals, _ = arg.partition("=")
        if not name.startswith("-"):
            continue
        if "." not in name:
            yield name, arg
            continue
        # A part of an object: the value is taken as it is, even one that looks like a flag.
        if not equals:
            next(rest, None)
        name = name.partition(".")[0]
        yield name, name


def _is_refused(name: str, arg: str, known: frozenset[str]) -> bool:
    """As argparse decides: exact, then the beginning of exactly one, then a value after all."""
    flag = _dashed(name)
    if flag in known or flag in ("-", "--") or flag.startswith("-O") or _NUMBER.match(arg):
        return False
    counts = {_count(flag, flag, known), _count(flag, arg, known)}
    if 1 in counts:
        return False
    return counts != {0} or " " not in arg


def _count(flag: str, beginning: str, known: frozenset[str]) -> int:
    """How many flags `beginning` fits; Python 3.11 keeps the value in it if one dash is there."""
    if flag.startswith("--"):
        return sum(other.startswith(flag) for other in known)
    # `-q8` is `-q 8`; `-h` takes no value.
    short = flag[:2] if flag[:2] != "-h" else None
    return sum(other == short or other.startswith(beginning) for other in known)


def _dashed(name: str) -> str:
    return name.replace("_", "-") if name.startswith("--") else name
