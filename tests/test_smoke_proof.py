"""Each promise of the smoke test, broken before the real engine: the check that owns it says so."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import breaking_proxy
from breaking_proxy import WAYS, Way, breaking, tables
from gemma_serve.adapters.state import all_deployments
from gemma_serve.planning.smoke.promises import PROMISES
from gemma_serve.usecases.smoke.run import run_smoke
from gemma_serve.usecases.smoke.session import SmokeOptions
from running import Program, end_deployments

PAGE = Path(__file__).parent.parent / "docs" / "smoke-test.md"
SMALL = ("--model", "demo", "--port", "0", "--max-model-len", "1024", "--max-num-seqs", "32")
# Where nothing is broken, the checks that look at the form of what comes.
FORM = (
    "completion-stream", "usage", "max-tokens", "stop-sequence", "utf-8", "chat-stream",
    "chat-limits", "chat-multi-turn", "chat-system", "prompt-too-long", "malformed-body",
)  # fmt: skip
# The engine batches, so that many tests at once take less time than one after another ...
AT_ONCE = 5
BROKEN = [way for way in WAYS.values() if way.kind == "broken"]
HARMLESS = [way for way in WAYS.values() if way.kind == "harmless"]
# ... but its own counts, and when events come, tell most where nobody else asks.
ALONE = [WAYS[name] for name in ("one-chunk", "kept-back", "keeps-reading", "no-prefix")]
BESIDE = [way for way in BROKEN if way not in ALONE]
# What looks slow or serial is looked at three times, which takes 10 to 60 seconds a way.
LONG = {
    "kept-back", "serial", "serial-streams", "two-at-a-time", "waves", "one-starves",
    "one-stands-still", "slow-tokens", "sampled", "one-token-less", "keeps-reading", "no-prefix",
}  # fmt: skip
SHORT = {
    "nothing", "crlf", "comments", "cut-3", "merged", "slow-start", "extra-fields", "escaped",
    "no-version", "closes",
}  # fmt: skip


def marked(ways):
    """The ways as parameters; of what takes minutes in all, most is left to the pipeline."""
    later = LONG | {way.name for way in HARMLESS} - SHORT
    marks = {True: pytest.mark.proof, False: pytest.mark.engine}
    return [pytest.param(way, id=way.name, marks=marks[way.name in later]) for way in ways]


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """The URL of a real engine that keeps its promises."""
    state = {"GEMMA_SERVE_STATE_DIR": str(tmp_path_factory.mktemp("state"))}
    with Program("up", "--detach", *SMALL, environ=state) as program:
        assert program.popen.wait(240) == 0, program.err
        (deployment,) = all_deployments(state)
        yield deployment.url
        end_deployments(state)


def seen(upstream, way):
    """What the smoke test finds where `way` stands in between, by the checks' ids."""
    named = {name: way.options[name] for name in ("api_key", "model") if name in way.options}
    options = SmokeOptions(**{k: v for k, v in way.options.items() if k not in named})
    with breaking(upstream, way) as url:
        report = run_smoke(
            url=url,
            only=way.owners or FORM,
            options=options,
            on_event=lambda result: None,
            **named,
        )
    return {check.id: check for check in report.checks}


@pytest.fixture(scope="module")
def found(upstream, request):
    """What is found for each way that was chosen and may be tested beside others."""
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    ways = (call.params.get("way") for call in calls if call)
    chosen = [way for way in ways if isinstance(way, Way)]
    longest_first = sorted(chosen, key=lambda way: way.kind != "harmless")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {
            way.name: pool.submit(seen, upstream, way) for way in longest_first if way not in ALONE
        }


def says_so(way, checks):
    owners = [checks[id] for id in way.owners]
    assert [check.status for check in owners] == ["failed" for _ in owners], checks
    assert all(check.reason and check.hint for check in owners), checks


@pytest.mark.parametrize("way", marked(BESIDE))
def test_the_check_that_owns_a_broken_promise_says_so(found, way):
    says_so(way, found[way.name].result())


@pytest.mark.parametrize("way", marked(HARMLESS))
def test_what_is_only_unusual_passes(found, way):
    checks = found[way.name].result().values()
    assert [(check.id, check.reason) for check in checks if check.status == "failed"] == []


@pytest.mark.parametrize("way", marked(ALONE))
def test_the_check_that_owns_it_says_so_where_nobody_else_asks(upstream, way):
    says_so(way, seen(upstream, way))


def test_every_promise_is_broken_in_some_way():
    assert {id for way in BROKEN for id in way.owners} == set(PROMISES)


def test_the_page_shows_every_way():
    assert tables() in PAGE.read_text()
    command = [sys.executable, breaking_proxy.__file__, "--tables"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, tables())
