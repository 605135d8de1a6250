"""Each promise of the smoke test, broken before the real engine: the check that owns it says so."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

import breaking_proxy
from breaking_hooks import Way, listing
from breaking_proxy import BROKEN, HARMLESS, WAYS, breaking, tables
from gemma_serve.planning.smoke.promises import PROMISES
from gemma_serve.usecases.smoke.run import run_smoke
from gemma_serve.usecases.smoke.session import SmokeOptions

PAGE = Path(__file__).parent.parent / "docs" / "smoke-test.md"
# Each takes a moment, and together they break every kind of promise; the pipeline tries all.
QUICK = {
    "no-key-asked", "wrong-model", "engine-dead", "one-chunk", "lost-event", "doubled-event",
    "swapped-events", "no-done", "half-json-event", "hang-in-stream", "miscounted",
    "limit-ignored", "stop-ignored", "answers-vary", "empty", "pad", "leaked-token", "mojibake",
    "no-history", "system-refused", "turns-merged", "serial", "crossed", "dies-in-time",
    "crlf", "comments", "cut-3", "merged", "slow-start", "extra-fields",
}  # fmt: skip
# Where nothing is broken, the checks that look at the form of what comes, and the least of them.
FORM = (
    "completion-stream", "usage", "max-tokens", "stop-sequence", "utf-8", "chat-stream",
    "chat-limits", "chat-multi-turn", "chat-system", "prompt-too-long", "malformed-body",
)  # fmt: skip
LEAST_FORM = ("completion-stream", "usage", "utf-8")
# The engine batches, so that many at once take less time than one after another ...
AT_ONCE = 6
# ... but what it counts tells something of one client only where nobody else asks.
ALONE = {"keeps-reading", "no-prefix"}
# What looks as if one request waited for another, or for its end, is looked at three times.
LONGEST, LONG = {"staggered", "together"}, {"completion-stream", "chat-stream"}


class Case(NamedTuple):
    """A way, and the checks that are run through it."""

    way: Way
    checks: tuple[str, ...]
    quick: bool

    @property
    def id(self):
        return f"{self.way.name}-{'quick' if self.quick else 'proof'}"


def cases_of(way):
    """A quick way is tried with the first of its checks at once, and with the others later."""
    checks = way.owners or FORM
    if way.name not in QUICK:
        return [Case(way, checks, quick=False)]
    first, others = (checks[:1], checks[1:]) if way.owners else (LEAST_FORM, FORM)
    return [Case(way, first, quick=True), *([Case(way, others, quick=False)] if others else [])]


def parameters(ways, *, alone=False):
    marks = {True: pytest.mark.engine, False: pytest.mark.proof}
    return [
        pytest.param(case, id=case.id, marks=marks[case.quick])
        for way in ways
        if (way.name in ALONE) == alone
        for case in cases_of(way)
    ]


def with_short_sequences(way):
    """The same way before a model that says so of itself: fewer tokens are measured."""
    short = listing(lambda models: [{**one, "max_model_len": 128} for one in models]).reply
    return replace(way, make=lambda: replace(way.make(), reply=short))


def seen(engine, case):
    """What the smoke test finds where the way stands in between, by the checks' ids."""
    options = dict(case.way.options)
    named = {name: options.pop(name) for name in ("api_key", "model") if name in options}
    shorter = case.quick and not LONGEST.isdisjoint(case.checks)
    way = with_short_sequences(case.way) if shorter else case.way
    with breaking(engine.url, way, key=engine.key) as url:
        report = run_smoke(
            url=url,
            only=case.checks,
            options=SmokeOptions(**options),
            on_event=lambda result: None,
            **named,
        )
    return {check.id: check for check in report.checks}


@pytest.fixture(scope="module")
def found(keyed_engine, request):
    """What is found in each case that was chosen and may be tried beside others."""
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    chosen = [call.params["case"] for call in calls if call and "case" in call.params]
    beside = [case for case in chosen if isinstance(case, Case) and case.way.name not in ALONE]
    longest_first = sorted(
        beside, key=lambda case: [ids.isdisjoint(case.checks) for ids in (LONGEST, LONG)]
    )
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {case.id: pool.submit(seen, keyed_engine, case) for case in longest_first}


def says_so(case, checks):
    owners = [checks[id] for id in case.checks]
    assert [check.status for check in owners] == ["failed" for _ in owners], checks
    assert all(check.reason and check.hint for check in owners), checks


@pytest.mark.parametrize("case", parameters(BROKEN))
def test_the_check_that_owns_a_broken_promise_says_so(found, case):
    says_so(case, found[case.id].result())


@pytest.mark.parametrize("case", parameters(HARMLESS))
def test_what_is_only_unusual_passes(found, case):
    checks = found[case.id].result().values()
    assert [(check.id, check.reason) for check in checks if check.status == "failed"] == []
    assert {check.id for check in checks if check.status == "passed"} >= set(case.checks)


@pytest.mark.parametrize("case", parameters(BROKEN, alone=True))
def test_the_check_that_owns_it_says_so_where_nobody_else_asks(found, keyed_engine, case):
    wait(found.values())
    says_so(case, seen(keyed_engine, case))


def test_every_promise_is_broken_in_some_way():
    assert {id for way in BROKEN for id in way.owners} == set(PROMISES)


def test_every_way_has_a_name_of_its_own():
    assert len(WAYS) == len(BROKEN) + len(HARMLESS)
    assert set(WAYS) >= QUICK | ALONE


def test_the_page_shows_every_way():
    assert tables() in PAGE.read_text()
    command = [sys.executable, breaking_proxy.__file__, "--tables"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, tables())
