"""`gemma-serve smoke-test`."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    from gemma_serve.planning.smoke.promises import PROMISES
    from gemma_serve.usecases.run import kept_run
    from gemma_serve.usecases.smoke.session import SmokeOptions, usual_concurrency
    from gemma_serve.view.output import Output
    from gemma_serve.view.smoke import smoke_data, smoke_problems, verdict_line
    from gemma_serve.view.smoke_reports import ReportFiles

    chosen = known_ids("--only", only)
    left_out, required = known_ids("--skip", skip), known_ids("--require", require)
    limits = {"first-token": max_ttft, "throughput": min_tokens_per_second}
    refuse_contradictions(chosen, left_out, required, limits)
    # A limit that is given is judged, whatever else is chosen.
    limited = tuple(id for id, limit in limits.items() if limit is not None)
    chosen = (*chosen, *required, *limited) if chosen else tuple(PROMISES)
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
        report = _run_or_stop(
            there,
            model,
            key,
            chosen,
            SmokeOptions(
                concurrency=concurrency or usual_concurrency(None),
                max_ttft_s=max_ttft,
                min_tokens_per_second=min_tokens_per_second,
                timeout_s=timeout,
                check_timeout_s=check_timeout,
                required=frozenset(required),
                left_out=frozenset(left_out),
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


def known_ids(option: str, given: Sequence[str] | None) -> tuple[str, ...]:
    """The ids in `given`, each perhaps several with commas between them.

    Raises:
        UsageError: one is no check's.
    """
    from difflib import get_close_matches

    from gemma_serve.errors import UsageError
    from gemma_serve.planning.smoke.promises import PROMISES

    ids = [id.strip() for text in given or () for id in text.split(",") if id.strip()]
    for id in ids:
        if id not in PROMISES:
            close = get_close_matches(id, PROMISES, 1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise UsageError(
                f"{option} {id}: there is no such check",
                code="usage",
                hint=f"{meant}the checks are {', '.join(PROMISES)}",
            )
    if given and not ids:
        raise UsageError(f"{option} names no check", code="usage", hint="such as --only chat")
    return tuple(ids)


def _run_or_stop(*args: Any, **options: Any) -> SmokeReport:
    """`_run`, with Ctrl-C as the error that reports can tell of."""
    from gemma_serve.errors import Stopped

    try:
        return _run(*args, **options)
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT) from None


def refuse_contradictions(
    chosen: Collection[str],
    left_out: Collection[str],
    required: Collection[str],
    limits: Mapping[str, float | None],
) -> None:
    """Raise UsageError for a choice of checks of which nothing, or not what was meant, is left."""
    from gemma_serve.errors import UsageError
    from gemma_serve.planning.smoke.promises import needed_in_any_case

    wanted = {*chosen, *required}
    needed = needed_in_any_case({*wanted, "completion"})  # without these nothing is left
    for id in left_out:
        if id in needed or id in wanted:
            what = "what is to be tried needs it" if id not in wanted else "it is to be tried"
            raise UsageError(f"--skip {id}: {what}", code="usage", hint="leave one of them out")
    for id, limit in limits.items():
        if id in wanted and limit is None:
            option = "--max-ttft" if id == "first-token" else "--min-tokens-per-second"
            raise UsageError(f"{id} has no limit to test", code="usage", hint=f"give {option}")


def _run(
    url: str,
    model: str | None,
    api_key: str | None,
    ids: tuple[str, ...],
    options: SmokeOptions,
    *,
    as_json: bool,
) -> SmokeReport:
    """Run the checks and show each: in a live table on a terminal, else line by line."""
    from gemma_serve.planning.smoke.promises import with_needs
    from gemma_serve.usecases.smoke.run import run_smoke
    from gemma_serve.view.output import Output
    from gemma_serve.view.smoke import check_view, smoke_title
    from gemma_serve.view.smoke_table import SmokeTable, can_show_table

    output, title = Output(as_json=as_json), smoke_title(url, model)
    run = partial(run_smoke, url=url, model=model, api_key=api_key, options=options, only=ids)
    if not as_json and can_show_table():
        with SmokeTable(with_needs(ids), title) as table:
            return run(on_begin=table.began, on_event=table.ended)
    output.data(title)
    return run(on_event=lambda check: output.data(check_view(check)))


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
