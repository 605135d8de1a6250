"""Files that ship with the package."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from gemma_serve.planning.failures import FailureCatalogue, parse_failures
from gemma_serve.planning.hardware.gpu_cards import GpuCard, read_card
from gemma_serve.planning.memory.engine_rules import EngineRulesTable, parse_engine_rules
from gemma_serve.planning.memory.runtime_constants import (
    RuntimeConstants,
    parse_runtime_constants,
)
from gemma_serve.planning.model.catalogue import CatalogueEntry, read_catalogue


def data_path(*parts: str) -> Path:
    """Where a file or folder of the package's data lies: `data_path("demo")`.

    The package is always installed unzipped, since vLLM reads from there too.
    """
    return Path(str(files("gemma_serve.data").joinpath(*parts)))


@cache
def load_catalogue() -> tuple[CatalogueEntry, ...]:
    """The public Gemmas of `data/catalogue.yaml`, in the order in which they came out."""
    return read_catalogue(load_yaml("catalogue.yaml"))


@cache
def load_gpu_cards() -> tuple[GpuCard, ...]:
    """The NVIDIA cards of `data/gpu_cards.yaml`."""
    return tuple(read_card(entry) for entry in load_yaml("gpu_cards.yaml"))


@cache
def load_engine_rules() -> EngineRulesTable:
    """The rules of every known release of vLLM, oldest first, from `data/engine_rules.yaml`."""
    return parse_engine_rules(load_yaml("engine_rules.yaml"))


@cache
def load_failures() -> FailureCatalogue:
    """The failures of `data/failures.yaml`."""
    return parse_failures(load_yaml("failures.yaml"))


@cache
def load_runtime_constants() -> RuntimeConstants:
    """The measured figures about memory, of `data/runtime_constants.yaml`."""
    return parse_runtime_constants(load_yaml("runtime_constants.yaml"))


def load_yaml(name: str) -> Any:
    """What one of the package's YAML files holds."""
    import yaml

    # libyaml's loader reads the catalogue in a seventh of the time; not every wheel has it.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(data_path(name).read_text(encoding="utf-8"), Loader=loader)
