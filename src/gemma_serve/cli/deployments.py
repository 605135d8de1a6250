"""`gemma-serve status`, `list`, `logs`, `stop`, `restart`, and the hidden `supervise`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from gemma_serve.cli.options import AsJson, DeploymentName, NameOption, one_name
from gemma_serve.errors import EXIT_NO, EXIT_OK, UsageError


def status(name: DeploymentName = None, named: NameOption = None, as_json: AsJson = False) -> int:
    """Show how a deployment is. Exits 0 if it is ready, else 1."""
    from gemma_serve.usecases.status import read_status
    from gemma_serve.view.deployments import status_data, status_problems, status_text
    from gemma_serve.view.output import Output

    found = read_status(one_name(name, named), os.environ)
    Output(as_json=as_json).result(
        "status",
        ok=found.ok,
        data=status_data(found),
        problems=status_problems(found),
        text=status_text(found),
    )
    return EXIT_OK if found.ok else EXIT_NO


def list_(as_json: AsJson = False) -> int:
    """List every deployment, running or not."""
    from gemma_serve.usecases.status import list_deployments
    from gemma_serve.view.deployments import deployment_data, deployments_table
    from gemma_serve.view.output import Output

    found = list_deployments(os.environ)
    data = [{**deployment_data(one.deployment), "running": one.running} for one in found]
    text = deployments_table(found)
    Output(as_json=as_json).result("list", ok=True, data={"deployments": data}, text=text)
    return EXIT_OK


def logs(
    name: DeploymentName = None,
    named: NameOption = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the deployment ends.")
    ] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=0, metavar="N", help="How many of the last lines.")
    ] = 100,
    as_json: AsJson = False,
) -> int:
    """Show what a deployment's engine prints."""
    from gemma_serve.usecases.logs import show_logs
    from gemma_serve.view.output import Output

    output = Output(as_json=as_json)

    def show(line: str) -> None:
        if as_json:
            output.json_line({"line": line})
        else:
            typer.echo(line)

    found = show_logs(
        one_name(name, named), lines=lines, follow=follow, environ=os.environ, on_line=show
    )
    if as_json:
        output.result("logs", ok=True, data={"name": found})
    return EXIT_OK


def stop(
    name: DeploymentName = None,
    named: NameOption = None,
    drain_timeout: Annotated[
        float | None,
        typer.Option(
            "--drain-timeout",
            min=0,
            metavar="SECONDS",
            help="How long requests in flight may go on; by default what `up` was told.",
        ),
    ] = None,
    orphans: Annotated[
        bool,
        typer.Option("--orphans", help="End engines of ours that nobody looks after any more."),
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Stop a deployment, and show that nothing of it is left."""
    from gemma_serve.usecases.stop import stop as run
    from gemma_serve.usecases.stop import stop_orphans
    from gemma_serve.view.stop import StopView

    view = StopView(as_json=as_json)
    if orphans:
        if one_name(name, named) is not None:
            raise UsageError(
                "--orphans ends what no deployment looks after, and one was named",
                code="usage",
                hint="leave one of the two out",
            )
        view.orphans(stop_orphans(os.environ))
        return EXIT_OK
    result = run(
        one_name(name, named),
        drain_timeout=drain_timeout,
        environ=os.environ,
        on_event=view.on_event,
    )
    view.result(result)
    return EXIT_NO if any(problem.blocking for problem in result.problems) else EXIT_OK


def restart(
    name: DeploymentName = None,
    named: NameOption = None,
    port: Annotated[
        str | None, typer.Option("--port", metavar="PORT", help="Listen on another port from now.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Stop a deployment if it runs, and start it in the background with the same settings."""
    from gemma_serve.cli.up import start_detached
    from gemma_serve.usecases.plan import make_plan
    from gemma_serve.usecases.restart import (
        end_last_run,
        environment_without_settings,
        read_last_run,
        refuse_what_would_fail,
        settings_as_flags,
    )
    from gemma_serve.usecases.up import UpOptions
    from gemma_serve.view.stop import StopView
    from gemma_serve.view.up import UpView

    run = read_last_run(one_name(name, named), os.environ)
    flags, environ = settings_as_flags(run), environment_without_settings(os.environ)
    if port is not None:
        flags["port"] = port
    refuse_what_would_fail(make_plan(flags, environ=environ, force=run.force))
    end_last_run(run.name, os.environ, on_event=StopView(as_json=as_json).on_event)
    view = UpView(as_json=as_json, command="restart")
    return start_detached(flags, environ=environ, view=view, options=UpOptions(force=run.force))


def supervise(
    name: str,
    locks: Annotated[str, typer.Option("--locks")],
    events: Annotated[int, typer.Option("--events")],
) -> int:
    """Look after a deployment in the background; `up --detach` starts it."""
    from gemma_serve.adapters.claims import Claim
    from gemma_serve.adapters.settings import read_api_key
    from gemma_serve.adapters.state import deployment_folder
    from gemma_serve.usecases.detach import EventPipe
    from gemma_serve.usecases.run import read_run
    from gemma_serve.usecases.up import supervise as look_after

    folder = deployment_folder(name, os.environ)
    run = read_run(folder.read_json(folder.run) or {})
    of_name, of_port = map(int, locks.split(","))
    look_after(
        run,
        Claim.inherited((of_name, of_port), name, run.port, os.environ),
        environ=os.environ,
        api_key=read_api_key(os.environ, run.api_key_file),
        on_event=EventPipe(events).tell,
    )
    return EXIT_OK
