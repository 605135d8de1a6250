"""Which deployments there are, which one is meant, and whether anybody still looks after it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from gemma_serve.adapters.state import (
    Deployment,
    DeploymentFolder,
    Lock,
    all_deployments,
    claim_name,
    claim_port,
    deployment_folder,
)
from gemma_serve.engine.guarded import Family, end_family
from gemma_serve.engine.processes import boot_id, identify, lives, survivors
from gemma_serve.errors import GemmaServeError, Problem, UsageError
from gemma_serve.planning.process_id import ProcessId

# What a guard whose supervisor was killed needs to end its engine, and then some.
_GUARD_TIMEOUT_S = 15.0

LIVE = ("starting", "ready", "unhealthy", "restarting", "stopping")


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
        if deployment is None or (supervisor := _supervisor(folder, deployment)) is None:
            # It was begun this moment.
            time.sleep(0.05)
            if deployment is None and time.monotonic() < until:
                continue
            return None if deployment is None else Settled(deployment, running=True)
        if lives(supervisor):
            return Settled(deployment, running=True)
        if time.monotonic() > until:
            _end_leftovers(deployment)
            until = time.monotonic() + _GUARD_TIMEOUT_S
        time.sleep(0.05)
    with lock:
        deployment = folder.load()
        return None if deployment is None else _settled(folder, deployment)


def _supervisor(folder: DeploymentFolder, deployment: Deployment) -> ProcessId | None:
    """Who holds the name, also where the record is damaged."""
    if deployment.supervisor is not None:
        return deployment.supervisor
    pid = folder.holder()
    return None if pid is None else identify(pid)


def _settled(folder: DeploymentFolder, deployment: Deployment) -> Settled:
    """The deployment, which nobody looks after any more."""
    if deployment.state not in LIVE:
        return Settled(deployment, running=False)
    ended = _end_leftovers(deployment)
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
    family = family_of(deployment)
    if family is None or deployment.boot_id != boot_id():
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
    settled = (settle(deployment.name, environ) for deployment in all_deployments(environ))
    return [one for one in settled if one is not None]


def find_deployment(name: str | None, environ: Mapping[str, str]) -> Settled:
    """The deployment that is meant: `name`, else the only one that runs, else the only one.

    Raises:
        GemmaServeError: there is none, or none of that name.
        UsageError: there are several, and none was named.
    """
    if name is not None:
        found = settle(name, environ)
        if found is None:
            known = ", ".join(one.name for one in all_deployments(environ))
            raise GemmaServeError(
                f"there is no deployment {name}",
                code="deployment.unknown",
                hint=f"there is {known}" if known else "start one with `gemma-serve up`",
            )
        return found
    settled = settle_all(environ)
    running = [one for one in settled if one.running]
    if len(running) == 1 or len(settled) == 1:
        return (running or settled)[0]
    if not settled:
        raise GemmaServeError(
            "no deployment is known on this machine",
            code="deployment.none",
            hint="start one with `gemma-serve up`",
        )
    names = ", ".join(one.deployment.name for one in running or settled)
    raise UsageError(
        f"there are {len(running or settled)} deployments: {names}",
        code="deployment.several",
        hint="name one of them; `gemma-serve list` shows them all",
    )


@contextmanager
def claim(name: str, port: int, environ: Mapping[str, str]) -> Iterator[tuple[int, ...]]:
    """Have the name and the port for ourselves; the descriptors that keep them.

    Raises:
        GemmaServeError: a deployment of that name runs, or another has the port.
        UsageError: the state folder can't be written.
    """
    refuse_if_running(name, environ)
    lock = claim_name(name, environ)
    if lock is None:
        raise _running(name, "starting")
    with lock:
        port_lock: Lock = claim_port(port, environ)
        with port_lock:
            deployment_folder(name, environ).write_holder(lock)
            yield (lock.fd, port_lock.fd)


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
    return GemmaServeError(
        f"{name} is already there, and is {state}",
        code="deployment.running",
        hint=f"start it anew with `gemma-serve restart {name}`, look at it with "
        f"`gemma-serve status {name}`, or start another beside it: --name OTHER --port 0",
    )
