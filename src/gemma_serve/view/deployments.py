"""Deployments as text and as JSON: one with all that is known of it, or all as a table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gemma_serve.adapters.state import Deployment
from gemma_serve.errors import Problem
from gemma_serve.usecases.deployments import Settled
from gemma_serve.usecases.status import DeploymentStatus, Load
from gemma_serve.view.diagnosis import diagnosis_data, evidence_lines
from gemma_serve.view.orphans import orphan_data, orphan_problem
from gemma_serve.view.times import age_text
from gemma_serve.view.up import silence_text

if TYPE_CHECKING:
    from rich.table import Table


def status_data(status: DeploymentStatus) -> dict[str, Any]:
    """The `data` of `status --json`."""
    return {
        **deployment_data(status.deployment),
        "running": status.running,
        "supervisor_pid": _supervisor_pid(status),
        "phase": status.deployment.phase if status.phase_s is not None else None,
        "phase_s": _rounded(status.phase_s),
        "last_phases_s": dict(status.last_phases_s),
        "last_ready_s": _rounded(status.last_ready_s),
        "silent_s": _rounded(status.silent_s),
        "load": None if status.load is None else _load_data(status.load),
        "diagnosis": None if status.diagnosis is None else diagnosis_data(status.diagnosis),
        "ended_pids": list(status.ended),
        "orphans": [orphan_data(orphan) for orphan in status.orphans],
    }


def deployment_data(deployment: Deployment) -> dict[str, Any]:
    """What is known of a deployment without asking its engine."""
    problem = deployment.problem
    return {
        "name": deployment.name,
        "state": deployment.state,
        "since": deployment.changed_at,
        "url": deployment.url,
        "model": deployment.model,
        "served_model_name": deployment.served_model_name,
        "needs_key": deployment.needs_key,
        "engine": deployment.engine,
        "gpus": list(deployment.gpus),
        "started_at": deployment.started_at,
        "ready_s": _rounded(deployment.ready_s),
        "detached": deployment.detached,
        "restart": deployment.restart,
        "restarts": deployment.restarts,
        "last_death": deployment.last_death or None,
        "pid": None if deployment.leader is None else deployment.leader.pid,
        "log": str(deployment.log),
        "events": str(deployment.events),
        "cause": None
        if problem is None
        else {"code": problem.code, "message": problem.message, "hint": problem.hint},
    }


def _load_data(load: Load) -> dict[str, Any]:
    metrics = load.metrics
    return {
        "requests_running": metrics.requests_running,
        "requests_waiting": metrics.requests_waiting,
        "kv_cache_usage": round(metrics.kv_cache_usage, 4),
        "tokens_per_s": round(load.tokens_per_s, 1),
        "prefix_cache_hit_rate": metrics.prefix_cache_hit_rate,
    }


def _supervisor_pid(status: DeploymentStatus) -> int | None:
    supervisor = status.deployment.supervisor
    return supervisor.pid if status.running and supervisor is not None else None


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def status_text(status: DeploymentStatus) -> str:
    """One deployment for a person, a line for each thing that matters now."""
    deployment = status.deployment
    lines = [f"{deployment.name}: {_state_line(status)}"]
    if deployment.url and status.running:
        lines.append(f"  {deployment.served_model_name} at {deployment.url}/v1")
    if status.load is not None:
        lines.append(f"  {_load_line(status.load)}")
    if status.silent_s is not None:
        lines.append(f"  {silence_text(status.silent_s, deployment.phase)}")
    if status.phase_s is not None and status.last_phases_s:
        took = ", ".join(f"{name} {s:.1f} s" for name, s in status.last_phases_s.items())
        lines.append(f"  last time: {took}")
    if deployment.restarts:
        times = "once" if deployment.restarts == 1 else f"{deployment.restarts} times"
        lines.append(f"  restarted {times}, the last time since {deployment.last_death}")
    if status.diagnosis is not None:
        lines += [f"  {line}" for line in evidence_lines(status.diagnosis)]
    if deployment.engine:
        where = f" on {len(deployment.gpus)} GPU" if deployment.gpus else ""
        pid = "" if deployment.leader is None else f", pid {deployment.leader.pid}"
        lines.append(f"  {deployment.engine}{where}{pid}, its log {deployment.log}")
    return "\n".join(lines)


def _state_line(status: DeploymentStatus) -> str:
    deployment = status.deployment
    if status.phase_s is not None:
        last = status.last_phases_s.get(deployment.phase)
        before = "" if last is None else f", {last:.1f} s last time"
        return f"{deployment.state}, in {deployment.phase} for {status.phase_s:.0f} s{before}"
    since = age_text(status.now - deployment.changed_at) if deployment.changed_at else ""
    state = f"{deployment.state} for {since}" if since else deployment.state
    if deployment.state == "ready" and deployment.ready_s is not None:
        return f"{state}, after a start of {deployment.ready_s:.1f} s"
    return state


def _load_line(load: Load) -> str:
    metrics = load.metrics
    return (
        f"{metrics.requests_running} requests running, {metrics.requests_waiting} waiting, "
        f"KV cache {metrics.kv_cache_usage:.1%} in use, {load.tokens_per_s:.0f} tokens/s"
    )


def status_problems(status: DeploymentStatus) -> tuple[Problem, ...]:
    """Why it doesn't answer, what was ended for it, and engines that nobody looks after."""
    deployment = status.deployment
    found = []
    if deployment.problem is not None:
        found.append(deployment.problem)
    if deployment.state == "unreadable":
        found.append(_damaged(deployment))
    if status.ended:
        found.append(ended_problem(deployment.name, status.ended))
    found += [orphan_problem(orphan) for orphan in status.orphans]
    return tuple(found)


def _damaged(deployment: Deployment) -> Problem:
    return Problem(
        "state.unreadable",
        f"the record of {deployment.name} in {deployment.folder} can't be read",
        f"`gemma-serve stop {deployment.name}` and `up` write a new one",
    )


def ended_problem(name: str, pids: Sequence[int]) -> Problem:
    """That processes were ended which a killed supervisor had left."""
    listed = ", ".join(map(str, pids))
    return Problem(
        "deployment.leftovers_ended",
        f"{name} was left without a supervisor, and its processes were ended: {listed}",
        blocking=False,
    )


def deployments_table(settled: Sequence[Settled]) -> Table | str:
    """All deployments, a line each."""
    if not settled:
        return "no deployments; start one with `gemma-serve up`"
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for column in ("name", "state", "for", "model", "url"):
        table.add_column(column, overflow="fold")
    now = time.time()
    for one in settled:
        deployment = one.deployment
        age = age_text(now - deployment.changed_at) if deployment.changed_at else ""
        url = deployment.url if one.running else ""
        table.add_row(deployment.name, deployment.state, age, deployment.model, url)
    return table
