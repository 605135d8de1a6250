"""`up --auto-fix`: the fixes that are safe and certain, each tried once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from gemma_serve.adapters import host
from gemma_serve.adapters.gpu import read_gpus
from gemma_serve.adapters.package_data import load_failures
from gemma_serve.adapters.state import DeploymentFolder, deployment_folder
from gemma_serve.errors import EngineFailed, GemmaServeError
from gemma_serve.planning.failures import Change, FailureCatalogue, Remedy
from gemma_serve.usecases.diagnose import kept_diagnosis
from gemma_serve.usecases.events import AutoFixed, OnEvent

T = TypeVar("T")
Flags = Mapping[str, Any]
Environ = Mapping[str, str]

MOST_FIXES = 3
# Memory is taken for released when as much of it was used twice, this many seconds apart.
_STILL_S = 3.0
_LONGEST_WAIT_S = 60.0


@dataclass(frozen=True)
class Fix:
    """What mends one failure: other flags, another environment, or a wait; `what` names it."""

    id: str
    what: str
    flags: Flags
    environ: Environ
    waits: bool = False


def start_with_fixes(
    start: Callable[[Flags, Environ, Callable[[str], None]], T],
    flags: Flags,
    environ: Environ,
    *,
    on_event: OnEvent,
) -> T:
    """What `start` returns, after as many fixes as it takes: three at most, each tried once.

    Args:
        start: starts a deployment, and before it does calls its last argument with the name.

    Raises:
        GemmaServeError: `start`'s, when there is no fix for it.
    """
    tried: set[str] = set()
    while True:
        names: list[str] = []
        try:
            return start(flags, environ, names.append)
        except GemmaServeError as error:
            folder = deployment_folder(names[0], environ) if names else None
            fix = find_fix(error, folder, flags, environ, load_failures())
            if fix is None or fix.id in tried or len(tried) == MOST_FIXES:
                raise
            message = str(error)
        tried.add(fix.id)
        on_event(AutoFixed(fix.id, message, fix.what, len(tried)))
        if fix.waits:
            wait_for_release(used_memory_bytes, time.sleep)
        flags, environ = fix.flags, fix.environ


def find_fix(
    error: GemmaServeError,
    folder: DeploymentFolder | None,
    flags: Flags,
    environ: Environ,
    catalogue: FailureCatalogue,
) -> Fix | None:
    """What mends `error`, if that is safe and certain.

    Args:
        folder: of the deployment that was begun; None for a refusal before that.
    """
    if not isinstance(error, EngineFailed) or folder is None:
        return _before_start(error, flags, environ, catalogue)
    if not _failed_while_starting(folder):
        return None
    found = kept_diagnosis(folder)
    if error.problems[0].code == "engine.phase_timeout" and (found is None or found.id is None):
        return _longer_phase(folder, flags, environ)
    if found is None or found.id is None or found.remedy is None:
        return None
    return _fix_for(found.id, found.remedy, found.change, flags, environ)


def _before_start(
    error: GemmaServeError, flags: Flags, environ: Environ, catalogue: FailureCatalogue
) -> Fix | None:
    """A fix for the first refusal, if each one that is in the way has one."""
    fixes = []
    for problem in error.problems:
        remedy = catalogue[problem.code].remedy if problem.code in catalogue else None
        if remedy is None:
            return None
        change = Change(problem.settings) if problem.settings else None
        fixes.append(_fix_for(problem.code, remedy, change, flags, environ))
    return fixes[0] if all(fixes) else None


def used_memory_bytes() -> int:
    """The memory in use where engines run: on all GPUs, or where there is none the main memory."""
    gpus = read_gpus().gpus
    if gpus:
        return sum(gpu.used_bytes for gpu in gpus)
    return host.total_memory_bytes() - host.available_memory_bytes()


def wait_for_release(used_memory: Callable[[], int], sleep: Callable[[float], None]) -> None:
    """Wait until no memory is being given back any more, a minute at most."""
    last = used_memory()
    for _ in range(int(_LONGEST_WAIT_S / _STILL_S)):
        sleep(_STILL_S)
        now = used_memory()
        if now >= last:
            return
        last = now


def _failed_while_starting(folder: DeploymentFolder) -> bool:
    deployment = folder.load()
    return deployment is not None and deployment.ready_s is None


def _fix_for(
    id_: str, remedy: Remedy, change: Change | None, flags: Flags, environ: Environ
) -> Fix | None:
    if remedy == "another-port":
        return _another_port(id_, flags, environ)
    if remedy == "wait-for-memory":
        return Fix(id_, "wait for memory that is being released", flags, environ, waits=True)
    if remedy == "purge-compile-cache":
        # The supervisor has marked it, and the next start sets aside what is marked.
        return Fix(id_, "start without what was compiled before", flags, environ)
    if change is None:
        return None
    said = [f"--{name.replace('_', '-')} {value}" for name, value in change.settings.items()]
    said += [f"{name}={value}" for name, value in change.environment.items()]
    changed = {**flags, **change.settings}, {**environ, **change.environment}
    return Fix(id_, " ".join(said), *changed)


def _another_port(id_: str, flags: Flags, environ: Environ) -> Fix:
    address = str(flags.get("host") or environ.get("GEMMA_SERVE_HOST") or "127.0.0.1")
    port = next(_free_ports(address, flags.get("port") or environ.get("GEMMA_SERVE_PORT")))
    return Fix(id_, f"--port {port}", {**flags, "port": str(port)}, environ)


def _free_ports(address: str, taken: Any) -> Iterator[int]:
    """Ports that are free, those after the one that is taken first."""
    first = int(taken) if str(taken or "").isdigit() else 8000
    for port in range(first + 1, min(first + 100, 65536)):
        if host.port_problem(address, port) is None:
            yield port
    yield host.free_port(address)


def _longer_phase(folder: DeploymentFolder, flags: Flags, environ: Environ) -> Fix | None:
    """Twice the time for the phase that took too long."""
    deployment = folder.load()
    limits = (folder.read_json(folder.run) or {}).get("phase_limits_s", {})
    if deployment is None or deployment.phase not in limits:
        return None
    phase = deployment.phase.replace(" ", "-")
    limit = f"{2 * float(limits[deployment.phase]):.0f}"
    given = dict(flags.get("phase_timeouts") or {})
    changed = {**flags, "phase_timeouts": {**given, phase: limit}}
    return Fix("engine.phase_timeout", f"--phase-timeout {phase}={limit}", changed, environ)
