"""Start an engine, show that it answers, watch it, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from gemma_serve.adapters.claims import Claim
from gemma_serve.adapters.state import deployment_folder
from gemma_serve.engine.inbox import Inbox
from gemma_serve.planning.smoke.questions import Answers
from gemma_serve.planning.smoke.report import SmokeReport
from gemma_serve.usecases.deployments import claim, hold
from gemma_serve.usecases.events import OnEvent, PhaseBegan
from gemma_serve.usecases.plan import ServePlan
from gemma_serve.usecases.run import Run, run_of, write_run
from gemma_serve.usecases.smoke.run import run_smoke
from gemma_serve.usecases.smoke.session import SmokeOptions, usual_concurrency
from gemma_serve.usecases.supervise import Supervisor


@dataclass(frozen=True)
class UpResult:
    """What came of `up`: with `once` after the smoke test, with `--detach` when it was ready."""

    name: str
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
    """What `up` does beyond starting: test the endpoint, and stop after that.

    The test sends `concurrency` requests at once, by default as many as fit the engine. `force`
    is only kept, so that a restart overrides the same checks.
    """

    smoke_test: bool = False
    concurrency: int | None = None
    once: bool = False
    force: bool = False


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
        EngineFailed: the engine did not start, or died and is not to be started again.
        Stopped: SIGINT, SIGTERM or SIGHUP came.
        GemmaServeError: a deployment of that name runs, or another has the port.
    """
    run = run_of(plan, detached=False, force=options.force)
    with claim(run.name, run.port, environ) as claimed:
        folder = deployment_folder(run.name, environ)
        folder.begin()
        folder.write_json(folder.run, write_run(run))
        return _look_after(
            run, claimed, options, plan.known_answers, environ, api_key=api_key, on_event=on_event
        )


def supervise(
    run: Run,
    claimed: Claim,
    *,
    environ: Mapping[str, str],
    api_key: str | None,
    on_event: OnEvent,
) -> None:
    """Look after `run` in the background, whose name and port somebody claimed for us.

    Raises:
        EngineFailed: the engine did not start, or died and is not started again any more.
        Stopped: `stop`, or a signal.
    """
    hold(claimed)
    _look_after(run, claimed, UpOptions(), None, environ, api_key=api_key, on_event=on_event)


def _look_after(
    run: Run,
    claimed: Claim,
    options: UpOptions,
    answers: Answers | None,
    environ: Mapping[str, str],
    *,
    api_key: str | None,
    on_event: OnEvent,
) -> UpResult:
    folder = deployment_folder(run.name, environ)
    with ExitStack() as stack:
        stack.callback(claimed.finish)
        supervisor = stack.enter_context(
            Supervisor(
                run,
                folder,
                stack.enter_context(Inbox()),
                environ=environ,
                api_key=api_key,
                keep_open=claimed.fds,
                on_event=on_event,
            )
        )
        supervisor.start()
        supervisor.wait_until_ready()
        report = None
        if options.smoke_test:
            report = _smoke_test(supervisor, options.concurrency, answers, api_key)
        if not options.once:
            supervisor.serve()
        assert supervisor.ready_s is not None
        return UpResult(
            run.name,
            run.url,
            run.served_model_name,
            supervisor.ready_s,
            supervisor.phases,
            folder.log,
            report,
        )


def smoke_test_of(
    run: Run,
    concurrency: int | None,
    answers: Answers | None,
    api_key: str | None,
    on_event: OnEvent,
) -> SmokeReport:
    """Test the endpoint of a `run` that is ready, each check as an event."""
    return run_smoke(
        url=run.url,
        model=run.served_model_name,
        api_key=api_key,
        answers=answers,
        options=SmokeOptions(concurrency=concurrency or usual_concurrency(run.max_num_seqs)),
        on_event=on_event,
    )


def _smoke_test(
    supervisor: Supervisor,
    concurrency: int | None,
    answers: Answers | None,
    api_key: str | None,
) -> SmokeReport:
    run = supervisor.run
    report = supervisor.during(
        lambda: smoke_test_of(run, concurrency, answers, api_key, supervisor.relay)
    )
    if not report.ok:
        supervisor.look_once_more()
    supervisor.relay(report)
    return report
