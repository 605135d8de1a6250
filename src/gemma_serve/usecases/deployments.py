"""Which deployments there are, which one is meant, and whether anybody still looks after it."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from gemma_serve.adapters.claims import Claim, Lock, claim_name, claim_port, read_holder
from gemma_serve.adapters.state import (
    Deployment,
    DeploymentFolder,
    all_deployments,
    deployment_folder,
)
from gemma_serve.engine.guarded import Family, end_family
from gemma_serve.engine.processes import boot_id, identify, lives, send, survivors
from gemma_serve.engine.shared_files import remove_temporary_folder
from gemma_serve.errors import GemmaServeError, Problem, UsageError
from gemma_serve.planning.process_id import ProcessId
from gemma_serve.usecases.known_failures import named_as_known

# What a guard whose supervisor was killed needs to end its engine, and then some.
_GUARD_TIMEOUT_S = 15.0
# Whoever only looks at a deployment has its name for a moment.
_LOOK_TIMEOUT_S = 2.0

# As `--name` takes them: anything else is no folder of ours.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")

_LIVE = ("starting", "ready", "unhealthy", "restarting", "stopping")


@dataclass(frozen=True)
class Settled:
    """A deployment as it really is. `running`: its supervisor lives and looks after it.

    `ended` are the processes that its supervisor and guard had left behind, ended just now.
    """

    deployment: Deployment
    running: bool
    ended: tuple[int, ...] = ()


def settle(name: str, environ: Mapping[str, str]) -> Settled | None:
    """Look whether somebody looks after `name`, and finish what a killed supervisor left.

    A guard whose supervisor is gone is waited for, and ended if it doesn't come to an end. What
    is written down of an engine without either is ended: by pid and start time in this boot of
    the machine, so never a stranger. None where nothing is known of `name`.

    Raises:
        UsageError: the state folder can't be written.
    """
    folder = deployment_folder(name, environ)
    if not folder.path.is_dir():
        return None
    until = time.monotonic() + _GUARD_TIMEOUT_S
    while (lock := claim_name(name, environ)) is None:
        deployment = folder.load()
        if deployment is None or (supervisor := supervisor_of(folder, deployment)) is None:
            # It was begun this moment.
            time.sleep(0.05)
            if deployment is None and time.monotonic() < until:
                continue
            return None if deployment is None else Settled(deployment, running=True)
        if lives(supervisor):
            return Settled(deployment, running=True)
        if deployment.boot_id == boot_id() and deployment.guard is not None:
            send(deployment.guard, signal.SIGCONT)  # one that was halted does its work then
            if time.monotonic() > until:
                send(deployment.guard, signal.SIGKILL)
        if time.monotonic() > until + _LOOK_TIMEOUT_S:
            raise _locked(folder)
        time.sleep(0.05)
    with lock:
        deployment = folder.load()
        return None if deployment is None else _settled(folder, deployment)


def _locked(folder: DeploymentFolder) -> GemmaServeError:
    return GemmaServeError(
        f"somebody holds {folder.path / 'lock'}, and it is no supervisor of {folder.name}",
        code="deployment.locked",
        hint=f"find out who with `fuser {folder.path / 'lock'}`",
    )


def supervisor_of(folder: DeploymentFolder, deployment: Deployment) -> ProcessId | None:
    """Who holds the name, also where the record is damaged."""
    if deployment.supervisor is not None:
        return deployment.supervisor
    return read_holder(folder, boot_id())


def _settled(folder: DeploymentFolder, deployment: Deployment) -> Settled:
    """The deployment, which nobody looks after any more."""
    ended = _end_leftovers(deployment)
    if deployment.state not in _LIVE:
        return Settled(deployment, running=False, ended=ended)
    failed = replace(
        deployment,
        state="failed",
        changed_at=time.time(),
        guard=None,
        leader=None,
        members=(),
        shared_files=(),
        problem=_abandoned(deployment),
    )
    folder.save(failed)
    return Settled(failed, running=False, ended=ended)


def _abandoned(deployment: Deployment) -> Problem:
    pid = deployment.supervisor.pid if deployment.supervisor else 0
    if deployment.boot_id != boot_id():
        said = f"the machine was restarted while it was {deployment.state}"
    else:
        said = f"its supervisor (pid {pid}) was killed while it was {deployment.state}"
    return Problem(
        "supervisor.killed", said, f"start it again: gemma-serve restart {deployment.name}"
    )


def _end_leftovers(deployment: Deployment) -> tuple[int, ...]:
    """End what a supervisor and its guard left of an engine; the pids of the ended."""
    if deployment.boot_id != boot_id():
        return ()
    family = family_of(deployment)
    if family is None:
        if deployment.temporary_folder is not None:
            remove_temporary_folder(deployment.temporary_folder)
        return ()
    left = survivors(family.members, family.guard.pid)
    end_family(family)
    return tuple(process.pid for process in left)


def family_of(deployment: Deployment) -> Family | None:
    """What is written down of its engine; None where there is none, or was none yet."""
    if deployment.guard is None or deployment.leader is None:
        return None
    assert deployment.temporary_folder is not None
    return Family(
        deployment.guard,
        deployment.leader,
        deployment.members,
        deployment.shared_files,
        deployment.temporary_folder,
    )


def settle_all(environ: Mapping[str, str]) -> list[Settled]:
    """Every deployment as it really is, by name."""
    settled = (_settled_or_held(deployment, environ) for deployment in all_deployments(environ))
    return [one for one in settled if one is not None]


def _settled_or_held(deployment: Deployment, environ: Mapping[str, str]) -> Settled | None:
    """One that somebody else holds doesn't hide the others."""
    try:
        return settle(deployment.name, environ)
    except GemmaServeError as error:
        if error.problems[0].code != "deployment.locked":
            raise
        return Settled(replace(deployment, problem=error.problems[0]), running=True)


def find_deployment(name: str | None, environ: Mapping[str, str]) -> Settled:
    """The deployment that is meant: `name`, else the only one that runs, else the only one.

    Raises:
        GemmaServeError: there is none, or none of that name.
        UsageError: there are several, and none was named.
    """
    if name is not None:
        return _named(name, environ)
    settled = settle_all(environ)
    if not settled:
        raise GemmaServeError(
            "no deployment is known on this machine",
            code="deployment.none",
            hint="start one with `gemma-serve up`",
        )
    return _only([one for one in settled if one.running] or settled)


def find_running(name: str | None, environ: Mapping[str, str]) -> Settled:
    """The deployment to stop: `name`, else the only one of which anything runs, or did just now.

    Raises:
        GemmaServeError: there is none of that name, or nothing runs.
        UsageError: several run, and none was named.
    """
    if name is not None:
        return _named(name, environ)
    living = [one for one in settle_all(environ) if one.running or one.ended]
    if not living:
        raise GemmaServeError(
            "no deployment is running",
            code="deployment.not_running",
            hint="`gemma-serve list` shows what there is",
        )
    return _only(living)


def _named(name: str, environ: Mapping[str, str]) -> Settled:
    found = settle(name, environ) if _NAME.fullmatch(name) else None
    if found is None:
        known = ", ".join(one.name for one in all_deployments(environ))
        raise GemmaServeError(
            f"there is no deployment {name}",
            code="deployment.unknown",
            hint=f"there is {known}" if known else "start one with `gemma-serve up`",
        )
    return found


def _only(settled: Sequence[Settled]) -> Settled:
    if len(settled) == 1:
        return settled[0]
    names = ", ".join(one.deployment.name for one in settled)
    raise UsageError(
        f"there are {len(settled)} deployments: {names}",
        code="deployment.several",
        hint="name one of them; `gemma-serve list` shows them all",
    )


@contextmanager
def claim(name: str, port: int, environ: Mapping[str, str]) -> Iterator[Claim]:
    """Have the name and the port for ourselves, and for whoever inherits the claim.

    Raises:
        GemmaServeError: a deployment of that name runs, or another has the port.
        UsageError: the state folder can't be written.
    """
    refuse_if_running(name, environ)
    until = time.monotonic() + _LOOK_TIMEOUT_S
    while (lock := claim_name(name, environ)) is None:
        if time.monotonic() > until:
            raise _running(name, "starting")
        time.sleep(0.02)
    with lock, _claim_port(port, environ) as port_lock:
        claimed = Claim(lock, port_lock)
        hold(claimed)
        yield claimed


def _claim_port(port: int, environ: Mapping[str, str]) -> Lock:
    with named_as_known():
        return claim_port(port, environ)


def hold(claimed: Claim) -> None:
    """Note that the claim is this process's, for when the record gets damaged."""
    holder = identify(os.getpid())
    if holder is not None:
        claimed.note_holder(holder, boot_id())


def refuse_if_running(name: str, environ: Mapping[str, str]) -> tuple[int, ...]:
    """Make sure that nobody looks after `name`; the pids of leftovers that were ended for it.

    Raises:
        GemmaServeError: somebody does.
    """
    found = settle(name, environ)
    if found is not None and found.running:
        raise _running(name, found.deployment.state)
    return () if found is None else found.ended


def _running(name: str, state: str) -> GemmaServeError:
    if state == "stopping":
        return GemmaServeError(
            f"{name} is being stopped",
            code="deployment.running",
            hint=f"wait until `gemma-serve status {name}` says stopped",
        )
    return GemmaServeError(
        f"{name} is already there, and is {state}",
        code="deployment.running",
        hint=f"start it anew with `gemma-serve restart {name}`, look at it with "
        f"`gemma-serve status {name}`, or start another beside it: --name OTHER --port 0",
    )
