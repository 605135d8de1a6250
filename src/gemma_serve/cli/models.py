"""`gemma-serve models`."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from gemma_serve.cli.options import (
    MEMORY_SETTINGS,
    AsJson,
    ConfigFile,
    EngineVersion,
    ForGpu,
    OnDevice,
    with_settings,
)
from gemma_serve.errors import EXIT_OK

Family = Annotated[
    str | None,
    typer.Option("--family", metavar="NAME", help="One family alone, such as `Gemma 3`."),
]

Fitting = Annotated[bool, typer.Option("--fits", help="Only those that fit.")]


@with_settings(*MEMORY_SETTINGS)
def models(
    *,
    flags: dict[str, Any],
    config: ConfigFile = None,
    family: Family = None,
    fits: Fitting = False,
    for_gpu: ForGpu = None,
    engine_version: EngineVersion = None,
    device: OnDevice = None,
    as_json: AsJson = False,
) -> int:
    """List the public Gemmas, and which of them fit here. Exits 0 whether any fits or not."""
    from gemma_serve.usecases.models import list_models
    from gemma_serve.usecases.target import PlanFor
    from gemma_serve.view.models import models_data, models_table
    from gemma_serve.view.output import Output

    plan_for = PlanFor(engine_version, device.value if device else None, for_gpu)
    report = list_models(
        flags, environ=os.environ, file=config, plan_for=plan_for, family=family, only_fitting=fits
    )
    Output(as_json=as_json).result(
        "models",
        ok=True,
        data=models_data(report),
        problems=report.problems,
        text=models_table(report),
    )
    return EXIT_OK
