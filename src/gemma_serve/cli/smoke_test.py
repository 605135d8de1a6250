"""`gemma-serve smoke-test`."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_serve.cli.options import AsJson, DeploymentName, NameOption, one_name

if TYPE_CHECKING:
    from gemma_serve.adapters.state import Deployment
    from gemma_serve.planning.smoke.report import SmokeReport
    from gemma_serve.usecases.smoke.session import SmokeOptions

Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="GEMMA_SERVE_URL",
        help="The endpoint, such as http://127.0.0.1:8000; by default what `up` started.",
    ),
]
ServedModel = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="The served name to ask for; by default the first that is listed."
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="GEMMA_SERVE_API_KEY_FILE",
        help="File with the API key (or set GEMMA_SERVE_API_KEY).",
    ),
]
Junit = Annotated[
    Path | None,
    typer.Option("--junit", metavar="FILE", help="Write the smoke test's report as JUnit XML."),
]
Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write it as one HTML file, with pictures."),
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        "--concurrency",
        metavar="N",
        min=1,
        max=256,
        help="Requests that the smoke test sends at once; by default 8, or as many as a "
        "deployment of this machine takes.",
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        metavar="IDS", help="Try only these checks (chat,together), and those that they need."
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(metavar="IDS", help="Leave these checks out, and those that need them."),
]
Require = Annotated[
    list[str] | None,
    typer.Option(metavar="IDS", help="Fail if one of these can't be tried, such as chat."),
]
MaxTtft = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", min=0.0, help="Fail if the first token takes longer."),
]
MinTokensPerSecond = Annotated[
    float | None,
    typer.Option(metavar="N", min=0.0, help="Fail if the requests at once get fewer in all."),
]
Timeout = Annotated[
    float, typer.Option(metavar="SECONDS", min=0.1, help="Longest that the whole test may take.")
]
CheckTimeout = Annotated[
    float, typer.Option(metavar="SECONDS", min=0.1, help="Longest that one check may take.")
]


def smoke_test(
    name: DeploymentName = None,
    named: NameOption = None,
    url: Url = None,
    model: ServedModel = None,
    api_key_file: ApiKeyFile = None,
    only: Only = None,
    skip: Skip = None,
    require: Require = None,
    concurrency: Concurrency = None,
    max_ttft: MaxTtft = None,
    min_tokens_per_second: MinTokensPerSecond = None,
    timeout: Timeout = 300.0,
    check_timeout: CheckTimeout = 60.0,
    junit: Junit = None,
    html: Html = None,
    as_json: AsJson = False,
) -> int:
    """Show that a running endpoint keeps its promises, one by one.

    Exits 1 if one is broken. The checks and their ids: docs/smoke-test.md.
    """
    from gemma_serve.adapters.endpoint_url import endpoint_url
    from gemma_serve.adapters.settings import read_api_key
    from gemma_serve.adapters.state import DeploymentFolder
    from gemma_serve.errors import EXIT_NO, EXIT_OK
    from gemma_serve.planning.smoke.choice import choose
    from gemma_serve.usecases.run import kept_run
    from gemma_serve.usecases.smoke.session import SmokeOptions, usual_concurrency
    from gemma_serve.view.output import Output
    from gemma_serve.view.smoke import smoke_data, smoke_problems, verdict_line
    from gemma_serve.view.smoke_reports import ReportFiles

    limits = {"first-token": max_ttft, "throughput": min_tokens_per_second}
    choice = choose(only=only, skip=skip, require=require, limits=limits)
    files = ReportFiles(junit, html)
    files.refuse_bad_places()
    there = "" if url is None else endpoint_url(url)
    key = read_api_key(os.environ, api_key_file)
    with files.of_failures():
        meant = _endpoint_of(one_name(name, named), url)
        if meant is not None:
            there, model = meant.url, model or meant.served_model_name
            run = kept_run(DeploymentFolder(meant.folder))
            concurrency = concurrency or usual_concurrency(run.max_num_seqs if run else None)
            key = key or read_api_key(os.environ, meant.api_key_file)
        report = _run(
            there,
            model,
            key,
            choice.ids,
            SmokeOptions(
                concurrency=concurrency or usual_concurrency(None),
                max_ttft_s=max_ttft,
                min_tokens_per_second=min_tokens_per_second,
                timeout_s=timeout,
                check_timeout_s=check_timeout,
                required=choice.required,
                left_out=choice.left_out,
            ),
            as_json=as_json,
        )
    files.write(report)
    problems = smoke_problems(report) if as_json else ()  # the text shows them at their checks
    Output(as_json=as_json).result(
        "smoke-test",
        ok=report.ok,
        data=smoke_data(report),
        problems=problems,
        text=verdict_line(report),
    )
    return EXIT_OK if report.ok else EXIT_NO


def _run(
    url: str,
    model: str | None,
    api_key: str | None,
    ids: tuple[str, ...],
    options: SmokeOptions,
    *,
    as_json: bool,
) -> SmokeReport:
    """Run the checks and show each: in a live table on a terminal, else line by line.

    Raises:
        Stopped: Ctrl-C.
    """
    from gemma_serve.errors import Stopped
    from gemma_serve.planning.smoke.promises import with_needs
    from gemma_serve.usecases.smoke.run import run_smoke
    from gemma_serve.view.output import Output
    from gemma_serve.view.smoke import check_view, smoke_title
    from gemma_serve.view.smoke_table import SmokeTable, can_show_table

    output, title = Output(as_json=as_json), smoke_title(url, model)
    run = partial(run_smoke, url=url, model=model, api_key=api_key, options=options, only=ids)
    try:
        if not as_json and can_show_table():
            with SmokeTable(with_needs(ids), title) as table:
                return run(on_begin=table.began, on_event=table.ended)
        output.data(title)
        return run(on_event=lambda check: output.data(check_view(check)))
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT) from None


def _endpoint_of(name: str | None, url: str | None) -> Deployment | None:
    """The deployment that is meant, or None for the endpoint at `url`.

    A name is stronger than a URL from the environment. Raises GemmaServeError where none runs,
    UsageError for several, or for a name and a URL that were both typed.
    """
    from gemma_serve.errors import GemmaServeError, UsageError
    from gemma_serve.usecases.deployments import find_deployment

    if url is not None and name is None:
        return None
    if url is not None and url != os.environ.get("GEMMA_SERVE_URL"):
        raise UsageError(
            "a deployment and --url were both given",
            code="usage",
            hint="leave one of the two out",
        )
    found = find_deployment(name, os.environ)
    deployment = found.deployment
    if not found.running:
        raise GemmaServeError(
            f"{deployment.name} is not running, it is {deployment.state}",
            code="smoke.no_deployment",
            hint=f"start it with `gemma-serve restart {deployment.name}`, or name an endpoint "
            "with --url",
        )
    if deployment.state not in ("ready", "unhealthy"):
        is_still = "still starting" if deployment.state == "starting" else deployment.state
        raise GemmaServeError(
            f"{deployment.name} is {is_still}",
            code="smoke.starting",
            hint=f"wait until `gemma-serve status {deployment.name}` says ready; or let it test "
            "by itself: `up --smoke-test`",
        )
    return deployment
