"""What the supervisor writes down as it goes: the record, the events, the phases of a start."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gemma_serve.adapters.state import Deployment, DeploymentFolder, State
from gemma_serve.engine.guarded import Family
from gemma_serve.engine.processes import boot_id, identify
from gemma_serve.errors import Problem, UsageError
from gemma_serve.usecases.events import Event, Noticed, OnEvent, event_line
from gemma_serve.usecases.run import Run


def first_record(run: Run, folder: DeploymentFolder, *, needs_key: bool) -> Deployment:
    """What is written down of a run that this process begins to look after."""
    now = time.time()
    return Deployment(
        name=run.name,
        folder=folder.path,
        state="starting",
        changed_at=now,
        url=run.url,
        served_model_name=run.served_model_name,
        model=run.model,
        boot_id=boot_id(),
        started_at=now,
        supervisor=identify(os.getpid()),
        detached=run.detached,
        engine=run.engine,
        gpus=run.gpus,
        restart=run.restart,
        needs_key=needs_key,
        api_key_file=run.api_key_file,
    )


class Journal:
    """The files of one run. A full disk is told once and never ends an engine that works."""

    def __init__(self, folder: DeploymentFolder, deployment: Deployment, on_event: OnEvent) -> None:
        self.folder = folder
        self.deployment = deployment
        self._on_event = on_event
        self._told = False

    def tell(self, event: Event) -> None:
        """Keep an event and pass it on."""
        error = self.folder.add_event(event_line(event, time=time.time()))
        if error is not None:
            self._trouble(f"cannot write {self.folder.events}: {error.strerror}")
        self._on_event(event)

    def set(self, state: State | None = None, **fields: Any) -> None:
        """Change the record; a new state is dated."""
        if state is not None:
            fields |= {"state": state, "changed_at": time.time()}
        changed = replace(self.deployment, **fields)
        if changed != self.deployment:
            self.deployment = changed
            self._save()

    def set_family(self, family: Family) -> None:
        """Write down the processes and segments, so that anyone may end them later."""
        self.set(
            guard=family.guard,
            leader=family.leader,
            members=family.members,
            shared_files=family.shared_files,
            temporary_folder=family.temporary_folder,
        )

    def mend(self) -> None:
        """Write the record again if somebody has damaged or removed it."""
        found = self.folder.load()
        if found is None or found.state == "unreadable":
            self._save()

    def keep_timeline(self, phases: Mapping[str, float], ready_s: float) -> None:
        """The durations of a start that came to its end, for the next one to compare with."""
        value = {"phases": {name: round(s, 3) for name, s in phases.items()}, "ready_s": ready_s}
        try:
            self.folder.write_json(self.folder.timeline, value)
        except UsageError as error:
            self._trouble(str(error))

    def _save(self) -> None:
        try:
            self.folder.save(self.deployment)
        except UsageError as error:
            self._trouble(str(error))

    def _trouble(self, message: str) -> None:
        if self._told:
            return
        self._told = True
        hint = "the engine goes on; free some space, or `status` and `logs` will show old things"
        self._on_event(Noticed(Problem("state.unwritable", message, hint, blocking=False)))
