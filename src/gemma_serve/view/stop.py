"""What `stop` did, as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gemma_serve.errors import Problem
from gemma_serve.usecases.events import EngineStopped, Event, Stopping
from gemma_serve.usecases.stop import OrphansResult, StopResult
from gemma_serve.view.deployments import ended_problem
from gemma_serve.view.orphans import orphan_data, orphan_problem
from gemma_serve.view.output import Output
from gemma_serve.view.up import stopped_text


class StopView:
    """Shows a stop as it goes."""

    def __init__(self, *, as_json: bool) -> None:
        self._output = Output(as_json=as_json)

    def on_event(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, EngineStopped):
            self._output.note(stopped_text(event))
        elif isinstance(event, Stopping):
            self._output.note(f"stopping the engine (up to {event.grace_s:.0f} s; Ctrl-C to hurry)")

    def result(self, result: StopResult) -> None:
        """The answer."""
        problems: tuple[Problem, ...] = result.problems
        if result.ended:
            problems += (ended_problem(result.name, result.ended),)
        if result.forced:
            problems += (_forced(result.name),)
        text = f"{result.name} is stopped" if not result.stopped or not result.stopped.left else ""
        self._output.result(
            "stop",
            ok=not any(problem.blocking for problem in problems),
            data=stop_data(result),
            problems=problems,
            text=text,
        )

    def orphans(self, result: OrphansResult) -> None:
        """The answer of `stop --orphans`."""
        self._output.result(
            "stop",
            ok=True,
            data={
                "ended_pids": {name: list(pids) for name, pids in result.ended.items()},
                "others": [orphan_data(orphan) for orphan in result.others],
            },
            problems=[
                *(ended_problem(name, pids) for name, pids in result.ended.items()),
                *(orphan_problem(orphan) for orphan in result.others),
            ],
            text="" if result.ended else "no orphan of ours was found",
        )


def stop_data(result: StopResult) -> dict[str, Any]:
    """The `data` of `stop --json`."""
    stopped = result.stopped
    return {
        "name": result.name,
        "duration_s": round(result.duration_s, 3),
        "forced": result.forced,
        "ended_pids": list(result.ended),
        "killed": None if stopped is None else stopped.killed,
        "left_pids": [] if stopped is None else list(stopped.left),
        "steps": [] if stopped is None else [asdict(step) for step in stopped.steps],
        "port_is_free": None if stopped is None else stopped.port_is_free,
        "gpu_bytes_held": None if stopped is None else stopped.gpu_bytes_held,
    }


def _forced(name: str) -> Problem:
    return Problem(
        "supervisor.forced",
        f"the supervisor of {name} did not answer and was killed; its guard ended the engine",
        blocking=False,
    )
