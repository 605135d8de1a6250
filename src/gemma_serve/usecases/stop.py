"""Stop a deployment, and end what engines without a supervisor have left."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from gemma_serve.adapters.engine_orphans import EngineOrphan, find_orphans
from gemma_serve.adapters.state import Deployment, DeploymentFolder
from gemma_serve.engine.inbox import Inbox
from gemma_serve.engine.ladder import GRACE_S, KILL_TIMEOUT_S, LINGER_S
from gemma_serve.engine.processes import lives, send
from gemma_serve.errors import GemmaServeError, Problem, Stopped, UsageError
from gemma_serve.planning.process_id import ProcessId
from gemma_serve.usecases.deployments import (
    Settled,
    find_running,
    settle,
    settle_all,
    supervisor_of,
)
from gemma_serve.usecases.events import EngineStopped, OnEvent, Stopping, read_event
from gemma_serve.usecases.proof import PROOF_TIMEOUT_S, stop_problems
from gemma_serve.usecases.run import read_run

# A supervisor that is not done this long after its clock has run out hangs, or is halted.
_PATIENCE_S = LINGER_S + KILL_TIMEOUT_S + PROOF_TIMEOUT_S + 3.0
_TICK_S = 0.1


@dataclass(frozen=True)
class StopResult:
    """What `stop` did. `stopped` is None where only leftovers of a killed supervisor were ended.

    `forced` says that the supervisor itself had to be killed.
    """

    name: str
    stopped: EngineStopped | None
    ended: tuple[int, ...]
    forced: bool
    duration_s: float

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What is not as it should be after a stop."""
        return () if self.stopped is None else stop_problems(self.stopped)


def stop(
    name: str | None,
    *,
    drain_timeout: float | None,
    environ: Mapping[str, str],
    on_event: OnEvent,
) -> StopResult:
    """Stop the deployment that is meant and wait until nothing of it is left.

    A first signal to us hurries the supervisor, which then kills at once.

    Args:
        drain_timeout: how long requests in flight may go on; None leaves it to the deployment.

    Raises:
        GemmaServeError: nothing of that name runs.
        UsageError: it can't drain that long.
    """
    found = find_running(name, environ)
    if not found.running:
        return _only_leftovers(found)
    folder = DeploymentFolder(found.deployment.folder)
    supervisor = _living_supervisor(found.deployment, folder)
    drain_s = _drain_s(folder, drain_timeout)
    begun = time.monotonic()
    with Inbox() as inbox:
        if drain_timeout is not None:
            folder.write_json(folder.stop_request, {"drain_timeout": drain_timeout})
        on_event(Stopping("asked to", drain_s + GRACE_S))
        at = _end_of(folder)
        send(supervisor, signal.SIGTERM)
        send(supervisor, signal.SIGCONT)  # one that was halted hears it only then
        forced = _wait_for_end(supervisor, inbox, drain_s)
    settled = settle(found.deployment.name, environ)
    stopped = _how_it_stopped(folder, at)
    if stopped is not None:
        on_event(stopped)
    if settled is not None and settled.running:
        raise _still_there(found.deployment.name)
    if settled is not None and settled.deployment.state != "stopped":
        # It was ended as it was asked to, if not by its supervisor.
        folder.save(replace(settled.deployment, state="stopped", problem=None))
    ended = () if settled is None else settled.ended
    return StopResult(found.deployment.name, stopped, ended, forced, time.monotonic() - begun)


def _still_there(name: str) -> GemmaServeError:
    return GemmaServeError(
        f"the supervisor of {name} was killed, and something still holds the deployment",
        code="stop.still_there",
        hint=f"look at it with `gemma-serve status {name}`, and at `dmesg`",
    )


def _only_leftovers(found: Settled) -> StopResult:
    if found.ended:
        return StopResult(found.deployment.name, None, found.ended, forced=False, duration_s=0.0)
    raise GemmaServeError(
        f"{found.deployment.name} is not running, it is {found.deployment.state}",
        code="deployment.not_running",
        hint=f"`gemma-serve status {found.deployment.name}` says why; "
        f"`gemma-serve restart {found.deployment.name}` starts it",
    )


def _living_supervisor(deployment: Deployment, folder: DeploymentFolder) -> ProcessId:
    supervisor = supervisor_of(folder, deployment)
    if supervisor is None:
        raise GemmaServeError(
            f"{deployment.name} runs, but its record is damaged and names no supervisor",
            code="state.unreadable",
            hint=f"find it with `fuser {folder.path / 'lock'}` and end it with SIGTERM",
        )
    return supervisor


def _drain_s(folder: DeploymentFolder, wanted: float | None) -> float:
    """How long it will drain; vLLM drains no longer than it was started for."""
    try:
        run = read_run(folder.read_json(folder.run) or {})
    except (TypeError, KeyError):
        return wanted or 0.0
    if wanted is None:
        return run.drain_timeout
    if wanted > run.longest_drain_s:
        raise UsageError(
            f"--drain-timeout {wanted:g} is longer than this engine can drain, which is "
            f"{run.longest_drain_s:g} s",
            code="stop.drain_too_long",
            hint=f"say at most {run.longest_drain_s:g}, or start it with a longer one: "
            f"gemma-serve up --shutdown-timeout {wanted:.0f}",
        )
    return wanted


def _wait_for_end(supervisor: ProcessId, inbox: Inbox, drain_s: float) -> bool:
    """Wait for the supervisor; whether it had to be killed, so that its guard does the rest."""
    until = time.monotonic() + drain_s + GRACE_S + _PATIENCE_S
    forwarded = 0
    forced = False
    while lives(supervisor):
        for _ in inbox.signals[forwarded:]:
            send(supervisor, signal.SIGTERM)
            forwarded += 1
            until = min(until, time.monotonic() + GRACE_S + _PATIENCE_S)
        if forwarded > 1:
            raise Stopped(inbox.signals[-1])
        if time.monotonic() > until:
            send(supervisor, signal.SIGKILL)
            forced = True
        inbox.wait(_TICK_S)
    return forced


def _end_of(folder: DeploymentFolder) -> int:
    try:
        return folder.events.stat().st_size
    except OSError:
        return 0


def _how_it_stopped(folder: DeploymentFolder, at: int) -> EngineStopped | None:
    """What the supervisor wrote of it since `at`."""
    try:
        with folder.events.open("rb") as file:
            file.seek(at)
            lines = file.read().splitlines()
    except OSError:
        return None
    found = None
    for line in lines:
        with suppress(ValueError):
            event = read_event(json.loads(line))
            found = event if isinstance(event, EngineStopped) else found
    return found


@dataclass(frozen=True)
class OrphansResult:
    """The pids of ours that were ended, by deployment, and the orphans of others, untouched."""

    ended: Mapping[str, tuple[int, ...]]
    others: tuple[EngineOrphan, ...]


def stop_orphans(environ: Mapping[str, str]) -> OrphansResult:
    """End the engines that nobody looks after and that deployments of ours have left.

    Ours is what a record names, by pid and start time, and whatever is in its session. Others'
    are only named.
    """
    settled = settle_all(environ)
    ended = {one.deployment.name: one.ended for one in settled if one.ended}
    return OrphansResult(ended, find_orphans())
