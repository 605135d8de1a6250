"""`gemma-serve check-gpu`."""

from __future__ import annotations

import os
from typing import Any

from gemma_serve.cli.options import AsJson, ConfigFile, with_settings
from gemma_serve.errors import EXIT_NO, EXIT_OK


@with_settings(
    "model",
    "revision",
    "tensor_parallel_size",
    "gpus",
    "gpu_memory_utilization",
    "dtype",
    "download_dir",
)
def check_gpu(*, flags: dict[str, Any], config: ConfigFile = None, as_json: AsJson = False) -> int:
    """Show the GPUs and whether a model fits."""
    from gemma_serve.planning.config import resolve
    from gemma_serve.usecases.check_gpu import check_gpu as look
    from gemma_serve.usecases.configure import read_layers
    from gemma_serve.view.gpu import gpu_data, gpu_text
    from gemma_serve.view.output import Output

    layers, warnings = read_layers(flags, os.environ, config)
    resolved = resolve(layers)
    given = resolved.config
    report = look(
        environ=os.environ,
        model=None if resolved.sources["model"] == "default" else given.model,
        revision=given.revision,
        tensor_parallel_size=given.tensor_parallel_size,
        gpus=given.gpus,
        gpu_memory_utilization=given.gpu_memory_utilization,
        dtype=given.dtype,
        download_dir=given.download_dir,
    )
    Output(as_json=as_json).result(
        "check-gpu",
        ok=report.ok,
        data=gpu_data(report),
        problems=(*warnings, *report.problems),
        text=gpu_text(report),
    )
    return EXIT_OK if report.ok else EXIT_NO
