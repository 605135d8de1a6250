"""Reading one metric of a Prometheus exposition."""

from __future__ import annotations

import re


def labels_of(text: str, name: str) -> dict[str, str]:
    """The labels of the first sample of a metric."""
    line = next(line for line in text.splitlines() if line.startswith(name + "{"))
    return dict(re.findall(r'(\w+)="([^"]*)"', line))
