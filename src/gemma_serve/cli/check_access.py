"""`gemma-serve check-access`."""

from __future__ import annotations

import os
from typing import Any

from gemma_serve.cli.options import AsJson, ConfigFile, ToFolder, with_settings
from gemma_serve.errors import EXIT_NO, EXIT_OK


@with_settings("model", "revision", "download_dir", model_help="A Gemma on the Hugging Face Hub.")
def check_access(
    *,
    flags: dict[str, Any],
    config: ConfigFile = None,
    to: ToFolder = None,
    as_json: AsJson = False,
) -> int:
    """Ask whether a model may be downloaded, and has room."""
    from gemma_serve.usecases.access import check_access as ask
    from gemma_serve.usecases.configure import read_named_model
    from gemma_serve.view.access import access_data, access_text
    from gemma_serve.view.output import Output

    settings, warnings = read_named_model(flags, os.environ, config)
    report = ask(
        settings.model,
        settings.revision,
        cache_dir=settings.download_dir,
        to=None if to is None else to.expanduser().absolute(),
    )
    Output(as_json=as_json).result(
        "check-access",
        ok=report.ok,
        data=access_data(report),
        problems=(*warnings, *report.problems),
        text=access_text(report),
    )
    return EXIT_OK if report.ok else EXIT_NO
