"""What a run of the smoke test reports: each check with its figures, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class CheckResult:
    """One promise, tested. `reason` says why it failed or was skipped.

    `figures` are what was measured: times in seconds (`_s`), counts, and the answers' texts.
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
    """Every check of one run against `model` at `url`, in order.

    `started_at` is in seconds since 1970, `duration_s` that of the whole run. `engine_version` is
    what the server calls its own version, "" where it tells none.
    """

    url: str
    model: str
    checks: tuple[CheckResult, ...]
    started_at: float = 0.0
    duration_s: float = 0.0
    engine_version: str = ""

    @property
    def ok(self) -> bool:
        """Whether the endpoint kept its promises: nothing failed, and something was shown."""
        statuses = [check.status for check in self.checks]
        return "failed" not in statuses and "passed" in statuses
