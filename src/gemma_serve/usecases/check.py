"""Would `up` work? Engine, model, access, disk, GPU, plan and port, all at once; starts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gemma_serve.adapters import host
from gemma_serve.adapters.checksums import read_manifest
from gemma_serve.adapters.secrets import without_secrets
from gemma_serve.errors import Problem
from gemma_serve.planning.config import ServeConfig
from gemma_serve.planning.sizes import file_size
from gemma_serve.usecases.access import AccessReport, check_access
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

# What each row answers for, by the first word of the problems' codes.
_ROWS: dict[CheckId, tuple[str, ...]] = {
    "settings": ("config.",),
    "engine": ("engine",),
    "model": ("model.",),
    "access": ("hub.",),
    "disk": ("hub.disk_full", "hub.cache_unwritable"),
    "gpu": ("gpu.",),
    "plan": ("plan.",),
    "port": ("port.",),
}


@dataclass(frozen=True)
class CheckRow:
    """One question: its answer in a few words, and the problems that it comes with.

    `unknown` is what could not be asked, since something else is missing.
    """

    id: CheckId
    state: State
    summary: str
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
    port = host.port_problem(plan.config.host, plan.config.port)
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
    problems = (*planned, *noted, *asked, *last)
    rows = tuple(_row(name, plan, access, problems) for name in _ROWS)
    return CheckReport(plan, access, tuple(row for row in rows if row.summary), problems)


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
    own = tuple(problem for problem in problems if _row_of(problem) == name)
    summary, known = _summary(name, plan, access)
    blocking = next((problem for problem in own if problem.blocking), None)
    if blocking is not None:
        return CheckRow(name, "failed", blocking.message, own)
    if own:
        return CheckRow(name, "warning", summary if summary and known else own[0].message, own)
    return CheckRow(name, "ok" if known else "unknown", summary)


def _row_of(problem: Problem) -> CheckId:
    found: CheckId = "settings"
    longest = 0
    for name, beginnings in _ROWS.items():
        for beginning in beginnings:
            if problem.code.startswith(beginning) and len(beginning) > longest:
                found, longest = name, len(beginning)
    return found


def _summary(name: CheckId, plan: ServePlan, access: AccessReport | None) -> tuple[str, bool]:
    """What to say where nothing is wrong, and whether it is known; "" where there is no need."""
    if name == "engine":
        built = f"{plan.engine.distribution or 'vLLM'} {plan.engine.version or ''}".strip()
        return f"{built} for {'the CPU' if plan.engine.device == 'cpu' else 'GPUs'}", True
    if name == "model":
        return _model_summary(plan)
    if name == "access":
        if as_folder(plan.config.model) is not None:
            return "not needed: a folder of this machine", True
        return access_summary(plan.config.model, access)
    if name == "disk":
        return disk_summary(access)
    if name == "gpu":
        if plan.engine.device == "cpu":
            return "not needed: the engine runs on the CPU", True
        return plan.report.chosen.reason or "none", bool(plan.report.chosen.gpus)
    if name == "plan":
        return _plan_summary(plan)
    if name == "port":
        return f"{plan.config.host}:{plan.config.port} is free", True
    return "", True


def _model_summary(plan: ServePlan) -> tuple[str, bool]:
    facts = plan.report.fit.facts if plan.report.fit else None
    if facts is None:
        return f"{plan.config.model}: unknown", False
    parameters = f", {facts.parameters / 1e6:,.0f} M parameters" if facts.parameters else ""
    return f"{facts.model}: {facts.architecture or facts.model_type}{parameters}", True


def access_summary(model: str, access: AccessReport | None) -> tuple[str, bool]:
    """Who may read the files, in a few words, and whether that is known."""
    if access is None:
        return "not needed: the files are here, and whole", True
    if access.is_folder:
        return f"not needed: {model} is on this machine", True
    if access.offline:
        return "not asked: HF_HUB_OFFLINE is set", access.cached is not None
    if access.reached is False:
        return f"{access.endpoint} gave no answer", False
    if access.allowed is not True:
        return f"{access.endpoint} does not let {model} be read", access.allowed is not None
    who = "anyone" if access.token is None else access.token.account or "this token"
    return f"{who} may read {model} at {access.endpoint}", True


def disk_summary(access: AccessReport | None) -> tuple[str, bool]:
    """How much is to come and how much room there is, and whether that is known."""
    if access is None or access.is_folder:
        return "nothing to download", True
    if access.disk is None:
        whole = access.cached is not None
        return "nothing to download" if whole else "unknown how much is to be downloaded", whole
    disk = access.disk
    free = "unknown" if disk.free_bytes is None else file_size(disk.free_bytes)
    if not disk.missing_bytes:
        return f"nothing to download, {free} free in {disk.folder}", True
    return (
        f"{file_size(disk.missing_bytes)} to download, {free} free in {disk.folder}",
        disk.free_bytes is not None,
    )


def _plan_summary(plan: ServePlan) -> tuple[str, bool]:
    fit = plan.report.fit
    decided = fit.decision.fit if fit and fit.decision else None
    if fit is None or decided is None:
        return "not planned", False
    settings = decided.settings
    if not fit.fits:
        return f"does not fit with {settings.max_model_len:,} tokens of context", True
    held = f", {decided.capacity.tokens:,} tokens of KV cache" if decided.capacity else ""
    return f"fits: {settings.max_model_len:,} tokens of context{held}", True
