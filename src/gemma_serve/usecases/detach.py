"""A supervisor in the background: start it, and follow its events until it is ready or fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

from gemma_serve.adapters.state import DeploymentFolder, deployment_folder
from gemma_serve.engine.inbox import Inbox
from gemma_serve.errors import (
    EXIT_USAGE,
    EngineFailed,
    GemmaServeError,
    Problem,
    Stopped,
    UsageError,
)
from gemma_serve.usecases.deployments import claim
from gemma_serve.usecases.events import (
    EngineReady,
    Event,
    Failed,
    OnEvent,
    PhaseBegan,
    event_line,
    read_event,
)
from gemma_serve.usecases.plan import ServePlan
from gemma_serve.usecases.run import Run, run_of, write_run
from gemma_serve.usecases.up import UpOptions, UpResult, smoke_test_of

_TICK_S = 0.1


def up_detached(
    plan: ServePlan,
    *,
    options: UpOptions,
    environ: Mapping[str, str],
    api_key: str | None,
    on_event: OnEvent,
) -> UpResult:
    """Start the engine of `plan` under a supervisor in the background; return when it is ready.

    A signal to us before that stops the supervisor as well; afterwards it goes on alone.

    Raises:
        EngineFailed: it did not start.
        Stopped: SIGINT, SIGTERM or SIGHUP came.
        GemmaServeError: a deployment of that name runs, or another has the port.
    """
    run = run_of(plan, detached=True, force=options.force)
    folder = deployment_folder(run.name, environ)
    with Inbox() as inbox:
        with claim(run.name, run.port, environ) as claimed:
            folder.begin()
            folder.write_json(folder.run, write_run(run))
            child, events = _start_supervisor(run, folder, claimed.fds, environ)
        phases: list[PhaseBegan] = []
        try:
            ready = _follow(child, events, folder, inbox, on_event, phases)
        finally:
            os.close(events)
    report = None
    if options.smoke_test:
        report = smoke_test_of(run, options.concurrency, plan.known_answers, api_key, on_event)
        on_event(report)
    return UpResult(
        run.name, run.url, run.served_model_name, ready.ready_s, tuple(phases), folder.log, report
    )


def _start_supervisor(
    run: Run, folder: DeploymentFolder, locks: tuple[int, ...], environ: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], int]:
    """The supervisor, and a pipe on which it tells its events: a full disk can't silence it."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    command = ["supervise", run.name, "--locks", ",".join(map(str, locks)), "--events"]
    with ExitStack() as stack:
        stack.callback(os.close, write_end)
        if_it_fails = stack.enter_context(ExitStack())
        if_it_fails.callback(os.close, read_end)
        log = stack.enter_context(folder.supervisor_log.open("ab"))
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "gemma_serve", *command, str(write_end)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(environ),
            start_new_session=True,
            pass_fds=(*locks, write_end),
        )
        if_it_fails.pop_all()
    return child, read_end


def _follow(
    child: subprocess.Popen[bytes],
    pipe: int,
    folder: DeploymentFolder,
    inbox: Inbox,
    on_event: OnEvent,
    phases: list[PhaseBegan],
) -> EngineReady:
    """Pass the supervisor's events on until it is ready; raises if it ends before that."""
    events = _new_events(pipe)
    failed: Failed | None = None
    forwarded = 0
    while True:
        ended = child.poll() is not None
        for event in next(events):
            on_event(event)
            if isinstance(event, PhaseBegan):
                phases.append(event)
            elif isinstance(event, Failed):
                failed = event
            elif isinstance(event, EngineReady) and not inbox.signals:
                return event
        if ended:
            break
        for _ in inbox.signals[forwarded:]:
            child.send_signal(signal.SIGTERM)
            forwarded += 1
        inbox.wait(_TICK_S)
    if inbox.signals:
        raise Stopped(inbox.signals[0])
    if failed is None and (deployment := folder.load()) and deployment.state == "stopped":
        raise GemmaServeError(
            f"{deployment.name} was stopped while it was starting",
            code="deployment.stopped",
            hint=f"start it again: gemma-serve restart {deployment.name}",
        )
    raise _failure(failed, child, folder)


def _failure(
    failed: Failed | None, child: subprocess.Popen[bytes], folder: DeploymentFolder
) -> GemmaServeError:
    problem = failed.problem if failed is not None else _unexplained(child, folder)
    if failed is not None and failed.exit_code == EXIT_USAGE:
        return UsageError(problem.message, code=problem.code, hint=problem.hint)
    return EngineFailed(problem.message, code=problem.code, hint=problem.hint)


def _unexplained(child: subprocess.Popen[bytes], folder: DeploymentFolder) -> Problem:
    return Problem(
        "supervisor.ended",
        f"the supervisor in the background ended with {child.returncode} before it was ready",
        f"what it said is in {folder.supervisor_log}",
    )


def _new_events(pipe: int) -> Iterator[list[Event]]:
    """With each step, the events that have come since the last one."""
    rest = b""
    while True:
        try:
            data = os.read(pipe, 2**20)
        except BlockingIOError:
            data = b""
        *lines, rest = (rest + data).split(b"\n")
        found = (read_event(json.loads(line)) for line in lines)
        yield [event for event in found if event is not None]


class EventPipe:
    """The other end of it: tells whoever started the supervisor what happens, while they listen."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        # A reader that was halted must not halt us.
        os.set_blocking(fd, False)

    def tell(self, event: Event) -> None:
        """Pass an event on; nobody reads any more after the engine is ready."""
        if self._fd < 0:
            return
        line = json.dumps(event_line(event, time=time.time()), default=str).encode() + b"\n"
        try:
            os.write(self._fd, line)
        except BlockingIOError:
            return
        except OSError:
            os.close(self._fd)
            self._fd = -1
