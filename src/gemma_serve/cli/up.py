"""`gemma-serve up`."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from gemma_serve.cli.options import AsJson, ConfigFile, Force, with_settings
from gemma_serve.errors import EXIT_NO, EXIT_OK, GemmaServeError


@with_settings()
def up(
    *,
    flags: dict[str, Any],
    config: ConfigFile = None,
    smoke_test: Annotated[
        bool, typer.Option("--smoke-test", help="Test the endpoint once it is ready.")
    ] = False,
    once: Annotated[
        bool,
        typer.Option("--once", help="Stop when ready and tested, with the test's exit code."),
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> int:
    """Start Gemma, show that it answers, and serve until Ctrl-C."""
    from gemma_serve.adapters.settings import read_api_key
    from gemma_serve.usecases.bring_model import bring_model
    from gemma_serve.usecases.check import check
    from gemma_serve.usecases.plan import ServePlan, make_plan
    from gemma_serve.usecases.up import UpOptions
    from gemma_serve.usecases.up import up as run
    from gemma_serve.view.up import UpView

    def decide() -> ServePlan:
        return make_plan(flags, environ=os.environ, file=config, force=force)

    view = UpView(as_json=as_json)
    report = check(decide())
    view.checked(report)
    blocking = [problem for problem in report.problems if problem.blocking]
    if blocking:
        raise GemmaServeError.of(blocking)
    with view:
        plan = bring_model(report, decide, on_event=view.on_event)
        view.starting(plan)
        result = run(
            plan,
            options=UpOptions(smoke_test=smoke_test, once=once),
            environ=os.environ,
            api_key=read_api_key(os.environ, plan.config.api_key_file),
            on_event=view.on_event,
        )
    view.result(result)
    return EXIT_OK if result.ok else EXIT_NO
