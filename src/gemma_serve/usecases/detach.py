"""A supervisor in the background: start it, and follow its events until it is ready or fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from gemma_serve.adapters.state import DeploymentFolder, deployment_folder
from gemma_serve.engine.inbox import Inbox
from gemma_serve.errors import EngineFailed, GemmaServeError, Problem, Stopped
from gemma_serve.usecases.deployments import claim
from gemma_serve.usecases.events import (
    EngineReady,
    Event,
    Failed,
    OnEvent,
    PhaseBegan,
    read_event,
)
from gemma_serve.usecases.plan import ServePlan
from gemma_serve.usecases.run import Run, run_of, write_run
from gemma_serve.usecases.smoke import run_smoke
from gemma_serve.usecases.up import UpResult

_TICK_S = 0.1


def up_detached(
    plan: ServePlan,
    *,
    smoke_test: bool,
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
    run = run_of(plan, detached=True)
    folder = deployment_folder(run.name, environ)
    with Inbox() as inbox:
        with claim(run.name, run.port, environ) as locks:
            folder.begin()
            folder.write_json(folder.run, write_run(run))
            child = _start_supervisor(run, folder, locks, environ)
        phases: list[PhaseBegan] = []
        ready = _follow(child, folder, inbox, on_event, phases)
    report = None
    if smoke_test:
        report = run_smoke(
            url=run.url,
            model=run.served_model_name,
            api_key=api_key,
            answers=plan.known_answers,
            on_event=on_event,
        )
        on_event(report)
    return UpResult(
        run.name, run.url, run.served_model_name, ready.ready_s, tuple(phases), folder.log, report
    )


def _start_supervisor(
    run: Run, folder: DeploymentFolder, locks: tuple[int, ...], environ: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    kept = ",".join(map(str, locks))
    with folder.supervisor_log.open("ab") as log:
        folder.supervisor_log.chmod(0o600)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "gemma_serve", "supervise", run.name, "--locks", kept],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(environ),
            start_new_session=True,
            pass_fds=locks,
        )


def _follow(
    child: subprocess.Popen[bytes],
    folder: DeploymentFolder,
    inbox: Inbox,
    on_event: OnEvent,
    phases: list[PhaseBegan],
) -> EngineReady:
    """Pass the supervisor's events on until it is ready; raises if it ends before that."""
    events = _new_events(folder.events)
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
    raise _failure(failed, child, folder)


def _failure(
    failed: Failed | None, child: subprocess.Popen[bytes], folder: DeploymentFolder
) -> GemmaServeError:
    problem = failed.problem if failed is not None else _unexplained(child, folder)
    return EngineFailed(problem.message, code=problem.code, hint=problem.hint)


def _unexplained(child: subprocess.Popen[bytes], folder: DeploymentFolder) -> Problem:
    return Problem(
        "supervisor.ended",
        f"the supervisor in the background ended with {child.returncode} before it was ready",
        f"what it said is in {folder.supervisor_log}",
    )


def _new_events(path: Path) -> Iterator[list[Event]]:
    """With each step, the events that were written since the last one."""
    at, rest = 0, b""
    while True:
        try:
            with path.open("rb") as file:
                file.seek(at)
                data = file.read()
        except OSError:
            data = b""
        at += len(data)
        *lines, rest = (rest + data).split(b"\n")
        found = (read_event(json.loads(line)) for line in lines)
        yield [event for event in found if event is not None]
