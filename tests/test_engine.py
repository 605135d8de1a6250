"""One engine under its guard: real processes, real signals, and nothing left of them."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from gemma_serve.engine.guarded import GuardedEngine, start_engine
from gemma_serve.engine.inbox import Inbox
from gemma_serve.engine.ladder import Descent, StopStep
from gemma_serve.engine.processes import identify, survivors
from gemma_serve.engine.reports import (
    Exit,
    Joined,
    LeaderEnded,
    LogTrouble,
    Lost,
    NotStarted,
    SegmentsSeen,
    Started,
    Stopped,
    read_report,
    write_report,
)
from gemma_serve.engine.shared_files import SHARED_MEMORY, make_temporary_folder
from gemma_serve.errors import EngineFailed
from gemma_serve.planning.process_id import Member, ProcessId, SharedFile
from running import eventually

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
if sys.argv[1] == "ignore":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", {CHILD!r}])
time.sleep(300)
"""
# A leader whose child has the title of vLLM's core.
TITLED = """
import subprocess, time
subprocess.Popen(["VLLM::EngineCore", "300"], executable="/bin/sleep")
time.sleep(300)
"""
# A leader whose child uses one segment that was there before and leaves one of its own.
SEGMENTS = """
import mmap, sys, time
from multiprocessing import resource_tracker, shared_memory
with open(sys.argv[1], "r+b") as file:
    before = mmap.mmap(file.fileno(), 0)
mine = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister(mine._name, "shared_memory")
time.sleep(300)
"""
PARENT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {SEGMENTS!r}, sys.argv[1]])
"""
# A supervisor in a process of its own, which says when it knows all three generations.
SUPERVISOR = f"""
import json, os, sys, time
from pathlib import Path
from gemma_serve.engine.guarded import start_engine
folder, temporary = Path(sys.argv[1]), Path(sys.argv[2])
engine = start_engine(
    [sys.executable, "-c", {LEADER!r}, "obey"], environment=os.environ,
    log=folder / "engine.log", events=folder / "events.jsonl", guard_log=folder / "guard.log",
    temporary_folder=temporary, keep_open=(), on_news=lambda: None,
)
while len(engine.family.members) < 3:
    engine.take_in()
    time.sleep(0.02)
pids = [engine.guard.pid, *(member.process.pid for member in engine.family.members)]
print(json.dumps(pids), flush=True)
time.sleep(300)
"""


@pytest.fixture(autouse=True)
def no_subreaper():
    """A supervisor stays a subreaper; the tests after these are not to be one."""
    yield
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)


@dataclass
class Held:
    """An engine and what a supervisor has beside it."""

    engine: GuardedEngine
    inbox: Inbox
    log: Path
    temporary: Path

    def wait_for(self, condition, what):
        """Wait for what the guard is to report."""

        def happened():
            self.engine.take_in()
            return condition()

        assert self.inbox.wait_until(happened, timeout_s=60, tick_s=0.1), what

    def members(self):
        self.engine.take_in()
        return [member.process for member in self.engine.family.members]

    def stop(self, *, drain_s=0.0, hurry=lambda: False, gently=True):
        return self.engine.stop(
            drain_s=drain_s, wait=self.inbox.wait, hurry=hurry, gently=gently
        )  # fmt: skip


@contextmanager
def started(tmp_path, *argv):
    log = tmp_path / "engine.log"
    temporary = make_temporary_folder()
    with Inbox() as inbox:
        engine = start_engine(
            argv, environment=os.environ, log=log, events=tmp_path / "events.jsonl",
            guard_log=tmp_path / "guard.log", temporary_folder=temporary, keep_open=(),
            on_news=inbox.wake,
        )  # fmt: skip
        found = Held(engine, inbox, log, temporary)
        try:
            yield found
        finally:
            found.stop(gently=False)
    assert (tmp_path / "guard.log").read_text() == ""
    assert not temporary.exists()


@contextmanager
def family(tmp_path, at_term):
    with started(tmp_path, sys.executable, "-c", LEADER, at_term) as found:
        eventually(lambda: found.log.exists() and "up" in found.log.read_text(), "the child")
        found.wait_for(lambda: len(found.members()) == 3, "all three")
        yield found


@pytest.fixture
def processes():
    """Start processes of nobody's engine; they end with the test."""
    found = []

    def start(*argv, **options):
        found.append(subprocess.Popen(argv, **options))
        return found[-1]

    yield start
    for process in found:
        process.kill()
        process.communicate()


def sleep(processes, **options):
    return processes(sys.executable, "-c", "import time; time.sleep(300)", **options)


def steps(stopped):
    return [(step.step, step.count) for step in stopped.descent.steps]


def living(members):
    return [process for process in members if identify(process.pid) == process]


def test_all_three_generations_end_when_the_leader_obeys(tmp_path):
    with family(tmp_path, "obey") as found:
        members = [found.engine.guard, *found.members()]
        stopped = found.stop()
        assert (living(members), stopped.descent.left) == ([], ())
        assert steps(stopped) == [("terminate", 0), ("kill", 2), ("clean", 0)]
        assert found.engine.exit == Exit(None, signal.SIGTERM)


def test_a_leader_that_ignores_sigterm_is_killed_after_the_grace(tmp_path):
    with family(tmp_path, "ignore") as found:
        members = found.members()
        stopped = found.stop()
        assert (living(members), stopped.descent.left) == ([], ())
        assert steps(stopped) == [("terminate", 0), ("kill", 3), ("clean", 0)]
        assert stopped.descent.steps[0].duration_s >= 3.0
        assert found.engine.exit == Exit(None, signal.SIGKILL)


def test_being_asked_again_cuts_the_drain_short(tmp_path):
    with family(tmp_path, "ignore") as found:
        members = found.members()
        asked = iter([False, False, True])
        stopped = found.stop(drain_s=300, hurry=lambda: next(asked, True))
        assert living(members) == []
        assert steps(stopped) == [("drain", 0), ("kill", 3), ("clean", 0)]


@pytest.mark.parametrize("who", ["leader", "child"])
def test_the_rest_ends_too_when_one_was_killed_by_somebody_else(tmp_path, who):
    with family(tmp_path, "obey") as found:
        engine, members = found.engine, found.members()
        child = next(
            process for process in members
            if process != engine.leader and os.getsid(process.pid) == engine.guard.pid
        )  # fmt: skip
        os.kill(engine.leader.pid if who == "leader" else child.pid, signal.SIGKILL)
        if who == "leader":
            found.wait_for(lambda: engine.exit is not None, "the leader's end")
            assert engine.exit == Exit(None, signal.SIGKILL)
            # Nobody has to ask for the rest.
            eventually(lambda: living([*members, engine.guard]) == [], "the end of all")
        stopped = found.stop()
        assert (living(members), stopped.descent.left) == ([], ())


def test_the_end_of_a_process_that_vllm_needs_is_told_by_its_title(tmp_path):
    with started(tmp_path, sys.executable, "-c", TITLED) as found:
        engine = found.engine

        def core():
            return [m for m in engine.family.members if m.title.startswith("VLLM::EngineCore")]

        found.wait_for(core, "the core")
        (member,) = core()
        os.kill(member.process.pid, signal.SIGKILL)
        found.wait_for(lambda: engine.lost is not None, "its end")
        assert (engine.lost, engine.exit) == (member, None)


def test_the_engine_ends_though_its_guard_was_killed(tmp_path, processes):
    stranger = sleep(processes)
    with family(tmp_path, "obey") as found:
        members = found.members()
        os.kill(found.engine.guard.pid, signal.SIGKILL)
        found.wait_for(lambda: found.engine.guard_is_gone, "the guard's end")
        stopped = found.stop()
        assert (living(members), stopped.descent.left) == ([], ())
        assert not found.temporary.exists()
    assert stranger.poll() is None


def test_the_engine_ends_though_its_guard_is_halted(tmp_path):
    with family(tmp_path, "obey") as found:
        members = [found.engine.guard, *found.members()]
        os.kill(found.engine.guard.pid, signal.SIGSTOP)
        stopped = found.stop(hurry=lambda: True)
        assert (living(members), stopped.descent.left) == ([], ())


def test_the_guard_ends_everything_when_its_supervisor_was_killed(tmp_path, processes):
    temporary = make_temporary_folder()
    supervisor = processes(
        sys.executable, "-c", SUPERVISOR, str(tmp_path), str(temporary), stdout=subprocess.PIPE
    )
    members = [identify(pid) for pid in json.loads(supervisor.stdout.readline())]
    assert (len(members), None in members) == (4, False)
    supervisor.kill()
    eventually(lambda: living(members) == [], "the end of all")
    (word,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert {name: word[name] for name in ("event", "reason", "left")} == {
        "event": "guard_stopped_engine", "reason": "the supervisor was gone", "left": [],
    }  # fmt: skip
    assert not temporary.exists()


def test_a_terminated_guard_ends_its_engine_in_order(tmp_path):
    with family(tmp_path, "obey") as found:
        members = found.members()
        os.kill(found.engine.guard.pid, signal.SIGTERM)
        found.wait_for(lambda: found.engine.exit is not None, "the leader's end")
        assert found.engine.exit == Exit(None, signal.SIGTERM)
        assert found.stop().descent.left == ()
        assert living(members) == []


def test_an_obedient_engine_needs_no_kill(tmp_path):
    with started(tmp_path, sys.executable, "-c", "import time; time.sleep(300)") as found:
        stopped = found.stop()
        assert steps(stopped) == [("terminate", 0), ("clean", 0)]
        assert (stopped.descent.killed, stopped.descent.left) == (False, ())


def test_the_death_of_the_leader_wakes_the_waiter(tmp_path):
    with started(tmp_path, sys.executable, "-c", "raise SystemExit(7)") as found:

        def ended():
            found.engine.take_in()
            return found.engine.exit is not None

        assert found.inbox.wait_until(ended, timeout_s=60, tick_s=60)
        assert found.engine.exit == Exit(7, None)


def test_a_command_that_is_not_there_is_told(tmp_path):
    with (
        pytest.raises(EngineFailed, match="cannot run /none: No such file or directory"),
        started(tmp_path, "/none"),
    ):
        pass


def test_a_command_that_is_not_there_leaves_nothing(tmp_path):
    temporary = make_temporary_folder()
    with pytest.raises(EngineFailed):
        start_engine(
            ["/none"], environment={}, log=tmp_path / "l", events=tmp_path / "e",
            guard_log=tmp_path / "g", temporary_folder=temporary, keep_open=(),
            on_news=lambda: None,
        )  # fmt: skip
    assert not temporary.exists()


def test_the_log_gets_all_that_is_printed_and_the_temporary_folder_is_the_engines_own(tmp_path):
    code = (
        "import os, sys, tempfile; print(tempfile.mkdtemp()); print('err', file=sys.stderr);"
        "print('x' * 3_000_000); os.write(1, b'last words')"
    )
    with started(tmp_path, sys.executable, "-c", code) as found:
        found.wait_for(lambda: found.engine.exit is not None, "its end")
        found.stop()
        lines = found.log.read_text().splitlines()
        assert Path(lines.pop(0) if lines[0] != "err" else lines.pop(1)).parent == found.temporary
        assert lines == ["err", "x" * 3_000_000, "last words"]


def test_segments_that_the_engine_left_are_removed_and_no_others(tmp_path):
    before = SHARED_MEMORY / f"psm_{uuid4().hex[:8]}"
    before.write_bytes(bytes(4096))
    try:
        with started(tmp_path, sys.executable, "-c", PARENT, str(before)) as found:
            found.wait_for(lambda: found.engine.family.shared_files, "its segment")
            (segment,) = found.engine.family.shared_files
            assert Path(segment.path).stat().st_ino == segment.inode
            stopped = found.stop()
            assert steps(stopped)[-1] == ("clean", 1)
            assert not Path(segment.path).exists()
            assert before.exists()
    finally:
        before.unlink()


def test_a_process_that_has_the_pid_of_a_member_is_a_stranger(processes):
    stranger = sleep(processes, start_new_session=True)
    now = identify(stranger.pid)
    before = ProcessId(stranger.pid, now.start_ticks - 1)
    assert survivors([Member(before)], session=stranger.pid) == []
    assert survivors([Member(now)], session=None) == [now]


def test_a_session_counts_only_while_one_that_was_written_down_is_in_it(processes):
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '300']).pid, flush=True);"
    leader = processes(
        sys.executable, "-c", f"{code} import time; time.sleep(300)",
        start_new_session=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    child = identify(int(leader.stdout.readline()))
    try:
        outsider = identify(sleep(processes).pid)
        both = sorted([identify(leader.pid), child], key=lambda process: process.pid)
        assert survivors([Member(child)], session=leader.pid) == both
        assert survivors([Member(outsider)], session=leader.pid) == [outsider]
    finally:
        with suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)


ONE = ProcessId(12, 345)


@pytest.mark.parametrize(
    "report",
    [
        Started(ONE),
        NotStarted("No such file or directory"),
        Joined(Member(ONE, "VLLM::EngineCore")),
        SegmentsSeen((SharedFile("/dev/shm/psm_1", 7), SharedFile("/dev/shm/psm_2", 8))),
        Lost(Member(ONE, "VLLM::Worker_TP0")),
        LeaderEnded(Exit(3, None)),
        LeaderEnded(Exit(None, 9)),
        LogTrouble("No space left on device"),
        Stopped(Descent((StopStep("drain", 1.5), StopStep("kill", 0.25, 2)), (12, 13)), 1.75),
    ],
    ids=lambda report: type(report).__name__,
)
def test_a_report_is_one_line_and_reads_back_whole(report):
    line = write_report(report)
    assert line.count(b"\n") == 1
    assert read_report(line.decode()) == report


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


def test_a_process_that_was_not_ours_is_left_alone(tmp_path, processes):
    stranger = sleep(processes)
    with family(tmp_path, "obey") as found:
        found.stop()
    assert psutil.Process(stranger.pid).is_running()
    assert stranger.poll() is None
