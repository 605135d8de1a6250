"""Would `up` work? Engine, model, access, disk, GPU, plan and port, all at once; starts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gemma_serve.adapters import host
from gemma_serve.adapters.checksums import read_manifest
from gemma_serve.adapters.secrets import without_secrets
from gemma_serve.adapters.state import all_deployments
from gemma_serve.engine.processes import lives
from gemma_serve.errors import Problem
from gemma_serve.planning.config import ServeConfig
from gemma_serve.planning.problem_topics import Topic, topic_of
from gemma_serve.usecases.access import AccessReport, check_access
from gemma_serve.usecases.known_failures import with_titles
from gemma_serve.usecases.local_files import (
    LocalFiles,
    find_cached,
    names_in,
    noted_problems,
    revision_to_ask,
    tokenizer_problem,
)
from gemma_serve.usecases.model_facts import as_folder
from gemma_serve.usecases.plan import ServePlan

CheckId = Literal["settings", "engine", "model", "access", "disk", "gpu", "plan", "port"]
State = Literal["ok", "warning", "failed", "unknown"]

# In the order in which they are shown, and what each answers for.
_ROWS: dict[CheckId, Topic] = {
    "settings": "config",
    "engine": "engine",
    "model": "model",
    "access": "hub",
    "disk": "disk",
    "gpu": "gpu",
    "plan": "plan",
    "port": "port",
}


@dataclass(frozen=True)
class CheckRow:
    """One question, its answer, and the problems that it comes with.

    `unknown` is what could not be asked, since something else is missing; `is_known` is whether
    there is an answer beside the problems.
    """

    id: CheckId
    state: State
    is_known: bool
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class CheckReport:
    """The verdict. `access` is None where the model's files are here and nobody need be asked."""

    plan: ServePlan
    access: AccessReport | None
    rows: tuple[CheckRow, ...]
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing stands against `up`."""
        return not any(problem.blocking for problem in self.problems)


def check(plan: ServePlan) -> CheckReport:
    """Check all that `up` needs beyond its plan: the files or the way to them, room, the port."""
    here = _local_files(plan.config)
    access = _access(plan, here)
    port = find_port_problem(plan.config)
    asked = () if access is None else access.problems
    # What the facts were asked for in vain is what the download would fail of, and that nobody
    # knows the size follows from it.
    codes = {problem.code for problem in asked}
    if any(problem.blocking for problem in asked):
        codes.add("model.size_unknown")
    planned = tuple(problem for problem in plan.problems if problem.code not in codes)
    # What the Hub can say more about, it was asked for.
    noted = () if here is None or _can_be_asked(access) else noted_problems(here)
    no_tokenizer = _tokenizer_problem(plan, here, access)
    last = [problem for problem in (no_tokenizer, port) if problem is not None]
    problems = with_titles((*planned, *noted, *asked, *last))
    rows = tuple(_row(name, plan, access, problems) for name in _ROWS)
    # Of the settings there is only something to say where they are odd.
    told = tuple(row for row in rows if row.id != "settings" or row.problems)
    return CheckReport(plan, access, told, problems)


def _local_files(config: ServeConfig) -> LocalFiles | None:
    """The model's files on this machine: those of the cache, or of a folder that we filled."""
    folder = as_folder(config.model)
    if folder is None:
        return find_cached(config.model, config.revision, config.download_dir)
    manifest = read_manifest(folder)
    return None if manifest is None else LocalFiles(folder, manifest.commit, manifest)


def _tokenizer_problem(
    plan: ServePlan, here: LocalFiles | None, access: AccessReport | None
) -> Problem | None:
    """Why nothing could read a prompt, where files are known and no other tokenizer is named."""
    model = plan.config.model
    folder = as_folder(model) if here is None else here.folder
    names = frozenset[str]() if folder is None else names_in(folder)
    if access is not None:
        names |= {file.name for file in access.files}
    if not names or "tokenizer" in plan.config.engine_args:
        return None
    return tokenizer_problem(model, names)


def find_port_problem(config: ServeConfig) -> Problem | None:
    """Why nobody can listen where `config` says; a deployment of ours is called by its name."""
    problem = host.port_problem(config.host, config.port)
    return None if problem is None else with_titles([_by_its_name(problem, config)])[0]


def _by_its_name(problem: Problem, config: ServeConfig) -> Problem:
    if problem.code != "port-in-use":
        return problem
    for one in all_deployments():
        here = one.url.endswith(f":{config.port}")
        if here and one.supervisor is not None and lives(one.supervisor):
            message = f"port {config.port} on {config.host} is taken by the deployment {one.name}"
            hint = f"stop it with `gemma-serve stop {one.name}`, or take another port: --port 0"
            return replace(problem, message=message, hint=hint)
    return problem


def _can_be_asked(access: AccessReport | None) -> bool:
    return access is not None and access.ok and not access.problems and not access.offline


def _access(plan: ServePlan, here: LocalFiles | None) -> AccessReport | None:
    config = plan.config
    if as_folder(config.model) is not None or (here is not None and here.is_known_whole):
        return None
    unreachable = [p for p in plan.problems if p.code == "hub.unreachable"]
    if unreachable:
        # Somebody waited for it already.
        from gemma_serve.adapters.hub.client import endpoint

        blocking = replace(unreachable[0], blocking=True)
        where = without_secrets(endpoint())
        return AccessReport(
            config.model, config.revision, where, reached=False, problems=(blocking,)
        )
    # `up` takes the commit that is cached, if there is one.
    revision = revision_to_ask(config.model, config.revision, config.download_dir, here)
    return check_access(config.model, revision, cache_dir=config.download_dir)


def _row(
    name: CheckId, plan: ServePlan, access: AccessReport | None, problems: Sequence[Problem]
) -> CheckRow:
    is_folder = as_folder(plan.config.model) is not None
    own = tuple(p for p in problems if _row_of(p, is_folder=is_folder) == name)
    known = _is_known(name, plan, access)
    state: State = "ok" if known else "unknown"
    if own:
        state = "failed" if any(problem.blocking for problem in own) else "warning"
    return CheckRow(name, state, known, own)


def _row_of(problem: Problem, *, is_folder: bool) -> CheckId:
    topic = topic_of(problem.code)
    if topic == "hub" and is_folder:
        return "model"  # nobody was asked: the folder is not there
    return next((name for name, about in _ROWS.items() if about == topic), "settings")


def _is_known(name: CheckId, plan: ServePlan, access: AccessReport | None) -> bool:
    """Whether the question could be answered at all."""
    fit = plan.report.fit
    if name == "model":
        return fit is not None and fit.facts is not None
    if name == "plan":
        return fit is not None and fit.decision is not None and fit.decision.fit is not None
    if name == "gpu":
        return plan.engine.device == "cpu" or bool(plan.report.chosen.gpus)
    if name in ("access", "disk") and access is not None and not access.is_folder:
        whole = access.cached is not None
        if access.offline:
            return whole
        if name == "access":
            return access.allowed is not None
        disk = access.disk
        return whole if disk is None else not disk.missing_bytes or disk.free_bytes is not None
    return True
