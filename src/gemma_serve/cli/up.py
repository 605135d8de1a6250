"""`gemma-serve up`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_serve.cli.options import AsJson, ConfigFile, Force, one_name, with_settings
from gemma_serve.cli.smoke_test import Concurrency, Html, Junit
from gemma_serve.errors import EXIT_NO, EXIT_OK, GemmaServeError, UsageError

if TYPE_CHECKING:
    from gemma_serve.usecases.plan import ServePlan
    from gemma_serve.usecases.up import UpOptions, UpResult
    from gemma_serve.view.up import UpView


@with_settings()
def up(
    *,
    flags: dict[str, Any],
    deployment: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="The same as --name.", show_default=False),
    ] = None,
    config: ConfigFile = None,
    detach: Annotated[
        bool,
        typer.Option("--detach", "-d", help="Return when it is ready, and let it run on."),
    ] = False,
    smoke_test: Annotated[
        bool, typer.Option("--smoke-test", help="Test the endpoint once it is ready.")
    ] = False,
    junit: Junit = None,
    html: Html = None,
    concurrency: Concurrency = None,
    once: Annotated[
        bool,
        typer.Option("--once", help="Stop when ready and tested, with the test's exit code."),
    ] = False,
    force: Force = False,
    auto_fix: Annotated[
        bool,
        typer.Option(
            "--auto-fix",
            help="Mend what is safe to mend when a start fails, and try again: a shorter context, "
            "another port, a broken compile cache, memory being released, a time-out.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Start Gemma, show that it answers, and serve until Ctrl-C."""
    from gemma_serve.adapters.settings import read_api_key
    from gemma_serve.usecases.up import UpOptions
    from gemma_serve.usecases.up import up as serve
    from gemma_serve.view.smoke_reports import ReportFiles
    from gemma_serve.view.up import UpView

    if detach and once:
        raise UsageError(
            "--once stops when it is ready, and --detach lets it run on",
            code="usage",
            hint="leave one of the two out",
        )
    reports = ReportFiles(junit, html)
    if (reports.wanted or concurrency) and not smoke_test:
        raise UsageError(
            "--junit, --html and --concurrency are of the smoke test",
            code="usage",
            hint="add --smoke-test",
        )
    reports.refuse_bad_places()
    if deployment is not None:
        flags["name"] = one_name(deployment, flags.get("name"))
    view = UpView(as_json=as_json, reports=reports)
    options = UpOptions(smoke_test=smoke_test, concurrency=concurrency, once=once, force=force)
    if detach:
        return start_detached(
            flags,
            environ=os.environ,
            view=view,
            file=config,
            options=options,
            auto_fix=auto_fix,
        )

    def run(plan: ServePlan, environ: Mapping[str, str]) -> UpResult:
        return serve(
            plan,
            options=options,
            environ=environ,
            api_key=read_api_key(environ, plan.config.api_key_file),
            on_event=view.on_event,
        )

    with view, reports.of_failures():
        result = _start(run, flags, os.environ, view, file=config, force=force, auto_fix=auto_fix)
    view.result(result)
    return EXIT_OK if result.ok else EXIT_NO


def start_detached(
    flags: Mapping[str, Any],
    *,
    environ: Mapping[str, str],
    view: UpView,
    options: UpOptions,
    file: Path | None = None,
    auto_fix: bool = False,
) -> int:
    """Start it in the background and return when it is ready; `up --detach` and `restart`."""
    from gemma_serve.adapters.settings import read_api_key
    from gemma_serve.usecases.detach import up_detached

    def run(plan: ServePlan, environ: Mapping[str, str]) -> UpResult:
        return up_detached(
            plan,
            options=options,
            environ=environ,
            api_key=read_api_key(environ, plan.config.api_key_file),
            on_event=view.on_event,
        )

    force = options.force
    with view, view.reports.of_failures():
        result = _start(run, flags, environ, view, file=file, force=force, auto_fix=auto_fix)
    view.detached(result)
    return EXIT_OK if result.ok else EXIT_NO


def _start(
    run: Callable[[ServePlan, Mapping[str, str]], UpResult],
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    view: UpView,
    *,
    file: Path | None,
    force: bool,
    auto_fix: bool,
) -> UpResult:
    """Prepare and `run`, and with `auto_fix` once more after each failure that can be mended."""
    from gemma_serve.usecases.auto_fix import start_with_fixes
    from gemma_serve.usecases.run import name_of

    def start(
        flags: Mapping[str, Any], environ: Mapping[str, str], begun: Callable[[str], None]
    ) -> UpResult:
        plan = _prepare(flags, environ, view, file=file, force=force)
        begun(name_of(plan))
        return run(plan, environ)

    if not auto_fix:
        return start(flags, environ, lambda name: None)
    return start_with_fixes(start, flags, environ, on_event=view.on_event)


def _prepare(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    view: UpView,
    *,
    file: Path | None,
    force: bool,
) -> ServePlan:
    """Decide, check everything, and bring the model; what was found is shown by `view`."""
    from gemma_serve.adapters.engine_orphans import find_orphans
    from gemma_serve.usecases.bring_model import bring_model
    from gemma_serve.usecases.check import check
    from gemma_serve.usecases.deployments import refuse_if_running
    from gemma_serve.usecases.plan import make_plan
    from gemma_serve.usecases.run import name_of

    def decide() -> ServePlan:
        return make_plan(flags, environ=environ, file=file, force=force)

    plan = decide()
    # Before the checks: what a killed supervisor left may hold the port and the memory.
    ended = refuse_if_running(name_of(plan), environ)
    if ended:
        view.ended_leftovers(name_of(plan), ended)
        plan = decide()
    view.orphans(find_orphans())
    report = check(plan)
    view.checked(report)
    blocking = [problem for problem in report.problems if problem.blocking]
    if blocking:
        raise GemmaServeError.of(blocking)
    plan = bring_model(report, decide, on_event=view.on_event)
    view.starting(plan)
    return plan
