"""Times for people."""

from __future__ import annotations


def age_text(seconds: float) -> str:
    """How long, in the largest unit that is full: "12 s", "3 min", "5 h", "2 days"."""
    seconds = max(0.0, seconds)
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
