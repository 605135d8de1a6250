"""`gemma-serve plan`."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated, Any

import typer

from gemma_serve.cli.options import (
    AsJson,
    ConfigFile,
    EngineVersion,
    Force,
    ForGpu,
    OnDevice,
    with_settings,
)
from gemma_serve.errors import EXIT_NO, EXIT_OK


class Format(StrEnum):
    """How the plan is written."""

    TEXT = "text"
    YAML = "yaml"
    ARGV = "argv"
    JSON = "json"


@with_settings()
def plan(
    *,
    flags: dict[str, Any],
    config: ConfigFile = None,
    for_gpu: ForGpu = None,
    engine_version: EngineVersion = None,
    device: OnDevice = None,
    force: Force = False,
    output_format: Annotated[
        Format, typer.Option("--format", "-f", help="How to write it.")
    ] = Format.TEXT,
    as_json: AsJson = False,
) -> int:
    """Show what `up` would run; start nothing."""
    from gemma_serve.usecases.plan import make_plan
    from gemma_serve.usecases.target import PlanFor
    from gemma_serve.view.output import Output
    from gemma_serve.view.plan import command_line, plan_data, plan_table, plan_yaml

    shown = Format.JSON if as_json else output_format
    plan_for = PlanFor(engine_version, device.value if device else None, for_gpu)
    made = make_plan(flags, environ=os.environ, file=config, plan_for=plan_for, force=force)
    output = Output(as_json=shown is Format.JSON)
    if shown is Format.TEXT:
        output.data(plan_table(made))
    text = plan_yaml(made) if shown is Format.YAML else command_line(made)
    output.result("plan", ok=made.ok, data=plan_data(made), problems=made.problems, text=text)
    return EXIT_OK if made.ok else EXIT_NO
