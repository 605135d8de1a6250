"""The Gemmas that are known, and which of them fit here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_serve.adapters.package_data import load_catalogue
from gemma_serve.errors import Problem, UsageError
from gemma_serve.planning.config import Layer, ServeConfig, resolve
from gemma_serve.planning.launch import Device
from gemma_serve.planning.memory.request import Machine
from gemma_serve.planning.model.catalogue import CatalogueEntry
from gemma_serve.planning.model.facts import facts_from_config
from gemma_serve.usecases.configure import read_layers
from gemma_serve.usecases.fit import FitReport, judge_fit
from gemma_serve.usecases.known_failures import with_titles
from gemma_serve.usecases.target import (
    Hardware,
    PlanFor,
    cpu_defaults,
    find_hardware,
    find_wanted_engine,
)


@dataclass(frozen=True)
class KnownModel:
    """One model of the catalogue; `fit` is None where there is nothing to run it on."""

    entry: CatalogueEntry
    fit: FitReport | None


@dataclass(frozen=True)
class ModelsReport:
    """The catalogue, judged for one machine. `problems` tell of the machine."""

    hardware: Hardware
    engine_version: str | None
    models: tuple[KnownModel, ...]
    problems: tuple[Problem, ...]


def list_models(
    flags: Mapping[str, Any],
    *,
    environ: Mapping[str, str],
    file: Path | None = None,
    plan_for: PlanFor | None = None,
    family: str | None = None,
    only_fitting: bool = False,
) -> ModelsReport:
    """Judge every model of the catalogue that vLLM serves, or those of one `family`.

    Without a device to plan for, the GPUs of this machine count, and without any its CPU.

    Raises:
        UsageError: a value or a file is wrong, names GPUs that aren't visible, or no `family`.
    """
    wanted = plan_for or PlanFor()
    layers, warnings = read_layers(flags, environ, file)
    size = resolve(layers).config.tensor_parallel_size
    hardware = _hardware(environ, wanted, size)
    if hardware.device == "cpu":
        defaults = cpu_defaults(environ, is_demo=False)
        layers = [
            *layers,
            Layer("detected", {name: value for name, (value, _) in defaults.items()}),
        ]
    config = resolve(layers).config
    engine, _ = find_wanted_engine(config.engine_python, environ, wanted)
    machine = hardware.machine(config.gpus)
    models = _judge_all(
        _of_family(family),
        lambda entry: _judge(entry, config, machine, engine.version),
    )
    if only_fitting:
        models = tuple(model for model in models if model.fit is not None and model.fit.fits)
    return ModelsReport(
        hardware, engine.version, models, with_titles((*warnings, *hardware.problems))
    )


def _hardware(environ: Mapping[str, str], wanted: PlanFor, count: int | None) -> Hardware:
    """What was asked for, else this machine's GPUs, else its CPU."""
    device: Device = wanted.device or "cuda"
    hardware = find_hardware(environ, device, wanted.for_gpu, count=count)
    if wanted.for_gpu is None and wanted.device is None and not hardware.visible.gpus:
        return find_hardware(environ, "cpu", None)
    return hardware


def _of_family(family: str | None) -> list[CatalogueEntry]:
    """The models that vLLM serves, of one family or of one name if given."""
    served = [entry for entry in load_catalogue() if entry.served]
    if family is None:
        return served
    wanted = _plain(family)
    found = [entry for entry in served if wanted in (_plain(entry.family), _plain(entry.id))]
    if not found:
        raise UsageError(
            f"--family names `{family}`, and no family of Gemmas that vLLM serves is called so",
            code="models.unknown_family",
            hint="families: " + ", ".join(dict.fromkeys(entry.family for entry in served)),
        )
    return found


def _plain(name: str) -> str:
    """A name without what people write in many ways: case, blanks and hyphens."""
    return re.sub(r"[-_\s]", "", name.lower())


def _judge_all(
    entries: Iterable[CatalogueEntry], judge: Callable[[CatalogueEntry], FitReport | None]
) -> tuple[KnownModel, ...]:
    """Many models are alike but for what they were trained on: those are judged once."""
    verdicts: dict[object, FitReport | None] = {}
    models = []
    for entry in entries:
        alike = (entry.shape, entry.dtype, repr(entry.quantization_config), entry.min_vllm)
        if entry.shape is None or alike not in verdicts:
            verdicts[alike] = judge(entry)
        models.append(KnownModel(entry, verdicts[alike]))
    return tuple(models)


def _judge(
    entry: CatalogueEntry, config: ServeConfig, machine: Machine | None, version: str | None
) -> FitReport | None:
    if machine is None:
        return None
    reading = facts_from_config(entry.id, entry.config, source="catalogue", entry=entry)
    return judge_fit(reading, config, machine, version, look_for_more=False)
