"""One engine process: real children, real signals, and nothing left of them."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest

from gemma_serve.engine.inbox import Inbox
from gemma_serve.engine.process import EngineProcess, Exit, stop_engine
from gemma_serve.errors import EngineFailed

# A leader with a child in its session and a grandchild in a session of its own; both ignore
# SIGTERM. The leader says so in its log when all are there, then does as `at_term` says.
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(300)
"""
CHILD = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], start_new_session=True)
print("up", flush=True)
{STUBBORN}
"""
LEADER = f"""
import signal, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {CHILD!r}])
if sys.argv[1] == "ignore":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(300)
"""


def alive(pids):
    return [
        pid
        for pid in pids
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


def eventually(condition, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


@contextmanager
def started(tmp_path, *argv):
    log = tmp_path / "engine.log"
    with Inbox() as inbox:
        engine = EngineProcess.start(argv, environment=os.environ, log=log, on_exit=inbox.wake)
        try:
            yield engine, inbox, log
        finally:
            engine.kill()


@contextmanager
def family(tmp_path, at_term):
    with started(tmp_path, sys.executable, "-c", LEADER, at_term) as (engine, inbox, log):
        eventually(lambda: log.exists() and "up" in log.read_text())
        eventually(lambda: len(engine.members()) == 3)
        yield engine, inbox


def stop(engine, inbox, *, grace_s=10.0, hurry=lambda: False):
    return stop_engine(engine, grace_s=grace_s, wait=inbox.wait, hurry=hurry)


def test_all_three_generations_end_when_the_leader_obeys(tmp_path):
    with family(tmp_path, "obey") as (engine, inbox):
        pids = [process.pid for process in engine.members()]
        report = stop(engine, inbox)
        assert (alive(pids), report.left, report.killed) == ([], (), True)
        assert engine.exit == Exit(None, signal.SIGTERM)


def test_a_leader_that_ignores_sigterm_is_killed_after_the_grace(tmp_path):
    with family(tmp_path, "ignore") as (engine, inbox):
        pids = [process.pid for process in engine.members()]
        report = stop(engine, inbox, grace_s=0.2)
        assert (alive(pids), report.left, report.killed) == ([], (), True)
        assert engine.exit == Exit(None, signal.SIGKILL)


def test_being_asked_again_cuts_the_grace_short(tmp_path):
    with family(tmp_path, "ignore") as (engine, inbox):
        asked = iter([False, False, True])
        report = stop(engine, inbox, grace_s=300, hurry=lambda: next(asked, True))
        assert (engine.members(), report.killed) == ([], True)


@pytest.mark.parametrize("who", ["leader", "child"])
def test_the_rest_ends_too_when_one_was_killed_by_somebody_else(tmp_path, who):
    with family(tmp_path, "obey") as (engine, inbox):
        members = engine.members()
        pids = [process.pid for process in members]
        child = next(p for p in members if p.pid != engine.pid and os.getsid(p.pid) == engine.pid)
        os.kill(engine.pid if who == "leader" else child.pid, signal.SIGKILL)
        if who == "leader":
            eventually(lambda: engine.exit is not None)
        report = stop(engine, inbox)
        assert (alive(pids), report.left) == ([], ())


def test_an_obedient_engine_needs_no_kill(tmp_path):
    with started(tmp_path, sys.executable, "-c", "import time; time.sleep(300)") as (
        engine,
        inbox,
        _,
    ):
        report = stop(engine, inbox)
        assert (report.killed, report.left) == (False, ())


def test_the_death_of_the_leader_wakes_the_waiter(tmp_path):
    with started(tmp_path, sys.executable, "-c", "raise SystemExit(7)") as (engine, inbox, _):
        assert inbox.wait_until(lambda: engine.exit is not None, timeout_s=60, tick_s=60)
        assert engine.exit == Exit(7, None)


def test_a_command_that_is_not_there_is_told(tmp_path):
    with Inbox() as inbox, pytest.raises(EngineFailed, match="cannot run /none: No such file"):
        EngineProcess.start(["/none"], environment={}, log=tmp_path / "l", on_exit=inbox.wake)


def test_the_way_it_ended_in_words():
    assert [str(Exit.of(code)) for code in (0, 3, -9, -15)] == [
        "exit code 0",
        "exit code 3",
        "signal SIGKILL",
        "signal SIGTERM",
    ]


def test_the_inbox_notes_signals_in_order_and_gives_the_handlers_back():
    before = signal.getsignal(signal.SIGTERM)
    with Inbox() as inbox:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert inbox.wait_until(lambda: len(inbox.signals) == 2, timeout_s=30, tick_s=30)
        assert inbox.signals == [signal.SIGTERM, signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_inbox_waits_no_longer_than_told():
    with Inbox() as inbox:
        assert not inbox.wait_until(lambda: False, timeout_s=0.05, tick_s=10)


def test_a_process_that_was_not_ours_is_left_alone(tmp_path):
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    try:
        with family(tmp_path, "obey") as (engine, inbox):
            stop(engine, inbox)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
