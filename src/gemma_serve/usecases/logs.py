"""The engine's log: its last lines, and those to come."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gemma_serve.engine.inbox import Inbox
from gemma_serve.engine.log import LogReader, tail_lines
from gemma_serve.errors import GemmaServeError, Stopped
from gemma_serve.usecases.deployments import find_deployment, settle

_TICK_S = 0.2


def show_logs(
    name: str | None,
    *,
    lines: int,
    follow: bool,
    environ: Mapping[str, str],
    on_line: Callable[[str], None],
) -> str:
    """Give the last `lines` lines, and with `follow` those to come until the deployment ends.

    Returns:
        The deployment's name.

    Raises:
        GemmaServeError: there is no such deployment, or it has no log.
        Stopped: a signal came while following.
    """
    deployment = find_deployment(name, environ).deployment
    if not deployment.log.exists():
        raise GemmaServeError(
            f"{deployment.name} has no log at {deployment.log}",
            code="logs.missing",
            hint=f"`gemma-serve status {deployment.name}` says what became of it",
        )
    reader = LogReader(deployment.log)
    if follow:
        # What is there by now comes from the tail, and what comes after it from the reader.
        while reader.new_lines():
            continue
    for line in tail_lines(deployment.log, lines):
        on_line(line)
    if follow:
        _follow(reader, deployment.name, environ, on_line)
    return deployment.name


def _follow(
    reader: LogReader, name: str, environ: Mapping[str, str], on_line: Callable[[str], None]
) -> None:
    with Inbox() as inbox:
        while True:
            settled = settle(name, environ)
            for line in reader.new_lines():
                on_line(line)
            if inbox.signals:
                raise Stopped(inbox.signals[0])
            if settled is None or not settled.running:
                return
            inbox.wait(_TICK_S)
