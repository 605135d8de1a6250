"""`gemma-serve download`."""

from __future__ import annotations

import os
from typing import Any

from gemma_serve.cli.options import AsJson, ConfigFile, ToFolder, with_settings
from gemma_serve.errors import EXIT_OK


@with_settings("model", "revision", "download_dir", model_help="A Gemma on the Hugging Face Hub.")
def download(
    *,
    flags: dict[str, Any],
    config: ConfigFile = None,
    to: ToFolder = None,
    as_json: AsJson = False,
) -> int:
    """Download a model, resuming, and check every file."""
    from gemma_serve.usecases.configure import read_named_model
    from gemma_serve.usecases.download import DownloadRequest
    from gemma_serve.usecases.download import download as bring
    from gemma_serve.view.download import DownloadView, download_data
    from gemma_serve.view.output import Output

    settings, warnings = read_named_model(flags, os.environ, config)
    output = Output(as_json=as_json)
    if not as_json:
        output.problems(warnings)
    request = DownloadRequest(
        settings.model,
        settings.revision,
        settings.download_dir,
        None if to is None else to.expanduser().absolute(),
    )
    view = DownloadView(output)
    with view:
        result = bring(request, on_event=view.on_event)
    problems = (*warnings, *view.noticed)
    output.result(
        "download",
        ok=True,
        data=download_data(result),
        problems=problems if as_json else (),
        text=str(result.folder),
    )
    return EXIT_OK
