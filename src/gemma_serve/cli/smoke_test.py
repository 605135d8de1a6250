"""`gemma-serve smoke-test`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_serve.cli.options import AsJson, DeploymentName, NameOption, one_name

if TYPE_CHECKING:
    from gemma_serve.adapters.state import Deployment
    from gemma_serve.planning.smoke import CheckResult

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
Timeout = Annotated[
    float, typer.Option(metavar="SECONDS", min=0.1, help="Longest that one request may take.")
]


def smoke_test(
    name: DeploymentName = None,
    named: NameOption = None,
    url: Url = None,
    model: ServedModel = None,
    api_key_file: ApiKeyFile = None,
    timeout: Timeout = 120.0,
    as_json: AsJson = False,
) -> int:
    """Show that a running endpoint keeps its promises, one by one.

    Exits 1 if one is broken.
    """
    from gemma_serve.adapters.endpoint_url import endpoint_url
    from gemma_serve.adapters.settings import API_KEY_VARIABLE, read_api_key
    from gemma_serve.errors import EXIT_NO, EXIT_OK
    from gemma_serve.usecases.smoke import run_smoke
    from gemma_serve.view.output import Output
    from gemma_serve.view.smoke import (
        check_view,
        smoke_data,
        smoke_problems,
        smoke_title,
        verdict_line,
    )

    meant = _endpoint_of(one_name(name, named), url)
    if meant is not None:
        url, model = meant.url, model or meant.served_model_name
        if api_key_file is None and not os.environ.get(API_KEY_VARIABLE):
            api_key_file = meant.api_key_file
    url, api_key = endpoint_url(url or ""), read_api_key(os.environ, api_key_file)
    output = Output(as_json=as_json)

    def show(check: CheckResult) -> None:
        output.data(check_view(check))

    output.data(smoke_title(url, model))
    report = run_smoke(url=url, model=model, api_key=api_key, timeout_s=timeout, on_event=show)
    problems = smoke_problems(report) if as_json else ()  # the text shows them at their checks
    data, text = smoke_data(report), verdict_line(report)
    output.result("smoke-test", ok=report.ok, data=data, problems=problems, text=text)
    return EXIT_OK if report.ok else EXIT_NO


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
