"""One engine from its start to its end: ready by a token, watched, restarted, stopped."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from gemma_serve.adapters.host import out_of_memory_kills
from gemma_serve.adapters.openai_api import EndpointError
from gemma_serve.adapters.state import DeploymentFolder
from gemma_serve.engine.diagnosis.diagnosis import Diagnosis, Ending
from gemma_serve.engine.guarded import GuardedEngine, start_engine
from gemma_serve.engine.inbox import Inbox
from gemma_serve.engine.ladder import GRACE_S
from gemma_serve.engine.log import LogReader
from gemma_serve.engine.restarts import RestartPolicy, Restarts
from gemma_serve.engine.shared_files import make_temporary_folder
from gemma_serve.engine.timeline import Overdue
from gemma_serve.engine.watch import Health
from gemma_serve.errors import EXIT_ENGINE, EngineFailed, Problem, Stopped, UsageError
from gemma_serve.planning.launch import engine_environment
from gemma_serve.usecases.compile_caches import mark_compiled, note_phase, set_stale_aside
from gemma_serve.usecases.diagnose import diagnose_run, keep_diagnosis
from gemma_serve.usecases.events import (
    Diagnosed,
    EngineDied,
    EngineReady,
    EngineStarted,
    Event,
    Failed,
    HealthChanged,
    Noticed,
    OnEvent,
    PhaseBegan,
    Restarting,
    Stopping,
)
from gemma_serve.usecases.journal import Journal, first_record
from gemma_serve.usecases.proof import gpu_used_bytes, left_behind, prove_stopped
from gemma_serve.usecases.readiness import HealthWatch, answer_first
from gemma_serve.usecases.run import Run
from gemma_serve.usecases.start_progress import StartProgress

T = TypeVar("T")

_TICK_S = 0.2
# How long the leader may take to tell why its core ended, before we stop waiting for that.
_FOLLOW_S = 1.0
# As often in a row a probe must fail before an engine that may be restarted is.
_MISSES_UNTIL_RESTART = 3


class Supervisor:
    """Looks after one deployment. Used by one thread; helpers only leave news for it."""

    def __init__(
        self,
        run: Run,
        folder: DeploymentFolder,
        inbox: Inbox,
        *,
        environ: Mapping[str, str],
        api_key: str | None,
        keep_open: Sequence[int],
        on_event: OnEvent,
    ) -> None:
        self.run = run
        self.inbox = inbox
        self.ready_s: float | None = None
        self._folder = folder
        self._environ = environ
        self._api_key = api_key
        self._keep_open = tuple(keep_open)
        self._restarts = Restarts(RestartPolicy())
        self._engine: GuardedEngine | None = None
        self._watch: HealthWatch | None = None
        self._health: deque[Health] = deque()
        self._listening = threading.Event()
        self._reason = "done"
        self._telling = threading.Lock()
        self._ending = False
        self._log_told = False
        record = first_record(run, folder, needs_key=api_key is not None)
        self._journal = Journal(folder, record, on_event)

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """However it ended, nothing of the engine is left then."""
        self._stop(error)

    # --- the start

    def start(self) -> None:
        """Start the engine.

        Raises:
            EngineFailed: its command can't be run.
        """
        self._gpu_before = gpu_used_bytes(self.run.gpus)
        self._oom_kills_before = out_of_memory_kills()
        stale = set_stale_aside(self.run, self._folder, self._environ)
        if stale is not None:
            self._tell(Noticed(stale))
        temporary = self._temporary_folder()
        secrets = {} if self._api_key is None else {"VLLM_API_KEY": self._api_key}
        self._begun = time.monotonic()
        self._progress = StartProgress(self._begun)
        self.ready_s = None
        self._listening.clear()
        self._journal.set(
            "starting", started_at=time.time(), temporary_folder=temporary,
            phase=self._progress.phase, phase_began_at=time.time(), problem=None,
        )  # fmt: skip
        self._engine = start_engine(
            self.run.argv,
            environment=engine_environment(self._environ, self.run.environment, secrets),
            log=self._folder.log,
            events=self._folder.events,
            guard_log=self._folder.supervisor_log,
            temporary_folder=temporary,
            keep_open=self._keep_open,
            on_news=self.inbox.wake,
        )
        # Not before: the guard has moved an earlier engine's log out of the way by now.
        self._log = LogReader(self._folder.log)
        self._journal.set_family(self._engine.family)
        assert self._engine.leader is not None
        self._tell(EngineStarted(self._engine.leader.pid, self._folder.log))
        self._tell(self._progress.begun())

    def _temporary_folder(self) -> Path:
        try:
            return make_temporary_folder()
        except OSError as error:
            raise UsageError(
                f"cannot make a temporary folder for the engine: {error.strerror}",
                code="state.no_temporary_folder",
                hint="name a folder that can be written: TMPDIR=/path/to/folder",
            ) from None

    def wait_until_ready(self) -> None:
        """Wait for the first token.

        Raises:
            EngineFailed: the engine died, took too long for a phase, or generates nothing.
            Stopped: a signal came.
        """
        cancelled = threading.Event()
        try:
            self.during(lambda: self._answer(cancelled))
        except EndpointError as error:
            self.look_once_more()
            self._diagnose(Ending(generates_nothing=True))
            raise EngineFailed(
                f"the engine started but generates nothing: {error}",
                code="engine.no_token",
                hint=f"its log: {self._folder.log}",
            ) from None
        finally:
            cancelled.set()
        now = time.monotonic()
        durations = self._progress.end(now)
        self.ready_s = now - self._begun
        self._ready_at = now
        self._journal.set("ready", ready_s=self.ready_s, problem=None)
        self._journal.keep_timeline(durations, self.ready_s)
        self._tell(
            EngineReady(
                self.run.url,
                self.run.served_model_name,
                self.ready_s,
                needs_key=self._api_key is not None,
                has_chat=self.run.has_chat,
            )
        )

    def _answer(self, cancelled: threading.Event) -> None:
        engine = self._engine
        assert engine is not None
        answer_first(
            self.run.url,
            self.run.served_model_name,
            self._api_key,
            listens=lambda: engine.listens_on(self.run.port),
            on_listening=self._listening.set,
            cancelled=cancelled,
        )

    @property
    def phases(self) -> tuple[PhaseBegan, ...]:
        """When each phase of the last start began."""
        return self._progress.phases

    # --- the watch

    def serve(self) -> None:
        """Watch the engine, and start it again where that is wanted, until something ends it.

        Raises:
            EngineFailed: it died and is not started again.
            Stopped: a signal came.
        """
        while True:
            try:
                self._serve_one()
            except EngineFailed as error:
                self._restart_after(error)

    def _serve_one(self) -> None:
        run = self.run
        self._watch = HealthWatch(
            run.url, run.served_model_name, self._api_key,
            interval_s=run.probe_interval, deadline_s=run.probe_deadline, on_health=self._noted,
        )  # fmt: skip
        try:
            while True:
                self._look()
                self._journal.mend()
                while self._health:
                    self._heed(self._health.popleft())
                self.inbox.wait(_TICK_S * 5)
        finally:
            self._watch.end()
            self._health.clear()

    def _noted(self, health: Health) -> None:
        self._health.append(health)
        self.inbox.wake()

    def _heed(self, health: Health) -> None:
        was_ok = self._journal.deployment.state == "ready"
        if health.ok != was_ok:
            reason = "it generates again" if health.ok else health.reason or "no token"
            problem = None if health.ok else _unhealthy(reason)
            self._journal.set("ready" if health.ok else "unhealthy", problem=problem)
            self._tell(HealthChanged(health.ok, reason))
        if self.run.restart == "on-failure" and health.missed >= _MISSES_UNTIL_RESTART:
            raise EngineFailed(
                f"the engine stopped generating: {health.reason}",
                code="alive-but-dead",
                hint=f"its whole log: {self._folder.log}",
            )

    def _restart_after(self, error: EngineFailed) -> None:
        """Start the engine again after a pause, or raise `error` where that isn't to be done."""
        self._tell(EngineDied(str(error)))
        if self.run.restart != "on-failure":
            raise error
        pause_s = self._restarts.after_death(time.monotonic(), self._ready_at)
        if pause_s is None:
            raise EngineFailed(
                f"{error}; it was started again {self._restarts.count} times before",
                code=error.problems[0].code,
                hint=error.problems[0].hint,
            ) from None
        self._stop_engine(gently=False, drain_s=0.0)
        restarts = self._journal.deployment.restarts + 1
        self._journal.set(
            "restarting", restarts=restarts, last_death=str(error), problem=error.problems[0]
        )
        self._tell(Restarting(pause_s, self._restarts.count))
        self.inbox.wait_until(lambda: bool(self.inbox.signals), timeout_s=pause_s, tick_s=_TICK_S)
        self._raise_if_asked()
        self.start()
        self.wait_until_ready()

    # --- what happens meanwhile

    def during(self, work: Callable[[], T]) -> T:
        """Do `work` in a thread, and meanwhile heed the log, signals, and death."""
        return self.inbox.during(work, self._look, _TICK_S)

    def look_once_more(self) -> None:
        """Give a dying engine, which refuses connections first, a moment to be seen dead."""
        self.inbox.wait_until(self._has_ended, timeout_s=_FOLLOW_S, tick_s=_TICK_S)
        self._look()

    def _has_ended(self) -> bool:
        engine = self._engine
        if engine is None:
            return True
        engine.take_in()
        return engine.exit is not None or engine.guard_is_gone

    def _look(self) -> None:
        """Take in what has happened; raise if it is the end."""
        engine = self._engine
        assert engine is not None
        engine.collect_zombies()
        if engine.take_in():
            self._journal.set_family(engine.family)
        self._tell_log_trouble(engine)
        self._read_log()
        self._raise_if_asked()
        if engine.lost is not None:
            # A core that ended for a reason tells it through the leader, which follows at once.
            self.inbox.wait_until(self._has_ended, timeout_s=_FOLLOW_S, tick_s=_TICK_S)
        if engine.lost is not None or engine.exit is not None or engine.guard_is_gone:
            self._read_log()
            raise self._death(engine)

    def _raise_if_asked(self) -> None:
        if self.inbox.signals:
            self._reason = "asked to"
            raise Stopped(self.inbox.signals[0])

    def _tell_log_trouble(self, engine: GuardedEngine) -> None:
        if engine.log_trouble is not None and not self._log_told:
            self._log_told = True
            message = f"the engine's log cannot be written: {engine.log_trouble}"
            hint = "the engine goes on, and what it says meanwhile is lost; free some space"
            self._tell(Noticed(Problem("state.log_unwritable", message, hint, blocking=False)))

    def _read_log(self) -> None:
        if self.ready_s is not None:
            return
        now = time.monotonic()
        events = self._progress.read(self._log.new_lines(), now)
        if self._listening.is_set():
            events += self._progress.listening(now)
        for event in [*events, *self._progress.silence(now)]:
            if isinstance(event, PhaseBegan):
                self._journal.set(phase=event.phase, phase_began_at=time.time())
                note_phase(event.phase, self.run, self._folder)
            self._tell(event)
        overdue = self._progress.overdue(now, self.run.phase_limits_s)
        if overdue is not None:
            raise self._overdue(overdue)

    def _overdue(self, overdue: Overdue) -> EngineFailed:
        flag = f"--phase-timeout {overdue.phase.replace(' ', '-')}={2 * overdue.limit_s:.0f}"
        found = self._diagnose(Ending(silent_s=overdue.waited_s))
        because = f": {found.cause}" if found.verdict == "known" else ""
        return EngineFailed(
            f"the start has been in {overdue.phase} for {overdue.waited_s:.0f} s without "
            f"progress, and {overdue.limit_s:.0f} s are allowed{because}",
            code="engine.phase_timeout",
            hint=f"allow more with `{flag}`; the engine's log: {self._folder.log}",
        )

    def _death(self, engine: GuardedEngine) -> EngineFailed:
        self._reason = "the engine died"
        when = "after it was ready" if self.ready_s else f"during {self._progress.phase}"
        whole = f"its whole log: {self._folder.log}"
        lost = None if engine.lost is None else str(engine.lost)
        if engine.guard_is_gone and engine.exit is None and lost is None:
            cause = f"its guard (pid {engine.guard.pid}) was killed"
            return EngineFailed(f"the engine died {when}: {cause}", code="engine.died", hint=whole)
        how = engine.exit
        found = self._diagnose(
            Ending(
                signum=None if how is None else how.signum,
                code=None if how is None else how.code,
                lost=lost,
                out_of_memory=self._was_out_of_memory(),
            )
        )
        told = f"somebody told it to stop, and it ended with {how}"
        return EngineFailed(
            f"the engine died {when}: {found.cause if found.found_failure else told}",
            code=found.id or "engine.died",
            hint="; ".join(part for part in (found.fix, whole) if part),
        )

    def _was_out_of_memory(self) -> bool:
        """Whether the kernel has killed something for memory since the engine was started."""
        before, after = self._oom_kills_before, out_of_memory_kills()
        return before is not None and after is not None and after > before

    def _diagnose(self, ending: Ending) -> Diagnosis:
        """Find out why from the log, tell it, and keep it."""
        found = diagnose_run(self._folder, self._journal.deployment, ending)
        with suppress(UsageError):  # a full disk; it is told all the same
            keep_diagnosis(self._folder, found, ending)
        if found.remedy == "purge-compile-cache":
            mark_compiled(self.run, self._folder)
        self._tell_if_possible(Diagnosed(found))
        return found

    # --- the end

    def _stop(self, error: BaseException | None) -> None:
        """End whatever runs, prove it, and write down how the run ended.

        Raises:
            EngineFailed: some process would not end.
        """
        # Not for ever: whoever tells may hang on a terminal that was halted with Ctrl-S.
        held = self._telling.acquire(timeout=1.0)
        self._ending = True
        if held:
            self._telling.release()
        left = self._stop_engine(
            gently=not isinstance(error, EngineFailed), drain_s=self._drain_s()
        )
        with suppress(OSError):
            self._folder.stop_request.unlink()
        if left:
            problem = left_behind(left)
            self._end_as_failed(problem, EXIT_ENGINE)
            raise EngineFailed(problem.message, code=problem.code, hint=problem.hint)
        if isinstance(error, EngineFailed | UsageError):
            self._end_as_failed(error.problems[0], error.exit_code)
        else:
            self._journal.set("stopped", problem=None)

    def _end_as_failed(self, problem: Problem, exit_code: int) -> None:
        self._journal.set("failed", problem=problem)
        self._tell_if_possible(Failed(problem, exit_code))

    def _drain_s(self) -> float:
        """How long requests in flight may go on: what `stop` asked for, else the setting."""
        if self.ready_s is None:
            return 0.0
        request = self._folder.read_json(self._folder.stop_request) or {}
        try:
            wanted = float(request["drain_timeout"])
        except (KeyError, TypeError, ValueError):
            wanted = self.run.drain_timeout
        return min(wanted, self.run.longest_drain_s)

    def _stop_engine(self, *, gently: bool, drain_s: float) -> tuple[int, ...]:
        """End the engine, if there is one; the pids that would not go."""
        engine, self._engine = self._engine, None
        if engine is None:
            if temporary := self._journal.deployment.temporary_folder:
                with suppress(OSError):
                    temporary.rmdir()  # the engine was never started in it
            return ()
        if not gently:
            drain_s = 0.0
        if engine.exit is None:
            self._journal.set("stopping")
            self._tell_if_possible(Stopping(self._reason, drain_s + GRACE_S if gently else 0.0))
        # The first signal is why we stop; any further one means: now.
        asked_before = min(1, len(self.inbox.signals))
        ended = engine.stop(
            drain_s=drain_s,
            wait=self.inbox.wait,
            hurry=lambda: len(self.inbox.signals) > asked_before,
            gently=gently,
        )
        self._log.close()
        self._tell_if_possible(prove_stopped(self.run, ended, self._gpu_before))
        if not ended.descent.left:
            self._journal.set(guard=None, leader=None, members=(), shared_files=())
        return ended.descent.left

    def _tell(self, event: Event) -> None:
        self._journal.tell(event)

    def relay(self, event: Event) -> None:
        """Pass on an event of another thread, unless the end has begun."""
        with self._telling:
            if not self._ending:
                self._journal.tell(event)

    def _tell_if_possible(self, event: Event) -> None:
        """Tell it, unless whoever reads is gone: the engine is stopped all the same."""
        with suppress(OSError, ValueError):  # ValueError: the stream is closed
            self._journal.tell(event)


def _unhealthy(reason: str) -> Problem:
    return Problem(
        "alive-but-dead",
        f"the engine has stopped generating: {reason}",
        "`gemma-serve logs` shows what it says; `gemma-serve restart` starts it again",
    )
