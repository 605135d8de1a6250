"""What the smoke test measured, in words, and text that came from a server, made harmless."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemma_serve.planning.smoke.report import CheckResult

Figures = Mapping[str, Any]

# Everything that XML 1.0 can't hold, even escaped; lone surrogates can't be written as UTF-8.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

# No time or count of a smoke test is; from here on, sums and words would overflow.
_TOO_MUCH = 1e12


def legal_text(text: str) -> str:
    """`text` with U+FFFD for each character that XML 1.0 forbids or advises against."""
    return _FORBIDDEN.sub("\ufffd", text)


def one_line(text: str, longest: int) -> str:
    """`text` on one line of at most `longest` characters, without a terminal's control codes."""
    joined = " ".join(text.split())
    shown = "".join(char if char.isprintable() else "\ufffd" for char in joined)
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def number(value: object) -> float | None:
    """`value` if it is a finite number of less than 1e12, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < _TOO_MUCH else None  # false for NaN, too


def texts(value: object) -> tuple[str, ...]:
    """The strings of a list, as which a figure may not have come."""
    return tuple(v for v in value if isinstance(v, str)) if isinstance(value, list | tuple) else ()


def exchanges(figures: Figures, key: str = "answers") -> tuple[Figures, ...]:
    """The streams of a check that asked several at a time."""
    several = figures.get(key)
    if not isinstance(several, Sequence):
        return ()
    return tuple(one for one in several if isinstance(one, Mapping))


def seconds(value: float) -> str:
    """A time with about two digits that count: "0.012 s", "0.53 s", "5.5 s", "120 s"."""
    if value == 0:
        return "0 s"
    if abs(value) >= 1e6:
        return f"{value:.1e} s"
    digits = 3 if value < 0.1 else 2 if value < 1 else 1 if value < 100 else 0
    return f"{value:.{digits}f} s"


def seen(check: CheckResult) -> tuple[str, ...]:
    """What was measured, as short phrases that are true of a kept and of a broken promise."""
    parts = (write(check.figures) for write in _PHRASES.get(check.id, _ANSWER))
    return tuple(part for part in parts if part)


def _version(figures: Figures) -> str:
    return f"version {figures['version']}" if figures.get("version") else ""


def _status(figures: Figures) -> str:
    found = figures.get("status")
    statuses = [number(one) for one in (found if isinstance(found, list | tuple) else [found])]
    known = list(dict.fromkeys(status for status in statuses if status is not None))
    if not known:
        return ""
    verb = "refused" if min(known) >= 400 else "answered"
    return f"{verb} with " + ", ".join(f"{status:.0f}" for status in known)


def _refused(figures: Figures) -> str:
    return f"refused: {', '.join(found)}" if (found := texts(figures.get("refused"))) else ""


def _unauthorized(figures: Figures) -> str:
    count = len(texts(figures.get("refused")))
    return f"{_counted(count, 'request')} refused with 401" if count else ""


def _models(figures: Figures) -> str:
    names = ", ".join(texts(figures.get("models")))
    limit = number(figures.get("max_model_len"))
    return names + (f", up to {limit:.0f} tokens" if names and limit else "")


def _stop(figures: Figures) -> str:
    return f"stop sequence {figures['stop']!r}" if figures.get("stop") else ""


def _growth(figures: Figures) -> str:
    whole, alone = number(figures.get("prompt_tokens")), number(figures.get("prompt_tokens_alone"))
    return (
        "" if whole is None or alone is None else f"{whole:.0f} prompt tokens, {alone:.0f} without"
    )


def _prompt_tokens(figures: Figures) -> str:
    return _counted(figures.get("prompt_tokens"), "prompt token")


def _tokens(figures: Figures) -> str:
    tokens = _counted(figures.get("tokens"), "token")
    events = _counted(figures.get("events"), "event")
    return f"{tokens} in {events}" if tokens and events else tokens or events


def _limit(figures: Figures) -> str:
    return f"at most {limit:g} asked for" if (limit := number(figures.get("max_tokens"))) else ""


def _total(figures: Figures) -> str:
    total = number(figures.get("total_tokens"))
    return "" if total is None else f"{total:.0f} in all"


def _read(figures: Figures) -> str:
    return f"{read} read" if (read := _counted(figures.get("answers_read"), "answer")) else ""


def _counted(value: object, what: str) -> str:
    count = number(value)
    return "" if count is None else f"{count:.0f} {what}{'' if count == 1 else 's'}"


def _pace(figures: Figures) -> str:
    pace = number(figures.get("tokens_per_second"))
    return "" if pace is None else f"{pace:.0f} tokens/s"


def _first_token(figures: Figures) -> str:
    ttft_s = number(figures.get("ttft_s"))
    return "" if ttft_s is None else f"first after {seconds(ttft_s)}"


def _stagger(figures: Figures) -> str:
    apart, overlap = number(figures.get("stagger_s")), number(figures.get("overlap_s"))
    if apart is None or overlap is None:
        return ""
    return f"{seconds(apart)} apart, {seconds(overlap)} side by side"


def _in_progress(figures: Figures) -> str:
    peak, asked = number(figures.get("in_progress_at_once")), number(figures.get("concurrency"))
    if peak is None:
        return ""
    return f"{peak:.0f}{'' if asked is None else f' of {asked:.0f}'} at once"


def _quicker(figures: Figures) -> str:
    times = number(figures.get("speedup"))
    return "" if times is None else f"{times:.1f} times as quick as one by one"


def _freed(figures: Figures) -> str:
    freed_s = number(figures.get("freed_s"))
    if freed_s is not None:
        return f"freed after {seconds(freed_s)}"
    read = _counted(figures.get("tokens_read"), "token")
    return f"left after {read}" if read else ""


def _hit(figures: Figures) -> str:
    hit, whole = number(figures.get("hit_tokens")), number(figures.get("prompt_tokens"))
    return (
        ""
        if hit is None or whole is None
        else f"{hit:.0f} of {whole:.0f} prompt tokens from the cache"
    )


def _longest_wait(figures: Figures) -> str:
    limit = number(figures.get("max_ttft_s"))
    return "" if limit is None else f"at most {limit:g} s asked for"


def _lowest_pace(figures: Figures) -> str:
    limit = number(figures.get("min_tokens_per_second"))
    return "" if limit is None else f"at least {limit:g} asked for"


_ANSWER: tuple[Callable[[Figures], str], ...] = (_tokens, _pace, _first_token)
_REFUSAL = (_status,)
_PHRASES: Mapping[str, tuple[Callable[[Figures], str], ...]] = {
    "reachable": (_version,),
    "authenticated": (_unauthorized,),
    "models": (_models,),
    "unknown-model": _REFUSAL,
    "usage": (_prompt_tokens, _tokens, _total),
    "max-tokens": (_tokens, _limit),
    "stop-sequence": (_stop, *_ANSWER),
    "chat-multi-turn": (_growth, *_ANSWER),
    "chat-system": (_growth, *_ANSWER),
    "wrong-turns": _REFUSAL,
    "prompt-too-long": _REFUSAL,
    "malformed-body": (_refused,),
    "language": (_read, _tokens),
    "known-answers": (_read, _tokens),
    "staggered": (_stagger, _pace),
    "together": (_in_progress, _quicker, _pace),
    "cancelled-stream": (_freed,),
    "prefix-cache": (_hit,),
    "first-token": (_first_token, _longest_wait),
    "throughput": (_pace, _lowest_pace),
}
