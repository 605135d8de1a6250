"""`gemma-serve download`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from gemma_serve.cli.options import AsJson, ConfigFile, with_settings
from gemma_serve.errors import EXIT_OK

To = Annotated[
    Path | None,
    typer.Option(
        "--to",
        metavar="DIR",
        help="A plain folder that `--model DIR` serves anywhere; by default the local cache.",
    ),
]


@with_settings("model", "revision", "download_dir")
def download(
    *,
    flags: dict[str, Any],
    config: ConfigFile = None,
    to: To = None,
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
