"""The smoke test: does a running endpoint keep its promises?

The checks run one after another; a check whose precondition failed is skipped with the reason.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from gemma_serve.adapters.openai_api import Endpoint, EndpointError
from gemma_serve.adapters.package_data import data_path
from gemma_serve.planning.smoke.promises import PROMISES, with_needs
from gemma_serve.planning.smoke.questions import Answers, parse_answers, questions
from gemma_serve.planning.smoke.report import CheckResult, SmokeReport
from gemma_serve.usecases.smoke.checks import CHECKS
from gemma_serve.usecases.smoke.session import Outcome, Session, SmokeOptions

DEFAULT_OPTIONS = SmokeOptions()
_PROBE_S = 10.0
_SLOW = "the engine may hang (see its log), or be slow: allow more with --check-timeout"


def run_smoke(
    *,
    url: str,
    model: str | None = None,
    api_key: str | None = None,
    answers: Answers | None = None,
    options: SmokeOptions = DEFAULT_OPTIONS,
    only: Collection[str] = tuple(PROMISES),
    on_event: Callable[[CheckResult], None],
    on_begin: Callable[[str], None] = lambda id: None,
) -> SmokeReport:
    """Try every promise of the endpoint at `url` and report each as it is settled.

    `url` is as `endpoint_url` returns it. With no `model`, the first that the server lists is
    asked. With `answers`, or if the model is the demo, the answers must be those; of any other
    model they must be language. `only` these checks are run, and those that they need; the id of
    each is given to `on_begin` before it is tried. Runs an event loop of its own, so it may be
    called from any thread that has none.
    """
    asked = answers or parse_answers(data_path("answers.json").read_text(encoding="utf-8"))
    known = questions(asked, known=answers is not None)

    async def test() -> SmokeReport:
        begun_at, deadline = time.time(), perf_counter() + options.timeout_s
        # Each check has its own limit, which is to come first.
        timeout_s = options.check_timeout_s + 1.0
        async with Endpoint(url, api_key=api_key, timeout_s=timeout_s) as endpoint:
            session = Session(endpoint, url, api_key, model, asked, known, options, model or "")
            run = _Run(session, deadline, on_event, on_begin)
            checks = await run.settle_all(with_needs(only))
        return SmokeReport(
            url,
            session.model,
            checks,
            started_at=begun_at,
            duration_s=round(perf_counter() - (deadline - options.timeout_s), 4),
            engine_version=session.engine_version,
        )

    return asyncio.run(test())


@dataclass
class _Run:
    """The checks of one run, one after another, until `deadline` on perf_counter()'s clock."""

    session: Session
    deadline: float
    on_event: Callable[[CheckResult], None]
    on_begin: Callable[[str], None]

    async def settle_all(self, ids: Sequence[str]) -> tuple[CheckResult, ...]:
        results: dict[str, CheckResult] = {}
        for id in ids:
            self.on_begin(id)
            results[id] = await self._settle(id, results)
            if results[id].status == "passed":
                self.session.passed.add(id)
            self.on_event(results[id])
        return tuple(results.values())

    async def _settle(self, id: str, results: Mapping[str, CheckResult]) -> CheckResult:
        started_at = perf_counter()
        reason = _unmet(id, self.session, results)
        outcome = Outcome.skipped(reason) if reason else await self._try(id)
        # What an earlier check keeps from being tried has failed there.
        tried = not reason or id in self.session.options.left_out
        if outcome.status == "skipped" and tried and id in self.session.options.required:
            said = f"it is required, but was skipped: {outcome.reason}"
            outcome = replace(outcome, status="failed", reason=said)
        return CheckResult(
            id,
            PROMISES[id].text,
            outcome.status,
            _without(outcome.reason, self.session.api_key),
            _without(outcome.figures, self.session.api_key),
            outcome.hint,
            round(perf_counter() - started_at, 4),
        )

    async def _try(self, id: str) -> Outcome:
        session = self.session
        left_s = self.deadline - perf_counter()
        if left_s <= 0:
            return self._out_of_time()
        limit_s = min(left_s, session.options.check_timeout_s)
        try:
            async with asyncio.timeout(limit_s):
                return await CHECKS[id](session)
        except TimeoutError:
            if left_s <= session.options.check_timeout_s:
                return self._out_of_time()
            await self._probe(id)
            return Outcome.failed(f"it was not over within {limit_s:g} s", _SLOW)
        except EndpointError as error:
            if error.kind == "unreachable":
                lost = f"the endpoint could not be reached any more since `{id}`"
                session.closed = f"`{id}` failed" if id == "reachable" else lost
            if error.kind == "timeout":
                await self._probe(id)
            return Outcome.failed(str(error), error.problems[0].hint)

    def _out_of_time(self) -> Outcome:
        total_s = self.session.options.timeout_s
        self.session.closed = f"the {total_s:g} s for the whole test were over"
        return Outcome.failed(self.session.closed, "allow more with --timeout")

    async def _probe(self, id: str) -> None:
        """After a time-out: whether the engine answers at all, so that not each check waits."""
        session = self.session
        try:
            async with asyncio.timeout(min(_PROBE_S, session.options.check_timeout_s)):
                await session.lives_on()
        except (TimeoutError, EndpointError):
            session.closed = f"the endpoint stopped answering in `{id}`"


def _without(value: Any, secret: str | None) -> Any:
    """`value` with `secret` struck out of every text in it: a server may say what it was sent."""
    if not secret:
        return value
    if isinstance(value, str):
        return value.replace(secret, "***")
    if isinstance(value, Mapping):
        return {name: _without(one, secret) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without(one, secret) for one in value]
    return value


def _unmet(id: str, session: Session, results: Mapping[str, CheckResult]) -> str:
    """Why this check can't be tried; empty where it can."""
    if id in session.options.left_out:
        return "left out by --skip"
    if session.closed:
        return session.closed
    promise = PROMISES[id]
    for need in promise.needs:
        result = results[need]
        if result.status == "skipped":
            left_out = need in session.options.left_out
            return f"it needs `{need}`, which was left out" if left_out else result.reason
        if result.status == "failed":
            return f"`{need}` failed"
    for before in promise.pointless_after:
        if before in results and results[before].status == "failed":
            return f"`{before}` failed"
    either = promise.needs_one_of
    if either and not any(need in session.passed for need in either):
        return "none passed of " + ", ".join(f"`{need}`" for need in either)
    return ""
