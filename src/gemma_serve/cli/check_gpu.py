"""`gemma-serve check-gpu`."""

from __future__ import annotations

import os
from typing import Any

from gemma_serve.cli.options import (
    MEMORY_SETTINGS,
    AsJson,
    ConfigFile,
    EngineVersion,
    ForGpu,
    OnDevice,
    with_settings,
)
from gemma_serve.errors import EXIT_NO, EXIT_OK


@with_settings(
    "model",
    "revision",
    *MEMORY_SETTINGS,
    "download_dir",
    "engine_args",
)
def check_gpu(
    *,
    flags: dict[str, Any],
    config: ConfigFile = None,
    for_gpu: ForGpu = None,
    engine_version: EngineVersion = None,
    device: OnDevice = None,
    as_json: AsJson = False,
) -> int:
    """Show the GPUs, and whether and how a model fits them."""
    from gemma_serve.usecases.check_gpu import check_gpu as look
    from gemma_serve.usecases.target import PlanFor
    from gemma_serve.view.gpu import gpu_data, gpu_text
    from gemma_serve.view.output import Output

    plan_for = PlanFor(engine_version, device.value if device else None, for_gpu)
    report = look(flags, environ=os.environ, file=config, plan_for=plan_for)
    Output(as_json=as_json).result(
        "check-gpu",
        ok=report.ok,
        data=gpu_data(report),
        problems=report.problems,
        text=gpu_text(report),
    )
    return EXIT_OK if report.ok else EXIT_NO
