"""Command-line options made from the table of settings, once for every command."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gemma_serve.errors import UsageError
from gemma_serve.planning.settings import SETTINGS, Setting


class DeviceName(StrEnum):
    """What the engine runs on."""

    CPU = "cpu"
    CUDA = "cuda"


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", envvar="GEMMA_SERVE_CONFIG", metavar="FILE", help="Settings as YAML."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
DeploymentName = Annotated[
    str | None,
    typer.Argument(
        metavar="[NAME]",
        help="The deployment; by default the only one that runs.",
        show_default=False,
    ),
]
NameOption = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="The same as the argument.")
]
ForGpu = Annotated[
    str | None,
    typer.Option(
        "--for-gpu",
        metavar="CARD",
        help="Plan for GPUs that needn't be here: h200, l4x2, 24GiB, 80GiBx4.",
    ),
]
EngineVersion = Annotated[
    str | None,
    typer.Option(
        "--engine-version",
        metavar="X.Y.Z",
        help="Plan for this version of vLLM; by default the one that is installed.",
    ),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Start although the checks of GPUs and memory say no."),
]
ToFolder = Annotated[
    Path | None,
    typer.Option(
        "--to",
        metavar="DIR",
        help="A plain folder that `--model DIR` serves anywhere; by default the local cache.",
    ),
]
OnDevice = Annotated[
    DeviceName | None,
    typer.Option("--device", help="Plan for vLLM on NVIDIA GPUs or on the CPU."),
]


# What an engine's memory follows from, for the commands that only plan.
MEMORY_SETTINGS = (
    "tensor_parallel_size",
    "gpus",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "enforce_eager",
    "language_model_only",
    "engine_python",
)


def with_settings(
    *names: str, model_help: str | None = None
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command an option for each of the settings `names`, or for all of them.

    `model_help` is what `--model` is to a command that has no default for it.

    The command gets those that were given as one dict, `flags`. Their values stay text: one
    place validates them, wherever they come from.
    """
    chosen = [s for s in SETTINGS if not names or s.name in names]
    if model_help is not None:
        chosen = [replace(s, help=model_help) if s.name == "model" else s for s in chosen]

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(command)
        def run(**given: Any) -> int:
            flags = _given_flags({s.name: given.pop(s.name) for s in chosen})
            return command(flags=flags, **given)

        _set_signature(run, command, chosen)
        return run

    return decorate


def _set_signature(
    run: Callable[..., int], command: Callable[..., int], chosen: Iterable[Setting]
) -> None:
    """What Typer reads of `run`: the settings' options, then the command's own but `flags`."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [_parameter(setting) for setting in chosen]
    parameters += [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.name != "flags"]
    run.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    del run.__wrapped__  # type: ignore[attr-defined]


def _parameter(setting: Setting) -> inspect.Parameter:
    names = [setting.flag, *([setting.short] if setting.short else [])]
    kind: Any = str | None
    default: Any = None
    option = typer.Option(*names, metavar=setting.metavar, help=setting.help)
    if setting.kind == "switch":
        kind = bool | None
        option = typer.Option(f"{setting.flag}/--no-{setting.flag[2:]}", help=setting.help)
    elif setting.kind == "repeated":
        kind = list[str] | None
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, option],
    )


def _given_flags(values: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in values.items() if value not in (None, [])}
    for name in _REPEATED & given.keys():
        given[name] = dict(_key_value(text) for text in given[name])
    return given


_REPEATED = {setting.name for setting in SETTINGS if setting.kind == "repeated"}


def _key_value(text: str) -> tuple[str, str | bool]:
    """`seed=7` is ("seed", "7"); a bare `enable-lora` is a switch that is on."""
    key, equals, value = text.partition("=")
    return (key, value) if equals else (key, True)


def one_name(argument: str | None, option: str | None) -> str | None:
    """The name, however it was given. Raises UsageError for two that differ."""
    if "" in (argument, option):
        raise UsageError(
            "the name of the deployment is empty",
            code="usage",
            hint="`gemma-serve list` shows the names; without one, the only one that runs is meant",
        )
    if argument is not None and option is not None and argument != option:
        raise UsageError(
            f"two names were given, {argument} and {option}",
            code="usage",
            hint="give one of them",
        )
    return argument or option
