"""Start an engine, show that it answers, watch it, and leave nothing behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from gemma_serve.adapters.openai_api import EndpointError, generate_one_token, is_healthy
from gemma_serve.adapters.state import (
    Deployment,
    claim_port,
    deployment_name,
    prepare_log,
    remove_deployment,
    save_deployment,
)
from gemma_serve.engine.inbox import Inbox
from gemma_serve.engine.last_error import last_error
from gemma_serve.engine.log import LogReader, phase_of
from gemma_serve.engine.process import EngineProcess, Exit, explain_end, stop_engine
from gemma_serve.errors import EngineFailed, Stopped, UsageError
from gemma_serve.planning.config import client_url
from gemma_serve.planning.launch import engine_environment
from gemma_serve.planning.smoke import SmokeReport
from gemma_serve.usecases.events import (
    EngineReady,
    EngineStarted,
    EngineStopped,
    Event,
    Noticed,
    OnEvent,
    PhaseBegan,
    PhaseProgress,
    Stopping,
)
from gemma_serve.usecases.plan import ServePlan
from gemma_serve.usecases.smoke import run_smoke

T = TypeVar("T")

# How long the leader gets after SIGTERM, beyond the drain: it ends its own in under 2 s.
_GRACE_S = 3.0
_TICK_S = 0.2
_FOLLOW_S = 1.0
# A first token can wait for kernels to be compiled: minutes on a GPU seen for the first time.
_FIRST_TOKEN_TIMEOUT_S = 600.0
# From "Starting vLLM server" to the first answer of /health it takes a second.
_HEALTH_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class UpResult:
    """What came of `up` when it ended on its own: with `once`, after the smoke test."""

    url: str
    served_model_name: str
    ready_s: float
    phases: tuple[PhaseBegan, ...]
    log: Path
    smoke: SmokeReport | None

    @property
    def ok(self) -> bool:
        """Whether every promise that was tested was kept."""
        return self.smoke is None or self.smoke.ok


@dataclass(frozen=True)
class UpOptions:
    """What `up` does beyond starting: test the endpoint, and stop after that."""

    smoke_test: bool = False
    once: bool = False


def up(
    plan: ServePlan,
    *,
    options: UpOptions,
    environ: Mapping[str, str],
    api_key: str | None,
    on_event: OnEvent,
) -> UpResult:
    """Run the engine of `plan` in the foreground until a signal, its death, or `once`.

    By the time this returns or raises, no process of the engine is left.

    Args:
        environ: the caller's environment, which the engine inherits.
        api_key: handed to the engine by environment, never on its command line.

    Raises:
        EngineFailed: the engine did not start, or died.
        Stopped: SIGINT, SIGTERM or SIGHUP came.
        GemmaServeError: another `up` has the port.
    """
    with claim_port(plan.config.port, environ), Inbox() as inbox:
        run = _Run(plan, inbox, api_key=api_key, on_event=on_event)
        try:
            run.start(environ)
            run.wait_until_ready()
            report = run.smoke_test() if options.smoke_test else None
            if not options.once:
                run.wait_for_the_end()
            return run.result(report)
        finally:
            run.stop()


class _Run:
    """One engine from its start to its end, as the main loop sees it."""

    def __init__(
        self, plan: ServePlan, inbox: Inbox, *, api_key: str | None, on_event: OnEvent
    ) -> None:
        self.plan = plan
        self.inbox = inbox
        self.api_key = api_key
        self.on_event = on_event
        self.url = client_url(plan.config.host, plan.config.port)
        self.phases: list[PhaseBegan] = []
        self.ready_s: float | None = None
        self.engine: EngineProcess | None = None
        self.deployment: Deployment | None = None
        self._reason = "done"
        self._telling = threading.Lock()
        self._ending = False

    def start(self, environ: Mapping[str, str]) -> None:
        name = deployment_name(self.plan.model.served_name, self.plan.config.port)
        log = prepare_log(name, environ)
        secrets = {} if self.api_key is None else {"VLLM_API_KEY": self.api_key}
        self.begun = time.monotonic()
        self.engine = EngineProcess.start(
            self.plan.launch.argv,
            environment=engine_environment(environ, self.plan.launch.environment, secrets),
            log=log,
            on_exit=self.inbox.wake,
        )
        self._log = LogReader(log)
        self.deployment = Deployment(
            name=name,
            url=self.url,
            served_model_name=self.plan.model.served_name,
            model=self.plan.config.model,
            pid=self.engine.pid,
            started_at=self.engine.started_at,
            log=log,
            api_key_file=self.plan.config.api_key_file,
        )
        self._save(self.deployment)
        self.on_event(EngineStarted(self.engine.pid, log))
        self._began("imports")

    def wait_until_ready(self) -> None:
        cancelled = threading.Event()
        try:
            self._watch_during(lambda: self._answer(cancelled))
        except EndpointError as error:
            raise EngineFailed(
                f"the engine started but generates nothing: {error}",
                code="engine.no_token",
                hint=f"its log: {self._log.path}",
            ) from None
        finally:
            cancelled.set()
        self.ready_s = time.monotonic() - self.begun
        assert self.deployment is not None
        self.deployment = replace(self.deployment, ready=True)
        self._save(self.deployment)
        self.on_event(
            EngineReady(
                self.url,
                self.plan.model.served_name,
                self.ready_s,
                needs_key=self.api_key is not None,
                has_chat=self.plan.model.has_chat,
            )
        )

    def _save(self, deployment: Deployment) -> None:
        """A full disk must not end an engine that works; only `smoke-test` won't find it."""
        try:
            save_deployment(deployment)
        except UsageError as error:
            self.on_event(Noticed(replace(error.problems[0], blocking=False)))

    def _answer(self, cancelled: threading.Event) -> None:
        """Return once our own server has generated a token. Runs beside the main loop."""
        assert self.engine is not None
        listening_since: float | None = None
        # Somebody else's server may answer on this port before ours finds it taken.
        while not (is_healthy(self.url) and self.engine.listens_on(self.plan.config.port)):
            if listening_since is None and self.phases[-1].phase == "API server":
                listening_since = time.monotonic()
            if listening_since and time.monotonic() - listening_since > _HEALTH_TIMEOUT_S:
                raise EngineFailed(
                    f"vLLM says that it listens, but {self.url} gives no answer",
                    code="engine.no_answer",
                    hint=f"its log: {self._log.path}",
                )
            if cancelled.wait(0.2):
                return
        generate_one_token(
            self.url, self.plan.model.served_name, self.api_key, _FIRST_TOKEN_TIMEOUT_S
        )

    def smoke_test(self) -> SmokeReport:
        report = self._watch_during(
            lambda: run_smoke(
                url=self.url,
                model=self.plan.model.served_name,
                api_key=self.api_key,
                answers=self.plan.known_answers,
                on_event=self._relay,
            )
        )
        if not report.ok:
            # A dying engine refuses connections a moment before it is gone; then that's the news.
            self.inbox.wait_until(self._has_ended, timeout_s=_TICK_S * 5, tick_s=_TICK_S)
            self._look()
        self.on_event(report)
        return report

    def _has_ended(self) -> bool:
        return self.engine is None or self.engine.exit is not None

    def wait_for_the_end(self) -> None:
        """Wait for a signal or for the engine's death; both are raised."""
        while True:
            self._look()
            self.inbox.wait(_TICK_S * 5)

    def result(self, report: SmokeReport | None) -> UpResult:
        assert self.ready_s is not None
        return UpResult(
            self.url,
            self.plan.model.served_name,
            self.ready_s,
            tuple(self.phases),
            self._log.path,
            report,
        )

    def _relay(self, event: Event) -> None:
        """Pass on an event of the other thread, unless the end has begun."""
        with self._telling:
            if not self._ending:
                self.on_event(event)

    def stop(self) -> None:
        # Not for ever: whoever tells may hang on a terminal that was halted with Ctrl-S.
        held = self._telling.acquire(timeout=1.0)
        self._ending = True
        if held:
            self._telling.release()
        if self.engine is None:
            return
        drain_s = float(self.plan.config.drain_timeout) if self.ready_s is not None else 0.0
        if self.engine.exit is None:
            self._tell_if_possible(Stopping(self._reason, drain_s + _GRACE_S))
        # The first signal is why we stop; any further one means: now.
        asked_before = min(1, len(self.inbox.signals))
        report = stop_engine(
            self.engine,
            grace_s=drain_s + _GRACE_S,
            wait=self.inbox.wait,
            hurry=lambda: len(self.inbox.signals) > asked_before,
        )
        self._tell_if_possible(EngineStopped(report.duration_s, report.killed, report.left))
        if report.left:
            pids = ", ".join(map(str, report.left))
            raise EngineFailed(
                f"these processes of the engine would not end: {pids}",
                code="engine.left_behind",
                hint="they ignore SIGKILL, so the driver or a disk holds them; see `dmesg`",
            )
        if self.deployment is not None:
            with suppress(OSError):
                remove_deployment(self.deployment)

    def _tell_if_possible(self, event: Event) -> None:
        """Whatever is wrong with telling (the reader may be gone), the engine is stopped."""
        with suppress(Exception):
            self.on_event(event)

    def _watch_during(self, work: Callable[[], T]) -> T:
        """Do `work` in a thread, and meanwhile read the log and heed signals and death."""
        return self.inbox.during(work, self._look, _TICK_S)

    def _look(self) -> None:
        """Take in what has happened; raise if it is the end."""
        assert self.engine is not None
        self.engine.note_descendants()
        self._read_log()
        if self.inbox.signals:
            self._reason = "asked to"
            raise Stopped(self.inbox.signals[0])
        lost = self.engine.lost()
        if lost is not None:
            # A core that ended for a reason tells it through the leader, which follows at once.
            self.inbox.wait_until(self._has_ended, timeout_s=_FOLLOW_S, tick_s=_TICK_S)
        if lost is not None or self.engine.exit is not None:
            raise self._death(self.engine.exit, lost)

    def _read_log(self) -> None:
        if self.ready_s is not None:
            return
        for line in self._log.new_lines():
            seen = phase_of(line)
            if seen is None:
                continue
            if seen.phase != self.phases[-1].phase:
                self._began(seen.phase)
            elif seen.detail:
                self.on_event(PhaseProgress(seen.phase, seen.detail))

    def _began(self, phase: str) -> None:
        self.phases.append(PhaseBegan(phase, time.monotonic() - self.begun))
        self.on_event(self.phases[-1])

    def _death(self, how: Exit | None, lost: str | None) -> EngineFailed:
        self._reason = "the engine died"
        when = "after it was ready" if self.ready_s else f"during {self.phases[-1].phase}"
        cause = explain_end(how, lost, last_error(self._log.all_lines()))
        hint = f"its whole log: {self._log.path}"
        if lost is not None or (how is not None and how.signum is not None):
            hint = f"if the machine ran out of memory, `dmesg` says so; {hint}"
        return EngineFailed(f"the engine died {when}: {cause}", code="engine.died", hint=hint)
