"""What GPUs there are, which would be used, and whether and how a model fits them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_serve.errors import Problem
from gemma_serve.planning.config import Layer, ResolvedConfig, ServeConfig, resolve
from gemma_serve.planning.hardware.gpu_problems import gpu_problems
from gemma_serve.planning.hardware.gpus import Chosen, choose_gpus
from gemma_serve.planning.launch import Device, Engine, render_launch
from gemma_serve.planning.memory.fit import Fit
from gemma_serve.planning.model.facts import FactsReading
from gemma_serve.planning.smoke.questions import DEMO_MODEL
from gemma_serve.usecases.configure import read_layers
from gemma_serve.usecases.fit import FitReport, judge_fit, planned_values, with_a_way_out
from gemma_serve.usecases.known_failures import with_titles
from gemma_serve.usecases.model_facts import find_model, find_model_facts
from gemma_serve.usecases.target import (
    Hardware,
    PlanFor,
    cpu_defaults,
    find_hardware,
    find_wanted_engine,
)


@dataclass(frozen=True)
class GpuReport:
    """Everything that was found out; `fit` is None where no model was asked for.

    `argv` is the engine's command line of the plan, if there is one.
    """

    hardware: Hardware
    chosen: Chosen
    fit: FitReport | None
    problems: tuple[Problem, ...]
    argv: tuple[str, ...] | None = None

    @property
    def ok(self) -> bool:
        """Whether an engine can start: there is something to run on, and nothing in the way.

        A plan that does not fit is a no, also where it is only a warning for `up`, since flags
        were given whose memory isn't planned.
        """
        has_device = bool(self.chosen.gpus) or self.hardware.device == "cpu"
        judged = self.fit is not None and self.fit.decision is not None
        fits = not judged or (self.fit is not None and self.fit.fits)
        return has_device and fits and not any(problem.blocking for problem in self.problems)


def check_gpu(
    flags: Mapping[str, Any],
    *,
    environ: Mapping[str, str],
    file: Path | None = None,
    plan_for: PlanFor | None = None,
) -> GpuReport:
    """Look at the GPUs and, where a model is named, whether and how it fits. Changes nothing.

    Raises:
        UsageError: a value or a file is wrong, or names GPUs that aren't visible.
    """
    wanted = plan_for or PlanFor()
    layers, warnings = read_layers(flags, environ, file)
    device: Device = "cuda" if wanted.for_gpu else wanted.device or "cuda"
    resolved = as_many_as_named(resolve(layers), device)
    config = resolved.config
    hardware = find_hardware(environ, device, wanted.for_gpu, count=config.tensor_parallel_size)
    if resolved.sources["model"] == "default":
        report = judge_hardware(hardware, config)
        return replace(report, problems=with_titles((*warnings, *report.problems)))
    if device == "cpu":
        defaults = cpu_defaults(environ, is_demo=config.model == DEMO_MODEL)
        values = {name: value for name, (value, _) in defaults.items()}
        config = as_many_as_named(resolve([*layers, Layer("detected", values)]), device).config
    engine, _ = find_wanted_engine(config.engine_python, environ, replace(wanted, device=device))
    reading = find_model_facts(config.model, config.revision, cache_dir=config.download_dir)
    sized = with_cpu_space(config, device, environ)
    hardware = replace(hardware, engine_cuda=engine.cuda_version)
    report = judge_hardware(hardware, sized, reading=reading, engine_version=engine.version)
    found = (*warnings, *(_for_planning(problem, reading) for problem in report.problems))
    return replace(
        report,
        problems=with_titles(found),
        argv=_argv(config, report, engine) if report.fit and report.fit.decision else None,
    )


def judge_hardware(
    hardware: Hardware,
    config: ServeConfig,
    *,
    reading: FactsReading | None = None,
    engine_version: str | None = None,
) -> GpuReport:
    """The verdict on the hardware and, with the facts of a model, on the memory.

    Raises:
        UsageError: `config.gpus` doesn't name visible GPUs, or not as many as are to be used.
    """
    fit = None
    if reading is not None:
        machine = hardware.machine(config.gpus)
        fit = judge_fit(reading, config, machine, engine_version)
    judged = fit.decision.fit if fit is not None and fit.decision is not None else None
    size = judged.settings.tensor_parallel_size if judged else config.tensor_parallel_size or 1
    chosen = choose_gpus(hardware.visible.gpus, wanted=config.gpus, count=size)
    found: tuple[Problem, ...] = ()
    if chosen.gpus:
        found = gpu_problems(
            chosen.gpus,
            gpu_memory_utilization=config.gpu_memory_utilization,
            needed_bytes=_needed_bytes(judged),
            tensor_parallel_size=size,
            dtype=config.dtype,
            engine_dtype=judged.settings.dtype if judged else None,
        )
    if fit is not None:
        found = tuple(with_a_way_out(problem, fit.alternatives) for problem in found)
    of_model = () if reading is None else reading.problems
    of_fit = () if fit is None else fit.problems
    return GpuReport(hardware, chosen, fit, (*hardware.problems, *found, *of_model, *of_fit))


def with_cpu_space(config: ServeConfig, device: Device, environ: Mapping[str, str]) -> ServeConfig:
    """vLLM's own variable for the cache of a CPU engine, in whole GiB, wins over our setting."""
    space = environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    if device != "cpu" or not space.isdecimal() or int(space) == 0:
        return config
    return config.model_copy(update={"kv_cache_memory_bytes": int(space) * 2**30})


def as_many_as_named(resolved: ResolvedConfig, device: Device) -> ResolvedConfig:
    """GPUs that were named are all to be used."""
    config = resolved.config
    if device == "cpu" or config.gpus is None or config.tensor_parallel_size is not None:
        return resolved
    reason = "planned: as many as `gpus` names"
    return resolved.changed(
        {"tensor_parallel_size": len(config.gpus)}, {"tensor_parallel_size": reason}
    )


def _for_planning(problem: Problem, reading: FactsReading) -> Problem:
    """The weights needn't be there for a plan from config.json alone; `up` wants them."""
    planned = reading.facts is not None and reading.facts.geometry is not None
    if planned and problem.code == "weights-missing":
        return replace(problem, blocking=False)
    return problem


def _argv(config: ServeConfig, report: GpuReport, engine: Engine) -> tuple[str, ...]:
    planned = config.model_copy(update=planned_values(report.fit))
    return render_launch(planned, engine=engine, model=find_model(planned)).argv


def _needed_bytes(fit: Fit | None) -> int | None:
    return None if fit is None else fit.memory.used_bytes - fit.memory.kv_cache_bytes
