"""Start a deployment anew, with the settings that it was started with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_serve.adapters.settings import API_KEY_VARIABLE
from gemma_serve.adapters.state import DeploymentFolder
from gemma_serve.errors import GemmaServeError, Problem
from gemma_serve.planning.problem_topics import topic_of
from gemma_serve.planning.settings import SETTINGS
from gemma_serve.usecases.check import check
from gemma_serve.usecases.deployments import find_deployment
from gemma_serve.usecases.events import OnEvent
from gemma_serve.usecases.plan import ServePlan
from gemma_serve.usecases.run import Run, kept_run
from gemma_serve.usecases.stop import stop


def read_last_run(name: str | None, environ: Mapping[str, str]) -> Run:
    """How the deployment that is meant was last run.

    Raises:
        GemmaServeError: there is none, or its settings can't be read.
    """
    found = find_deployment(name, environ)
    folder = DeploymentFolder(found.deployment.folder)
    run = kept_run(folder)
    if run is None:
        raise GemmaServeError(
            f"the settings of {found.deployment.name} in {folder.run} can't be read",
            code="state.unreadable",
            hint=f"start it with its settings: gemma-serve up --name {found.deployment.name} ...",
        )
    if run.key_source is not None and run.api_key_file is None and not _has_key(environ):
        raise GemmaServeError(
            f"{run.name} was started with an API key from {run.key_source}, which is not set here",
            code="config.no_key",
            hint=f"set {API_KEY_VARIABLE}, the key is kept nowhere",
        )
    return run


def _has_key(environ: Mapping[str, str]) -> bool:
    return bool(environ.get(API_KEY_VARIABLE) or environ.get("VLLM_API_KEY"))


def refuse_what_would_fail(plan: ServePlan) -> None:
    """Check all that can be checked while it still runs: what holds then is its own.

    Raises:
        GemmaServeError: a new start would be refused.
    """
    found = [p for p in check(plan).problems if p.blocking and not _is_its_own(p)]
    if found:
        raise GemmaServeError.of(found)


def _is_its_own(problem: Problem) -> bool:
    """Whether the one that runs may be why: it holds GPUs, a port and memory."""
    held = ("cpu-memory-busy", "shm-small")
    return topic_of(problem.code) in ("gpu", "port") or problem.code in held


def end_last_run(name: str, environ: Mapping[str, str], *, on_event: OnEvent) -> None:
    """Stop it, if it runs.

    Raises:
        GemmaServeError: something of it would not end.
    """
    if not find_deployment(name, environ).running:
        return
    result = stop(name, drain_timeout=None, environ=environ, on_event=on_event)
    left = [problem for problem in result.problems if problem.blocking]
    if left:
        raise GemmaServeError.of(left)


def settings_as_flags(run: Run) -> dict[str, Any]:
    """What was given then, to be given again."""
    return dict(run.settings)


def environment_without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment without settings, since those of the last run are meant."""
    settings = {setting.variable for setting in SETTINGS}
    return {name: value for name, value in environ.items() if name not in settings}
