"""`up` as it goes: phases and progress for a person, JSON lines for a program."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gemma_serve.adapters.engine_orphans import EngineOrphan
from gemma_serve.errors import Problem
from gemma_serve.planning.smoke.report import CheckResult, SmokeReport
from gemma_serve.usecases.check import CheckReport
from gemma_serve.usecases.events import (
    EVENT_NAMES,
    AutoFixed,
    Diagnosed,
    EngineDied,
    EngineReady,
    EngineStarted,
    EngineStopped,
    Event,
    HealthChanged,
    Noticed,
    PhaseBegan,
    PhaseProgress,
    Restarting,
    Silent,
    Stopping,
)
from gemma_serve.usecases.plan import ServePlan
from gemma_serve.usecases.proof import stop_problems
from gemma_serve.usecases.up import UpResult
from gemma_serve.view.diagnosis import diagnosis_data, evidence_lines
from gemma_serve.view.download import DownloadView
from gemma_serve.view.orphans import orphan_problem
from gemma_serve.view.output import Output, err_console
from gemma_serve.view.smoke import check_data, check_view, smoke_data, smoke_problems, verdict_line
from gemma_serve.view.smoke_reports import NO_REPORTS, ReportFiles

if TYPE_CHECKING:
    from rich.status import Status


class UpView:
    """Shows one run of `up`. A context manager, so that a spinner never outlives it."""

    def __init__(
        self, *, as_json: bool, command: str = "up", reports: ReportFiles = NO_REPORTS
    ) -> None:
        self.reports = reports
        self._command = command
        self._output = Output(as_json=as_json)
        self._download = DownloadView(self._output)
        self._problems: tuple[Problem, ...] = ()
        self._orphans: tuple[Problem, ...] = ()
        self._status: Status | None = None
        self._key_source: str | None = None

    def __enter__(self) -> UpView:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._download.__exit__(kind, error, trace)
        self._end_status()

    def _end_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def checked(self, report: CheckReport) -> None:
        """What was decided and what the checks found, before anything starts."""
        for note in report.plan.notes:
            self._output.note(f"note: {note}")
        self._problems = tuple(p for p in report.problems if not p.blocking)
        if not self._output.as_json:
            self._output.problems(self._problems)

    def starting(self, plan: ServePlan) -> None:
        """The model is here, and the engine comes next."""
        self._download.end()
        self._key_source = plan.launch.secrets.get("VLLM_API_KEY")
        engine = plan.engine
        where = ", ".join(f"GPU {gpu.index} ({gpu.name})" for gpu in plan.gpus) or "the CPU"
        built = f"{engine.distribution or 'vLLM'} {engine.version or ''}".strip()
        commit = f" at {plan.model.commit[:12]}" if plan.model.commit else ""
        self._output.note(f"starting {plan.config.model}{commit} on {where} with {built}")
        console = err_console()
        if console.is_terminal and not self._output.as_json:
            self._status = console.status("starting")
            self._status.start()

    def on_event(self, event: Event) -> None:
        """Show one event as it happens, and write the reports of the smoke test."""
        if isinstance(event, SmokeReport):
            self.reports.write(event)
        if self._output.as_json:
            if self._download.is_due(event):
                self._output.json_line(event_data(event))
        elif self._download.shows(event):
            return
        elif isinstance(event, PhaseBegan):
            self._output.note(f"{event.at_s:7.1f} s  {event.phase}")
            self._spin(event.phase)
        elif isinstance(event, PhaseProgress):
            self._spin(f"{event.phase} {event.detail}")
        else:
            self._show(event)

    def _spin(self, text: str) -> None:
        if self._status is not None:
            self._status.update(text)

    def _show(self, event: Event) -> None:
        if isinstance(event, EngineStarted):
            self._output.note(f"engine's pid {event.pid}, its log {event.log}")
        elif isinstance(event, EngineReady):
            self._end_status()
            self._output.data(_ready_text(event, self._key_source))
        elif isinstance(event, CheckResult):
            self._output.data(check_view(event))
        elif isinstance(event, SmokeReport):
            self._output.data(verdict_line(event))
        elif isinstance(event, Noticed):
            self._output.problems([event.problem])
        elif isinstance(event, Silent):
            self._output.note(silence_text(event.silent_s, event.phase))
        elif isinstance(event, HealthChanged):
            self._output.note("healthy again" if event.ok else f"unhealthy: {event.reason}")
        elif isinstance(event, EngineDied):
            self._output.note(event.cause)
        elif isinstance(event, Diagnosed):
            for line in evidence_lines(event.diagnosis):
                self._output.note(f"the engine's log, {line}")
        elif isinstance(event, AutoFixed):
            self._output.problems([Problem(event.id, event.message, blocking=False)])
            self._output.note(f"auto-fix {event.attempt} for {event.id}: {event.what}")
        elif isinstance(event, Restarting):
            self._output.note(f"starting it again in {event.pause_s:g} s (restart {event.attempt})")
        elif isinstance(event, Stopping):
            self._end_status()
            self._output.note(
                f"stopping the engine (up to {event.grace_s:.0f} s; Ctrl-C again to hurry)"
            )
        elif isinstance(event, EngineStopped):
            self._output.note(stopped_text(event))
            self._output.problems([p for p in stop_problems(event) if not p.blocking])

    def result(self, result: UpResult) -> None:
        """The last line for a program; a person has seen it all."""
        if self._output.as_json:
            broken = () if result.smoke is None else smoke_problems(result.smoke)
            problems = (*self._orphans, *self._problems, *broken)
            self._output.result(
                self._command, ok=result.ok, data=result_data(result), problems=problems
            )

    def detached(self, result: UpResult) -> None:
        """The last line where it runs on in the background, and how to get at it."""
        if self._output.as_json:
            self.result(result)
            return
        name = result.name
        self._output.note(
            f"{name} runs in the background: gemma-serve status {name}, logs -f {name}, stop {name}"
        )

    def orphans(self, orphans: Sequence[EngineOrphan]) -> None:
        """Engines that nobody looks after: they may hold the memory that is wanted."""
        found = tuple(orphan_problem(orphan) for orphan in orphans)
        self._orphans = found
        if not self._output.as_json:
            self._output.problems(found)

    def ended_leftovers(self, name: str, pids: Sequence[int]) -> None:
        """Processes that a killed supervisor had left, and that were ended for this start."""
        listed = ", ".join(map(str, pids))
        self._output.note(f"ended what a killed supervisor of {name} had left: pid {listed}")


def event_data(event: Event) -> dict[str, Any]:
    """An event as one JSON object: its name, the time, and its own fields."""
    if isinstance(event, CheckResult):
        fields = check_data(event)
    elif isinstance(event, SmokeReport):
        fields = {"url": event.url, "model": event.model, "ok": event.ok}
    elif isinstance(event, Diagnosed):
        fields = diagnosis_data(event.diagnosis)
    else:
        fields = json.loads(json.dumps(asdict(event), default=str))
    return {"event": EVENT_NAMES[type(event)], "time": round(time.time(), 3), **fields}


def result_data(result: UpResult) -> dict[str, Any]:
    """The `data` of the last line of `up --json`."""
    return {
        "name": result.name,
        "url": result.url,
        "served_model_name": result.served_model_name,
        "ready_s": round(result.ready_s, 3),
        "phases": [{"phase": p.phase, "at_s": round(p.at_s, 3)} for p in result.phases],
        "log": str(result.log),
        "smoke_test": None if result.smoke is None else smoke_data(result.smoke),
    }


def _ready_text(event: EngineReady, key_source: str | None) -> str:
    lines = [
        f"ready after {event.ready_s:.1f} s: {event.served_model_name} at {event.url}/v1",
        "",
        curl_line(event, key_source=key_source),
        "",
    ]
    return "\n".join(lines)


def curl_line(event: EngineReady, *, key_source: str | None) -> str:
    """A command that asks the endpoint something; the key stays where it is."""
    question = "What is the capital of France?"
    if event.has_chat:
        path = "chat/completions"
        body: dict[str, Any] = {"messages": [{"role": "user", "content": question}]}
    else:
        path = "completions"
        body = {"prompt": "The capital of France is", "max_tokens": 16}
    body = {"model": event.served_model_name, **body}
    parts = ["curl", f"{event.url}/v1/{path}", "-H", "'Content-Type: application/json'"]
    if key_source is not None:
        read = key_source if key_source.startswith("$") else f"$(cat {shlex.quote(key_source)})"
        parts += ["-H", f'"Authorization: Bearer {read}"']
    return " ".join([*parts, "-d", shlex.quote(json.dumps(body))])


def silence_text(silent_s: float, phase: str) -> str:
    """That an engine says nothing, for a person who wonders whether it still works."""
    return f"nothing from the engine for {silent_s:.0f} s; the last phase was {phase}"


_STEPS = {
    "drain": "SIGTERM and the requests in flight",
    "terminate": "SIGTERM",
    "kill": "SIGKILL",
    "clean": "clean up",
}


def stopped_text(event: EngineStopped) -> str:
    """How a stop went, and how long each rung of it took."""
    if event.left:
        pids = ", ".join(map(str, event.left))
        return f"these processes of the engine would not end: {pids}"
    steps = ", ".join(f"{_STEPS[step.step]} {step.duration_s:.1f} s" for step in event.steps)
    how = ", SIGKILL for what did not go by itself" if event.killed else ""
    port = "" if event.port_is_free else "; its port is taken by somebody else"
    rungs = f" ({steps})" if steps else ""
    return (
        f"stopped after {event.duration_s:.1f} s{how}{rungs}; nothing of the engine is left{port}"
    )
