"""How a deployment is: its state, what its engine is doing, and what it holds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from gemma_serve.adapters.engine_orphans import EngineOrphan, find_orphans
from gemma_serve.adapters.metrics import EngineMetrics, read_metrics
from gemma_serve.adapters.openai_api import EndpointError
from gemma_serve.adapters.state import Deployment, DeploymentFolder
from gemma_serve.engine.diagnosis.diagnosis import Diagnosis
from gemma_serve.engine.timeline import SILENCE_S
from gemma_serve.usecases.deployments import Settled, find_deployment, settle_all
from gemma_serve.usecases.diagnose import kept_diagnosis

# Between the two readings of the counters that a rate is made of.
_RATE_OVER_S = 1.0
_ANSWERS = ("ready", "unhealthy")


@dataclass(frozen=True)
class Load:
    """What a ready engine is doing. `tokens_per_s` are those generated during one second."""

    metrics: EngineMetrics
    tokens_per_s: float


@dataclass(frozen=True)
class DeploymentStatus:
    """One deployment as it is now.

    `phase_s` is how long it has been in its phase of the start, and `last_phases_s` how long each
    phase took at the last good start, with `last_ready_s` for all of it. `silent_s` is how long
    its engine has printed nothing, None where that is as usual. `load` is None where the engine
    doesn't tell. `diagnosis` is why it failed, if it did. `orphans` are engines on this machine
    that nobody looks after.
    """

    deployment: Deployment
    running: bool
    ended: tuple[int, ...]
    now: float
    phase_s: float | None
    last_phases_s: Mapping[str, float]
    last_ready_s: float | None
    silent_s: float | None
    load: Load | None
    diagnosis: Diagnosis | None
    orphans: tuple[EngineOrphan, ...]

    @property
    def ok(self) -> bool:
        """Whether it answers."""
        return self.running and self.deployment.state == "ready"


def read_status(name: str | None, environ: Mapping[str, str]) -> DeploymentStatus:
    """The status of the deployment that is meant (see `find_deployment`)."""
    settled = find_deployment(name, environ)
    deployment = settled.deployment
    folder = DeploymentFolder(deployment.folder)
    now = time.time()
    starting = settled.running and deployment.state == "starting"
    phases, ready_s = _last_start(folder)
    return DeploymentStatus(
        deployment=deployment,
        running=settled.running,
        ended=settled.ended,
        now=now,
        phase_s=now - deployment.phase_began_at if starting else None,
        last_phases_s=phases,
        last_ready_s=ready_s,
        silent_s=_silence(deployment, now) if starting else None,
        load=_load(deployment) if settled.running and deployment.state in _ANSWERS else None,
        diagnosis=kept_diagnosis(folder) if deployment.state == "failed" else None,
        orphans=find_orphans(),
    )


def list_deployments(environ: Mapping[str, str]) -> list[Settled]:
    """Every deployment that is known, by name, as it really is."""
    return settle_all(environ)


def _last_start(folder: DeploymentFolder) -> tuple[dict[str, float], float | None]:
    """The phases of the last good start and its length; nothing where they can't be read."""
    timeline = folder.read_json(folder.timeline) or {}
    try:
        phases = {str(name): float(s) for name, s in timeline["phases"].items()}
        return phases, float(timeline["ready_s"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}, None


def _silence(deployment: Deployment, now: float) -> float | None:
    try:
        silent_s = now - deployment.log.stat().st_mtime
    except OSError:
        return None
    return silent_s if silent_s >= SILENCE_S else None


def _load(deployment: Deployment) -> Load | None:
    try:
        before = read_metrics(deployment.url)
        begun = time.monotonic()
        time.sleep(_RATE_OVER_S)
        after = read_metrics(deployment.url)
    except EndpointError:
        return None
    tokens = after.generation_tokens - before.generation_tokens
    return Load(after, max(0.0, tokens / (time.monotonic() - begun)))
