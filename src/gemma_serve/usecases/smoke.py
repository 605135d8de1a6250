"""The smoke test: does a running endpoint keep its promises?

The checks run one after another; a check whose precondition failed is skipped with the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from time import perf_counter

from gemma_serve.adapters.openai_api import Endpoint, EndpointError
from gemma_serve.adapters.package_data import data_path
from gemma_serve.planning.smoke import (
    NEEDS,
    NEEDS_ONE_OF,
    PROMISES,
    Answers,
    CheckResult,
    SmokeReport,
    parse_answers,
    questions,
    with_needs,
)
from gemma_serve.usecases.smoke_checks import CHECKS
from gemma_serve.usecases.smoke_session import Outcome, Session

__all__ = ["TIMEOUT_S", "CheckResult", "SmokeReport", "run_smoke"]

TIMEOUT_S = 120.0


def run_smoke(
    *,
    url: str,
    model: str | None = None,
    api_key: str | None = None,
    answers: Answers | None = None,
    timeout_s: float = TIMEOUT_S,
    only: Collection[str] = tuple(PROMISES),
    on_event: Callable[[CheckResult], None],
) -> SmokeReport:
    """Try every promise of the endpoint at `url` and report each as it is settled.

    `url` is as `endpoint_url` returns it. With no `model`, the first that the server lists is
    asked. With `answers`, or if the model is the demo, the answers must be those; of any other
    model they must be language. Each request ends within `timeout_s` seconds. `only` these checks
    are run, and those that they need. Runs an event loop of its own, so it may be called from
    any thread that has none.
    """
    asked = answers or parse_answers(data_path("answers.json").read_text(encoding="utf-8"))

    async def test() -> SmokeReport:
        async with Endpoint(url, api_key=api_key, timeout_s=timeout_s) as endpoint:
            known = questions(asked, known=answers is not None)
            session = Session(endpoint, model, asked, known, model or "")
            checks = await _settle_all(with_needs(only), session, on_event)
            return SmokeReport(url, session.model, checks)

    return asyncio.run(test())


async def _settle_all(
    ids: Sequence[str], session: Session, on_event: Callable[[CheckResult], None]
) -> tuple[CheckResult, ...]:
    results: dict[str, CheckResult] = {}
    for id in ids:
        session.can_chat = _passed(results, "chat")
        results[id] = await _settle(id, session, results)
        on_event(results[id])
    return tuple(results.values())


async def _settle(id: str, session: Session, results: Mapping[str, CheckResult]) -> CheckResult:
    if reason := _unmet(id, session, results):
        return CheckResult(id, PROMISES[id], "skipped", reason)
    started_at = perf_counter()
    try:
        outcome = await CHECKS[id](session)
    except EndpointError as error:
        if error.kind == "unreachable":
            session.lost_at = id
        outcome = Outcome.failed(str(error), error.problems[0].hint)
    return CheckResult(
        id,
        PROMISES[id],
        outcome.status,
        outcome.reason,
        outcome.figures,
        outcome.hint,
        round(perf_counter() - started_at, 4),
    )


def _unmet(id: str, session: Session, results: Mapping[str, CheckResult]) -> str:
    """Why this check can't be tried; empty where it can."""
    for need in NEEDS[id]:
        result = results[need]
        if result.status == "skipped":
            return result.reason
        if result.status == "failed":
            return f"`{need}` failed"
    if session.lost_at:
        return f"the endpoint could not be reached any more since `{session.lost_at}`"
    either = NEEDS_ONE_OF.get(id, ())
    if either and not any(_passed(results, need) for need in either):
        return "none passed of " + ", ".join(f"`{need}`" for need in either)
    return ""


def _passed(results: Mapping[str, CheckResult], id: str) -> bool:
    return id in results and results[id].status == "passed"
