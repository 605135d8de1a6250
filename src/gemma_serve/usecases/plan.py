"""What `up` would run, and where every value of it came from. Starts nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_serve.adapters import host, settings
from gemma_serve.adapters.engine_caches import engine_caches, engine_caches_dir
from gemma_serve.adapters.package_data import data_path
from gemma_serve.errors import Problem, UsageError
from gemma_serve.planning.config import Layer, ResolvedConfig, ServeConfig, is_loopback, resolve
from gemma_serve.planning.hardware.gpus import Gpu
from gemma_serve.planning.launch import Device, Engine, Launch, ModelSource, render_launch
from gemma_serve.planning.problem_topics import topic_of
from gemma_serve.planning.smoke.questions import DEMO_MODEL, Answers, parse_answers
from gemma_serve.usecases.before_start import start_problems
from gemma_serve.usecases.check_gpu import (
    GpuReport,
    as_many_as_named,
    judge_hardware,
    with_cpu_space,
)
from gemma_serve.usecases.configure import read_layers
from gemma_serve.usecases.fit import planned_values
from gemma_serve.usecases.known_failures import with_titles
from gemma_serve.usecases.model_facts import find_model, find_model_facts
from gemma_serve.usecases.target import (
    PlanFor,
    cpu_defaults,
    find_hardware,
    find_wanted_engine,
    sees_gpu,
)

DEFAULT_GPU_MODEL = "google/gemma-7b-it"


@dataclass(frozen=True)
class ServePlan:
    """A deployment, decided. `problems` that are blocking keep `up` from starting it.

    `report` is the planner's verdict on the hardware and the memory. `notes` are the choices that
    were made for the person, each with its reason.
    """

    config: ServeConfig
    sources: Mapping[str, str]
    engine: Engine
    model: ModelSource
    report: GpuReport
    launch: Launch
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs to use, in rank order; empty on a CPU engine."""
        return self.report.chosen.gpus

    @property
    def known_answers(self) -> Answers | None:
        """What the model must answer, if it is the demo, whatever it is served as."""
        if self.config.model != DEMO_MODEL:
            return None
        return parse_answers(data_path("answers.json").read_text(encoding="utf-8"))

    @property
    def ok(self) -> bool:
        """Whether nothing stands against starting it."""
        return not any(problem.blocking for problem in self.problems)


def make_plan(
    flags: Mapping[str, Any],
    *,
    environ: Mapping[str, str],
    file: Path | None = None,
    plan_for: PlanFor | None = None,
    force: bool = False,
) -> ServePlan:
    """Decide what to run, from what was set and what this machine has.

    Args:
        flags: values by field name, only those that were given; text is fine.
        environ: the caller's environment.
        file: a YAML file of settings.
        plan_for: another engine or other hardware than is here.
        force: make warnings of the verdicts on hardware, memory and the model's kind.

    Raises:
        UsageError: a value or a file is wrong (one problem for each), or the server would be
            open to other machines without a key.
    """
    wanted = plan_for or PlanFor()
    layers, warnings = read_layers(flags, environ, file)
    given = resolve(layers)
    engine, missing = find_wanted_engine(given.config.engine_python, environ, wanted)
    resolved = resolve([*layers, _detected(given, engine.device, environ, wanted)])
    resolved = as_many_as_named(resolved, engine.device)
    resolved = _with_one_key(_with_a_port(resolved), environ)
    decided = _decide(resolved, engine, environ, wanted)
    here: tuple[Problem, ...] = ()
    if not (missing or wanted.is_elsewhere or wanted.engine_version):
        here = start_problems(decided.config, engine, decided.launch, environ)
    found = (_for_up(problem, force=force) for problem in (*decided.problems, *here))
    return replace(decided, problems=with_titles((*warnings, *missing, *found)))


def _detected(
    given: ResolvedConfig, device: Device, environ: Mapping[str, str], wanted: PlanFor
) -> Layer:
    """Defaults that depend on the machine, each with its reason; weaker than all that was set."""
    chosen: dict[str, tuple[object, str]] = {}
    if given.sources["model"] == "default":
        chosen["model"] = _default_model(device, environ, wanted)
    if device == "cpu":
        is_demo = (chosen.get("model") or (given.config.model,))[0] == DEMO_MODEL
        chosen.update(cpu_defaults(environ, is_demo=is_demo))
    new = {name: pair for name, pair in chosen.items() if given.sources[name] == "default"}
    return Layer(
        "detected",
        {name: value for name, (value, _) in new.items()},
        {name: reason for name, (_, reason) in new.items()},
    )


def _default_model(
    device: Device, environ: Mapping[str, str], wanted: PlanFor
) -> tuple[object, str]:
    if wanted.for_gpu is not None:
        return DEFAULT_GPU_MODEL, "a GPU is asked about"
    if not sees_gpu(environ):
        return DEMO_MODEL, "no GPU is seen"
    if device == "cuda":
        return DEFAULT_GPU_MODEL, "a GPU is seen"
    return DEMO_MODEL, "vLLM here is built for CPUs"


def _with_a_port(resolved: ResolvedConfig) -> ResolvedConfig:
    """Port 0 means any: take one now, so that the plan and the URL can name it."""
    if resolved.config.port != 0:
        return resolved
    try:
        port = host.free_port(resolved.config.host)
    except OSError:
        return resolved  # the address is wrong, and the port's check will say so
    return resolved.changed({"port": port}, {"port": "detected: a free port"})


def _with_one_key(resolved: ResolvedConfig, environ: Mapping[str, str]) -> ResolvedConfig:
    """The variable with the key is stronger than a configuration file that names a key file."""
    from_file = resolved.sources["api_key_file"].startswith("file ")
    if not (from_file and environ.get(settings.API_KEY_VARIABLE)):
        return resolved
    source = f"environment {settings.API_KEY_VARIABLE}"
    return resolved.changed({"api_key_file": None}, {"api_key_file": source})


def _decide(
    resolved: ResolvedConfig, engine: Engine, environ: Mapping[str, str], wanted: PlanFor
) -> ServePlan:
    key = settings.find_api_key(environ, resolved.config.api_key_file)
    if key is None:
        _refuse_to_be_open(resolved.config)
    report = _judge(resolved.config, engine, environ, wanted)
    planned = _with_planned(resolved, report)
    config = planned.config
    model = find_model(config)
    launch = render_launch(
        config,
        engine=engine,
        model=model,
        gpus=() if wanted.for_gpu else report.chosen.gpus,
        cores=host.usable_cores(),
        inherited=environ,
        key_source=None if key is None else key.source,
        caches=_find_caches(config, engine, report.chosen.gpus, environ, wanted),
    )
    problems = (*settings.key_file_warnings(config.api_key_file), *report.problems)
    notes = _notes(planned, report)
    return ServePlan(config, planned.sources, engine, model, report, launch, notes, problems)


def _find_caches(
    config: ServeConfig,
    engine: Engine,
    gpus: tuple[Gpu, ...],
    environ: Mapping[str, str],
    wanted: PlanFor,
) -> Path | None:
    """Where the engine that is here keeps what it compiles; None for one that isn't."""
    if wanted.is_elsewhere or wanted.engine_version is not None:
        return None
    return engine_caches(engine_caches_dir(config.cache_dir, environ), engine, gpus)


def _judge(
    config: ServeConfig, engine: Engine, environ: Mapping[str, str], plan_for: PlanFor
) -> GpuReport:
    hardware = find_hardware(
        environ, engine.device, plan_for.for_gpu, count=config.tensor_parallel_size
    )
    hardware = replace(hardware, engine_cuda=engine.cuda_version)
    reading = find_model_facts(config.model, config.revision, cache_dir=config.download_dir)
    config = with_cpu_space(config, engine.device, environ)
    return judge_hardware(hardware, config, reading=reading, engine_version=engine.version)


def _with_planned(resolved: ResolvedConfig, report: GpuReport) -> ResolvedConfig:
    """The configuration with the planner's values in the place of what was left open."""
    values = planned_values(report.fit)
    reasons = report.fit.decision.reasons if report.fit and report.fit.decision else {}
    sources = {name: f"planned: {reasons[name]}" for name in values}
    return resolved.changed(values, sources)


def _notes(resolved: ResolvedConfig, report: GpuReport) -> tuple[str, ...]:
    """The choices that a person should hear of."""
    notes = []
    if resolved.sources["model"].startswith("detected: "):
        reason = resolved.sources["model"].removeprefix("detected: ")
        notes.append(f"no --model was given and {reason}: taking {resolved.config.model}")
    if report.chosen.gpus and report.hardware.for_gpu is None:
        notes.append(report.chosen.reason)
    if report.fit is None or not report.fit.fits:
        return tuple(notes)
    for name in ("tensor_parallel_size", "max_model_len", "max_num_seqs", "dtype"):
        source = resolved.sources[name].removeprefix("planned: ")
        if source in _WORTH_A_WORD or (name == "dtype" and source != resolved.sources[name]):
            notes.append(f"{name} {getattr(resolved.config, name)}: {source}")
    return tuple(notes)


# The planner's reasons for what differs from the model's own and vLLM's defaults.
_WORTH_A_WORD = frozenset(
    {
        "the fewest GPUs on which it fits",
        "the longest that fits",
        "smaller than vLLM's default, to make room",
    }
)


def _for_up(problem: Problem, *, force: bool) -> Problem:
    """A verdict as `up` takes it: a size that nobody knows may still be tried."""
    if problem.code == "model.size_unknown":
        return replace(problem, blocking=False)
    if problem.code == "model.embeds":
        problem = replace(problem, blocking=True)
    code = problem.code
    overridden = force and (topic_of(code) in ("gpu", "plan") or code in _ALSO_FORCED)
    return replace(problem, blocking=False) if overridden else problem


# `--force` overrides verdicts on hardware, memory and the model's kind, not broken files.
_ALSO_FORCED = ("model.embeds", "model.not_served", "arch-unsupported", "fp16-refused",
                "python-headers", "shm-small", "flag-unknown")  # fmt: skip


def _refuse_to_be_open(config: ServeConfig) -> None:
    """Without a key, others may only be let in when that was said."""
    if config.allow_unauthenticated or is_loopback(config.host):
        return
    raise UsageError(
        f"listening on {config.host} lets other machines in, and no API key is set",
        code="config.unauthenticated",
        hint=f"set {settings.API_KEY_VARIABLE} or --api-key-file, "
        "or say --allow-unauthenticated if that is meant",
    )
