"""What can go wrong with a deployment, done to one, and what must be true afterwards.

Each `Fault` brings a deployment of the fake engine into a state and harms it; `measure` does so
and measures the aftermath. tests/test_faults.py and test_faults_stop.py hold what is expected,
and scripts/measure_faults.py writes what was measured into docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import pty
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

from running import eventually
from stage import NAME, PROGRAM, Remains, Stage, heard

# What is promised: nothing is left so long after the fault was detected, beyond a drain.
PROMISED_S = 5.0

KILL, TERM, INT, STOP = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP
_HELD = {"imports": "imports", "configuration": "config", "weights": "weights",
         "compilation": "compile"}  # fmt: skip


@dataclass(frozen=True)
class Harm:
    """The harm was done, or detected, at `at` (monotonic seconds), to what `up` started.

    `by_next`: nobody is left who could detect it, so the next command does.
    """

    at: float
    up: subprocess.Popen[str] | None = None
    exit: int | None = None
    by_next: bool = False


@dataclass(frozen=True)
class Outcome:
    """What was found after a fault."""

    exit: int | None
    state: str
    cause: str | None
    status_exit: int
    left: Remains
    lost: int
    next_up: int
    left_by_next: Remains
    seconds: float = field(compare=False)


@dataclass(frozen=True)
class Fault:
    """One fault: `what` is done, and what `up` and `status` say afterwards.

    `exit` is the exit code of `up` (negative for a signal), 0 for one with --detach that had
    returned. `cause` is the code of the problem that `status` tells.
    """

    name: str
    what: str
    harm: Callable[[Stage], Harm]
    exit: int | None
    state: str
    cause: str | None = None
    lost: int = 0
    flags: tuple[str, ...] = ()
    faults: Mapping[str, object] = field(default_factory=dict)
    possible: Callable[[], bool] = lambda: True
    stops: bool = False

    @property
    def expected(self) -> Outcome:
        """What `measure` must find."""
        return Outcome(
            self.exit, self.state, self.cause, 1, Remains(), self.lost, 0, Remains(), 0.0
        )


def measure(fault: Fault) -> Outcome:
    """Do it, and see what comes of it."""
    with Stage(*fault.flags, **fault.faults) as stage:
        harm = fault.harm(stage)
        if harm.by_next:
            stage.run("status")
        seconds, left = stage.wait_until_clean(harm.at)
        exit_code = harm.exit if harm.up is None else heard(harm.up).code
        lost = sum(client.lost for client in stage.clients)
        status = stage.run("status")
        again = stage.up_again()
        _, left_by_next = stage.wait_until_clean(time.monotonic(), 5.0)
        return Outcome(
            exit_code,
            status.data.get("state", "unknown"),
            (status.data.get("cause") or {}).get("code"),
            status.code,
            left,
            lost,
            again.code,
            left_by_next,
            seconds,
        )


# --- bringing a deployment into a state


def _bring(stage: Stage, when: str, *, detach: bool) -> subprocess.Popen[str]:
    """Start `up` and wait until the deployment is where the fault is to meet it."""
    up = stage.up(*(["--detach"] if detach else []))
    if when in _HELD:
        stage.wait_for(lambda record: record.phase == when and record.shared_files, when)
        return up
    if detach:
        eventually(lambda: up.poll() is not None, "up --detach returned")
    stage.wait_for_state("ready")
    stage.wait_for_family()
    if when == "mid-stream":
        stage.stream(300)  # for longer than a stop without a drain waits
    if when == "draining":
        stage.stream(100)
    if when in ("draining", "stopping"):
        stage.send("supervisor", TERM)
        stage.wait_for_state("stopping")
        eventually(lambda: stage.events("stopping"), "its end has begun")
    return up


def _signal(who: str, signum: signal.Signals, when: str, *, detach: bool) -> Callable:
    def harm(stage: Stage) -> Harm:
        up = _bring(stage, when, detach=detach)
        at = time.monotonic()
        stage.send(who, signum)
        return Harm(at, up)

    return harm


def _at(
    who: str, signum: signal.Signals, when: str, exit_code: int, state: str, cause: str | None,
    *, detach: bool = False, lost: int = 0, flags: tuple[str, ...] = (),
) -> Fault:  # fmt: skip
    """A signal to one of the processes."""
    faults: dict[str, object] = {}
    if when in _HELD:
        faults = {"hold_in_phase": _HELD[when], "compile": when == "compilation"}
    if when == "draining":
        flags += ("--drain-timeout", "10")
    if when == "stopping":
        faults = {"ignore_sigterm": True}
    if detach:
        flags += ("--restart", "no")
    mode = "detached" if detach else "foreground"
    return Fault(
        f"{signum.name.lower()}-{who}-{when}-{mode}",
        f"{signum.name} to the {who}, {_place(when)}, {mode}",
        _signal(who, signum, when, detach=detach),
        exit_code, state, cause, lost, flags, faults,
        stops=when in ("draining", "stopping"),
    )  # fmt: skip


def _place(when: str) -> str:
    if when in _HELD:
        return f"in {when}"
    return {"ready": "ready", "mid-stream": "mid-stream"}.get(when, f"while {when}")


_DIED, _ENDED, _KILLED = "engine.died", "engine-killed", "supervisor.killed"

SIGNALS = [
    # the leader
    _at("leader", KILL, "imports", 3, "failed", _ENDED),
    _at("leader", KILL, "configuration", 3, "failed", _ENDED, detach=True),
    _at("leader", KILL, "weights", 3, "failed", _ENDED),
    _at("leader", KILL, "compilation", 3, "failed", _ENDED),
    _at("leader", TERM, "weights", 3, "failed", _ENDED),
    _at("leader", KILL, "ready", 0, "failed", _ENDED, detach=True),
    _at("leader", INT, "ready", 3, "failed", _ENDED),
    _at("leader", KILL, "mid-stream", 3, "failed", _ENDED, lost=1),
    _at("leader", KILL, "draining", 143, "stopped", None, lost=1),
    _at("leader", KILL, "stopping", 143, "stopped", None),
    # the engine core
    _at("core", KILL, "weights", 3, "failed", _ENDED, detach=True),
    _at("core", KILL, "compilation", 3, "failed", _ENDED),
    _at("core", KILL, "ready", 3, "failed", _ENDED),
    _at("core", TERM, "ready", 0, "failed", _ENDED, detach=True),
    _at("core", KILL, "mid-stream", 3, "failed", _ENDED, lost=1),
    _at("core", KILL, "stopping", 143, "stopped", None),
    # the supervisor
    _at("supervisor", KILL, "imports", -9, "failed", _KILLED),
    _at("supervisor", KILL, "weights", 3, "failed", _KILLED, detach=True),
    _at("supervisor", TERM, "compilation", 143, "stopped", None),
    _at("supervisor", INT, "weights", 130, "stopped", None),
    _at("supervisor", KILL, "ready", -9, "failed", _KILLED),
    _at("supervisor", TERM, "ready", 0, "stopped", None, detach=True),
    _at("supervisor", INT, "ready", 130, "stopped", None),
    _at("supervisor", KILL, "mid-stream", 0, "failed", _KILLED, detach=True, lost=1),
    _at("supervisor", TERM, "mid-stream", 143, "stopped", None, lost=1),
    _at("supervisor", KILL, "draining", -9, "failed", _KILLED, lost=1),
    _at("supervisor", INT, "draining", 143, "stopped", None, lost=1),
    _at("supervisor", KILL, "stopping", -9, "failed", _KILLED),
    # the guard
    _at("guard", KILL, "weights", 3, "failed", _DIED),
    _at("guard", KILL, "ready", 0, "failed", _DIED, detach=True),
    _at("guard", TERM, "ready", 3, "failed", _ENDED),
    _at("guard", KILL, "draining", 143, "stopped", None, lost=1),
    _at("guard", KILL, "stopping", 143, "stopped", None),
]


def _both_killed(when: str, *, detach: bool) -> Callable[[Stage], Harm]:
    def harm(stage: Stage) -> Harm:
        up = _bring(stage, when, detach=detach)
        # Halted first, so that the one can't see the end of the other.
        guard, supervisor = stage.pid("guard"), stage.pid("supervisor")
        os.kill(guard, STOP)
        os.kill(supervisor, KILL)
        os.kill(guard, KILL)
        exit_code = heard(up).code
        assert stage.remains().processes, "the engine outlives both"
        return Harm(time.monotonic(), exit=exit_code, by_next=True)

    return harm


# --- halted processes, and engines that say nothing or too much


_QUICK = ("--probe-interval", "0.2", "--probe-deadline", "0.5")


def _unhealthy(stage: Stage) -> None:
    """See that it is known to be unhealthy."""
    stage.wait_for_state("unhealthy")


def _stop(stage: Stage, *args: str) -> Harm:
    at = time.monotonic()
    said = stage.run("stop", *args)
    assert (said.code, said.ok) == (0, True), said
    return Harm(at)


def _stop_after(stage: Stage, up: subprocess.Popen[str]) -> Harm:
    """`stop`, and what came of `up`."""
    harm = _stop(stage)
    return Harm(harm.at, up)


def _halted_leader(stage: Stage) -> Harm:
    up = _bring(stage, "ready", detach=True)
    stage.send("leader", STOP)
    _unhealthy(stage)
    assert stage.run("status").data["state"] == "unhealthy"
    return _stop_after(stage, up)


def _halted_core(stage: Stage) -> Harm:
    up = _bring(stage, "ready", detach=False)
    stage.send("core", STOP)
    _unhealthy(stage)
    stage.send("core", signal.SIGCONT)
    stage.wait_for_state("ready")
    return _stop_after(stage, up)


def _halted_in_weights(stage: Stage) -> Harm:
    up = _bring(stage, "weights", detach=False)
    stage.send("leader", STOP)
    eventually(lambda: stage.events("stopping"), "the phase's limit")
    return Harm(time.monotonic(), up)


def _halted_supervisor(stage: Stage) -> Harm:
    up = _bring(stage, "ready", detach=True)
    supervisor = stage.pid("supervisor")
    stage.send("supervisor", STOP)
    stopping = stage.start([*PROGRAM, "stop", NAME, "--json"])
    eventually(lambda: not _lives(supervisor), "stop kills the supervisor")
    at = time.monotonic()
    assert heard(stopping).code == 0
    return Harm(at, up)


def _halted_guard(stage: Stage) -> Harm:
    up = _bring(stage, "ready", detach=True)
    guard = stage.pid("guard")
    stage.send("guard", STOP)
    stopping = stage.start([*PROGRAM, "stop", NAME, "--json"])
    eventually(lambda: not _lives(guard), "the supervisor kills the guard")
    at = time.monotonic()
    assert heard(stopping).code == 0
    return Harm(at, up)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _never_generates(stage: Stage) -> Harm:
    up = stage.up()
    eventually(lambda: stage.events("stopping"), "it gives up")
    return Harm(time.monotonic(), up)


def _hangs_and_goes_on(stage: Stage) -> Harm:
    hang = stage.folder / "hang"
    stage.faults["hang_file"] = str(hang)
    up = _bring(stage, "ready", detach=False)
    hang.touch()
    _unhealthy(stage)
    hang.unlink()
    stage.wait_for_state("ready")
    eventually(lambda: len(stage.events("health_changed")) == 2, "both changes are told")
    assert [event["ok"] for event in stage.events("health_changed")] == [False, True]
    return _stop_after(stage, up)


def _hangs_and_is_restarted(stage: Stage) -> Harm:
    hang = stage.folder / "hang"
    stage.faults["hang_file"] = str(hang)
    up = _bring(stage, "ready", detach=True)
    hang.touch()
    stage.wait_for_state("restarting")
    hang.unlink()
    stage.wait_for(lambda record: record.state == "ready" and record.restarts == 1, "restarted")
    return _stop_after(stage, up)


def _dies_and_is_restarted(stage: Stage) -> Harm:
    up = _bring(stage, "ready", detach=True)
    stage.send("leader", KILL)
    stage.wait_for(lambda record: record.state == "ready" and record.restarts == 1, "restarted")
    return _stop_after(stage, up)


# `up` with a policy that takes less time to give up.
_IMPATIENT = """
import sys
from gemma_serve.cli import main
from gemma_serve.engine.restarts import RestartPolicy
from gemma_serve.usecases import supervise
supervise.RestartPolicy = lambda: RestartPolicy(max_restarts=2, first_pause_s=0.1)
sys.exit(main(sys.argv[1:]))
"""


def _dies_too_often(stage: Stage) -> Harm:
    up = stage.start([sys.executable, "-c", _IMPATIENT, *stage.argv()[3:]])
    for restarts in (0, 1, 2):
        stage.wait_for(
            lambda record, n=restarts: record.state == "ready" and record.restarts == n, "ready"
        )
        stage.send("leader", KILL)
    at = time.monotonic()
    said = heard(up)
    assert "it was started again 2 times before" in said.messages[0]
    return Harm(at, exit=said.code)


def _prints_much(stage: Stage) -> Harm:
    up = _bring(stage, "ready", detach=False)
    logs = list(stage.deployment.path.glob("engine.log*"))
    assert sum(file.stat().st_size for file in logs) < 45 * 2**20
    return _stop_after(stage, up)


def _prints_nothing(stage: Stage) -> Harm:
    up = stage.up()
    stage.wait_for(lambda record: record.leader, "started")
    # As if a minute had passed: the log's age is what tells.
    minute_ago = time.time() - 60
    os.utime(stage.deployment.log, (minute_ago, minute_ago))
    assert stage.run("status").data["silent_s"] >= 60
    stage.wait_for_state("failed")
    return Harm(time.monotonic(), up)


# --- two at once, and ports


def _two_at_once(stage: Stage) -> Harm:
    both = [stage.up(), stage.up()]
    eventually(lambda: any(up.poll() is not None for up in both), "one is refused")
    refused = next(up for up in both if up.poll() is not None)
    said = heard(refused)
    assert (said.code, said.problems) == (1, ("deployment.running",)), said
    (other,) = [up for up in both if up is not refused]
    stage.wait_for_state("ready")
    return _stop_after(stage, other)


def _port_taken_before(stage: Stage) -> Harm:
    with socket.create_server(("127.0.0.1", stage.port)):
        said = heard(stage.up())
    assert said.problems == ("port-in-use",), said
    return Harm(time.monotonic(), exit=said.code)


def _port_taken_meanwhile(stage: Stage) -> Harm:
    held = stage.folder / "held"
    held.touch()
    stage.faults["hold_file"] = str(held)
    up = _bring(stage, "imports", detach=False)
    with socket.create_server(("127.0.0.1", stage.port)):
        held.unlink()
        said = heard(up)
        assert f"port {stage.port} is taken" in said.messages[0], said
    return Harm(time.monotonic(), exit=said.code)


# --- the disk


def _mount_small(stage: Stage) -> bool:
    """A small file system at the state folder, where that is permitted."""
    stage.state.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(stage.state)]
    with suppress(OSError):
        stage.mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    return stage.mounted


def _fill(stage: Stage) -> None:
    """Let no byte more be written to the state folder."""
    if not stage.mounted:
        for who in ("supervisor", "guard"):
            resource.prlimit(stage.pid(who), resource.RLIMIT_FSIZE, (0, -1))
        return
    with suppress(OSError), (stage.state / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)


def _free(stage: Stage) -> None:
    if stage.mounted:
        (stage.state / "filler").unlink()
        return
    for who in ("supervisor", "guard"):
        resource.prlimit(stage.pid(who), resource.RLIMIT_FSIZE, (-1, -1))


def _disk_full(stage: Stage) -> Harm:
    _mount_small(stage)
    up = _bring(stage, "ready", detach=False)
    _fill(stage)
    for _ in range(3):
        assert not stage.stream(20).lost
    assert up.poll() is None
    assert stage.run("status").data["state"] == "ready"
    _free(stage)
    return _stop_after(stage, up)


def _disk_full_to_the_end(stage: Stage) -> Harm:
    _mount_small(stage)
    up = _bring(stage, "ready", detach=False)
    _fill(stage)
    at = time.monotonic()
    stage.send("supervisor", TERM)
    said = heard(up)
    stage.wait_until_clean(at)
    if stage.mounted:
        _free(stage)
    return Harm(at, exit=said.code)


def _disk_full_before(stage: Stage) -> Harm:
    # 0 blocks per file: no file can be written at all.
    said = heard(stage.start(["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *stage.argv()]))
    assert said.problems == ("state.unwritable",), said
    return Harm(time.monotonic(), exit=said.code)


def _log_removed(stage: Stage) -> Harm:
    up = _bring(stage, "ready", detach=False)
    stage.deployment.log.unlink()
    assert not stage.stream(20).lost
    eventually(stage.deployment.log.exists, "the log is there again")
    return _stop_after(stage, up)


def _damage(stage: Stage) -> None:
    (stage.deployment.path / "deployment.json").write_text('{"schema": 1, "name": "de')


def _damaged_while_running(stage: Stage) -> Harm:
    up = _bring(stage, "ready", detach=False)
    _damage(stage)
    # The supervisor writes it anew; until then it is called unreadable.
    eventually(lambda: stage.run("status").data["state"] == "ready", "the record is whole again")
    return _stop_after(stage, up)


def _damaged_afterwards(stage: Stage) -> Harm:
    said = heard(stage.up("--once"))
    _damage(stage)
    return Harm(time.monotonic(), exit=said.code)


def _state_removed(stage: Stage) -> Harm:
    up = _bring(stage, "ready", detach=False)
    stage.state.rename(stage.folder / "gone")  # at once, whatever is being written
    shutil.rmtree(stage.folder / "gone")
    assert not stage.stream(20).lost
    at = time.monotonic()
    up.send_signal(TERM)
    return Harm(at, up)


def _clock_set_back(stage: Stage) -> Harm:
    """The record of a deployment that was started tomorrow."""
    up = _bring(stage, "ready", detach=False)
    path = stage.deployment.path / "deployment.json"
    record = json.loads(path.read_text())
    for name in ("changed_at", "started_at", "phase_began_at"):
        record[name] += 86400
    path.write_text(json.dumps(record))
    tomorrow = time.time() + 86400
    for file in (path, stage.deployment.log, stage.deployment.events):
        os.utime(file, (tomorrow, tomorrow))
    said = stage.run("status")
    assert (said.code, said.data["state"], said.data["silent_s"]) == (0, "ready", None), said
    return _stop_after(stage, up)


# --- terminals, shells, and containers


def _terminal_closed(stage: Stage) -> Harm:
    ours, theirs = pty.openpty()
    up = stage.start(
        ["setsid", "--ctty", *stage.argv()], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    stage.wait_for_state("ready")
    stage.wait_for_family()
    at = time.monotonic()
    os.close(ours)
    code = up.wait(60)
    return Harm(at, exit=code)


def _shell_killed(stage: Stage) -> Harm:
    shell = stage.start(["sh", "-c", '"$@" & wait', "sh", *stage.argv()])
    stage.wait_for_state("ready")
    stage.wait_for_family()
    shell.send_signal(KILL)
    shell.wait()
    assert not stage.stream(20).lost
    at = _stop(stage).at
    return Harm(at, exit=shell.returncode)


def _unshare(*argv: str) -> list[str]:
    return ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *argv]


def _can_unshare() -> bool:
    with suppress(OSError):
        command = _unshare("true")
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


def _as_pid_1(stage: Stage) -> Harm:
    up = stage.start(_unshare(*stage.argv()))
    stage.wait_for_state("ready")
    stage.wait_for_family()
    (first,) = psutil.Process(up.pid).children()
    enter = ["nsenter", "--target", str(first.pid), "--pid", "--mount"]
    # Its parent is gone when it ends, so it is for PID 1 to collect it.
    subprocess.run([*enter, "sh", "-c", "sleep 0.1 &"], check=True)
    eventually(lambda: not _zombies(first), "no zombie is left")
    time.sleep(0.3)
    eventually(lambda: not _zombies(first), "no zombie is left")
    at = time.monotonic()
    first.send_signal(TERM)
    return Harm(at, up)


def _zombies(process: psutil.Process) -> list[psutil.Process]:
    below = process.children(recursive=True)
    return [child for child in below if child.status() == psutil.STATUS_ZOMBIE]


# --- stopping


def _stop_ready(stage: Stage) -> Harm:
    return _stop_after(stage, _bring(stage, "ready", detach=True))


def _stop_with_stream(*args: str) -> Callable[[Stage], Harm]:
    def harm(stage: Stage) -> Harm:
        up = _bring(stage, "ready", detach=True)
        stage.stream(100 if args else 300)
        harm = _stop(stage, *args)
        return Harm(harm.at, up)

    return harm


def _stop_orphans(stage: Stage) -> Harm:
    harm = _both_killed("ready", detach=True)(stage)
    leader = stage.record.leader
    said = heard(stage.start([*PROGRAM, "stop", "--orphans", "--json"]))
    assert said.code == 0, said
    assert leader.pid in said.data["ended_pids"]["demo"]
    return Harm(harm.at, exit=harm.exit)


def _stop_what_is_left(stage: Stage) -> Harm:
    harm = _both_killed("ready", detach=True)(stage)
    leader = stage.record.leader
    said = heard(stage.start([*PROGRAM, "stop", "--json"]))
    assert said.code == 0, said
    assert leader.pid in said.data["ended_pids"]
    return Harm(harm.at, exit=harm.exit)


def _both(when: str, exit_code: int, *, detach: bool) -> Fault:
    mode = "detached" if detach else "foreground"
    faults = {"hold_in_phase": _HELD[when]} if when in _HELD else {}
    return Fault(
        f"both-killed-{when}-{mode}",
        f"SIGKILL to the supervisor and the guard at once, {_place(when)}, {mode}",
        _both_killed(when, detach=detach), exit_code, "failed", _KILLED, faults=faults,
    )  # fmt: skip


def _does(name: str, what: str, harm: Callable[[Stage], Harm], exit_code: int | None, state: str,
          cause: str | None = None, **more: object) -> Fault:  # fmt: skip
    return Fault(name, what, harm, exit_code, state, cause, **more)  # type: ignore[arg-type]


_LATER = ("--restart", "on-failure")
OTHERS = [
    _both("weights", -9, detach=False),
    _both("ready", 0, detach=True),
    _does("orphans", "the same, and then `stop --orphans`", _stop_orphans, 0, "failed", _KILLED),
    _does("left-stop", "the same, and then `stop` without a name", _stop_what_is_left, 0, "failed",
          _KILLED),
    _does("leader-halted", "SIGSTOP to the leader, ready: it is unhealthy, then `stop`",
          _halted_leader, 0, "stopped", flags=(*_QUICK, "--restart", "no"), stops=True),
    _does("leader-halted-weights", "SIGSTOP to the leader, in weights, with a limit of 1 s",
          _halted_in_weights, 3, "failed", "engine.phase_timeout",
          flags=("--phase-timeout", "weights=1"), faults={"hold_in_phase": "weights"}),
    _does("core-halted", "SIGSTOP, then SIGCONT to the core, ready: unhealthy, ready again; `stop`",
          _halted_core, 143, "stopped", flags=_QUICK),
    _does("supervisor-halted", "SIGSTOP to the supervisor, ready, then `stop`, which wakes it",
          _halted_supervisor, 0, "stopped", stops=True),
    _does("guard-halted", "SIGSTOP to the guard, ready, then `stop`: the supervisor wakes it",
          _halted_guard, 0, "stopped", stops=True),
    _does("never-generates", "/health says 200 and no token ever comes, first-token limit 1 s",
          _never_generates, 3, "failed", "engine.phase_timeout",
          flags=("--phase-timeout", "first-token=1"), faults={"health_only": "hang"}),
    _does("only-errors", "/health says 200 and every request gets 500", _never_generates, 3,
          "failed", "engine.no_token", faults={"health_only": True}),
    _does("hangs", "generation hangs while /health says 200, and goes on; `stop`",
          _hangs_and_goes_on, 143, "stopped", flags=_QUICK),
    _does("hangs-restarted", "generation hangs, --restart on-failure: restarted; `stop`",
          _hangs_and_is_restarted, 0, "stopped", flags=(*_QUICK, *_LATER)),
    _does("dies-restarted", "SIGKILL to the leader, --restart on-failure: ready again; `stop`",
          _dies_and_is_restarted, 0, "stopped", flags=_LATER),
    _does("dies-too-often", "SIGKILL to the leader after every restart, until it is given up",
          _dies_too_often, 3, "failed", _ENDED, flags=_LATER),
    _does("prints-100-mb", "the engine prints 100 MB while it starts; `stop`", _prints_much, 143,
          "stopped", faults={"print_bytes": 100_000_000}),
    _does("prints-nothing", "the engine prints nothing: `status` tells it; imports limit 4 s",
          _prints_nothing, 3, "failed", "engine.phase_timeout",
          flags=("--phase-timeout", "imports=4"),
          faults={"print_nothing": True, "hold_in_phase": "config"}),
    _does("two-at-once", "two `up` of one name at once: one gets 1; `stop`", _two_at_once, 143,
          "stopped"),
    _does("port-taken", "the port is taken before", _port_taken_before, 1, "unknown"),
    _does("port-taken-meanwhile", "the port is taken between the check and the engine's bind",
          _port_taken_meanwhile, 3, "failed", "port-in-use", faults={"hold_in_phase": "imports"}),
    _does("disk-full", "the disk with state and log is full while it serves, then not; `stop`",
          _disk_full, 143, "stopped"),
    _does("disk-full-to-the-end", "the disk is full until the end, SIGTERM",
          _disk_full_to_the_end, 143, "failed", _KILLED),
    _does("disk-full-before", "no byte can be written from the start", _disk_full_before, 2,
          "unknown"),
    _does("log-removed", "the log is removed while it serves; `stop`", _log_removed, 143,
          "stopped"),
    _does("record-damaged", "deployment.json is damaged while it serves; `stop`",
          _damaged_while_running, 143, "stopped"),
    _does("record-damaged-later", "deployment.json is damaged after the end", _damaged_afterwards,
          0, "unreadable"),
    _does("state-removed", "the state folder is removed while it serves; SIGTERM", _state_removed,
          143, "stopped"),
    _does("clock-set-back", "all times in the record are in the future; `stop`", _clock_set_back,
          143, "stopped"),
    _does("terminal-closed", "the terminal is closed (SIGHUP)", _terminal_closed, 129, "stopped"),
    _does("shell-killed", "SIGKILL to the shell that runs `up`: it serves on; `stop`",
          _shell_killed, -9, "stopped"),
    _does("pid-1", "as PID 1 of a container, an orphan ends, SIGTERM", _as_pid_1, 143, "stopped",
          possible=_can_unshare),
]  # fmt: skip

STOPS = [
    _does("stop", "`stop`, ready", _stop_ready, 0, "stopped", stops=True),
    _does("stop-ignored", "`stop` of an engine that ignores SIGTERM", _stop_ready, 0, "stopped",
          faults={"ignore_sigterm": True}, stops=True),
    _does("stop-grandchild", "`stop`, with a grandchild in its session that ignores SIGTERM",
          _stop_ready, 0, "stopped", faults={"grandchild": "same-session"}, stops=True),
    _does("stop-grandchild-session", "`stop`, with a grandchild in a new session that ignores "
          "SIGTERM", _stop_ready, 0, "stopped", faults={"grandchild": "new-session"}, stops=True),
    _does("stop-stream", "`stop` while a client streams", _stop_with_stream(), 0, "stopped",
          lost=1, stops=True),
    _does("stop-stream-drain", "`stop --drain-timeout 10` while a client streams",
          _stop_with_stream("--drain-timeout", "10"), 0, "stopped", stops=True),
]  # fmt: skip

FAULTS: tuple[Fault, ...] = (*SIGNALS, *OTHERS, *STOPS)

# The suite has one of each kind; `scripts/measure_faults.py` does these too.
ONLY_MEASURED = frozenset(
    {
        "sigkill-leader-imports-foreground",
        "sigkill-leader-configuration-detached",
        "sigterm-leader-weights-foreground",
        "sigint-leader-ready-foreground",
        "sigkill-leader-stopping-foreground",
        "sigkill-core-weights-detached",
        "sigkill-core-compilation-foreground",
        "sigterm-core-ready-detached",
        "sigkill-core-mid-stream-foreground",
        "sigterm-supervisor-compilation-foreground",
        "sigint-supervisor-weights-foreground",
        "sigterm-supervisor-ready-detached",
        "sigkill-supervisor-ready-foreground",
        "both-killed-weights-foreground",
        "dies-too-often",
        "disk-full-before",
        "only-errors",
        "core-halted",
        "stop",
        "stop-grandchild",
    }
)
assert {fault.name for fault in FAULTS} >= ONLY_MEASURED
