"""Compiled graphs that are not to be trusted: a start that ends while it compiles marks them.

The mark is written before anything can go wrong, since a supervisor that is killed can't do it
later, and taken away when the compilation is over.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from gemma_serve.adapters.engine_caches import engine_caches_dir, set_aside
from gemma_serve.adapters.state import DeploymentFolder, all_deployments
from gemma_serve.engine.processes import lives
from gemma_serve.errors import Problem, UsageError
from gemma_serve.planning.engine_caches import compiled_folders
from gemma_serve.planning.phases import PHASES
from gemma_serve.usecases.run import Run, read_run

_COMPILING = "compilation"


def note_phase(phase: str, run: Run, folder: DeploymentFolder) -> None:
    """Set the mark when `phase` is the compilation, and take it away in those after it."""
    if phase == _COMPILING:
        mark_compiled(run, folder)
    elif PHASES.index(phase) > PHASES.index(_COMPILING):
        with suppress(OSError):
            folder.suspect.unlink()


def mark_compiled(run: Run, folder: DeploymentFolder) -> None:
    """Set the mark: the next start is not to use what this one has compiled, or tried to use."""
    folders = [str(place) for place in compiled_folders(run.environment)]
    with suppress(UsageError):  # a full disk; then there is nothing new in the cache either
        folder.write_json(folder.suspect, {"folders": folders})


def set_stale_aside(
    run: Run, folder: DeploymentFolder, environ: Mapping[str, str]
) -> Problem | None:
    """Move marked caches out of the way of a start; what was moved, to tell.

    One that another engine of ours runs from stays, and so does its mark.
    """
    suspect = folder.read_json(folder.suspect)
    if suspect is None or _is_shared(run, environ):
        return None
    folders = [Path(str(place)) for place in suspect.get("folders", ())]
    moved = set_aside(folders, caches_dir=engine_caches_dir(run.cache_dir, environ))
    with suppress(OSError):
        folder.suspect.unlink()
    if not moved:
        return None
    where = ", ".join(map(str, moved))
    message = f"the last start ended while it compiled, so its cache was set aside: {where}"
    return Problem("engine.cache_set_aside", message, blocking=False)


def _is_shared(run: Run, environ: Mapping[str, str]) -> bool:
    """Whether another engine of ours may be using the same cache."""
    others = (one for one in all_deployments(environ) if one.name != run.name)
    living = (one for one in others if one.supervisor is not None and lives(one.supervisor))
    return any(_root_of(DeploymentFolder(one.folder)) == _root(run) for one in living)


def _root_of(folder: DeploymentFolder) -> str | None:
    try:
        return _root(read_run(folder.read_json(folder.run) or {}))
    except (TypeError, KeyError):
        return None


def _root(run: Run) -> str | None:
    return run.environment.get("VLLM_CACHE_ROOT")
