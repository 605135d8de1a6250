"""The settings that a person gave, from wherever they were given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_serve.adapters.settings import read_environment, read_file
from gemma_serve.errors import Problem, UsageError
from gemma_serve.planning.config import Layer, ServeConfig, resolve
from gemma_serve.planning.settings import SETTINGS

_FLAGS = {setting.name: setting.flag for setting in SETTINGS}


def read_layers(
    flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None
) -> tuple[list[Layer], tuple[Problem, ...]]:
    """Flags, environment and file as layers, the strongest first, and warnings about them.

    Raises:
        UsageError: the file or a variable can't be read.
    """
    in_environment = read_environment(environ)
    layers = [
        Layer("flag", flags, {name: _FLAGS[name] for name in flags}),
        Layer("environment", in_environment.values, in_environment.origins),
    ]
    if file is not None:
        in_file = read_file(file)
        layers.append(Layer("file", in_file.values, in_file.origins))
    return layers, in_environment.problems


def read_named_model(
    flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None
) -> tuple[ServeConfig, tuple[Problem, ...]]:
    """The settings of a command that is about one model, and warnings about them.

    Raises:
        UsageError: a value or a file is wrong, or no model is named.
    """
    layers, warnings = read_layers(flags, environ, file)
    resolved = resolve(layers)
    if resolved.sources["model"] == "default":
        raise UsageError(
            "no model is named",
            code="usage",
            hint="say which: `--model google/gemma-7b-it`; `gemma-serve models` lists them",
        )
    return resolved.config, warnings
