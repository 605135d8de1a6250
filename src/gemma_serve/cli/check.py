"""`gemma-serve check`."""

from __future__ import annotations

import os
from typing import Any

from gemma_serve.cli.options import AsJson, ConfigFile, Force, with_settings
from gemma_serve.errors import EXIT_NO, EXIT_OK


@with_settings()
def check(
    *,
    flags: dict[str, Any],
    config: ConfigFile = None,
    force: Force = False,
    as_json: AsJson = False,
) -> int:
    """Check all that `up` needs, at once; start nothing."""
    from gemma_serve.usecases.check import check as look
    from gemma_serve.usecases.plan import make_plan
    from gemma_serve.view.check import check_data, check_text
    from gemma_serve.view.output import Output

    report = look(make_plan(flags, environ=os.environ, file=config, force=force))
    Output(as_json=as_json).result(
        "check",
        ok=report.ok,
        data=check_data(report),
        problems=report.problems,
        text=check_text(report),
    )
    return EXIT_OK if report.ok else EXIT_NO
