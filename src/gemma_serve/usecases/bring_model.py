"""Between the check and the start: the model's files on this disk, and the plan made of them."""

from __future__ import annotations

from collections.abc import Callable

from gemma_serve.errors import GemmaServeError
from gemma_serve.planning.smoke.questions import DEMO_MODEL
from gemma_serve.usecases.check import CheckReport, find_port_problem
from gemma_serve.usecases.download import DownloadRequest, download
from gemma_serve.usecases.events import Noticed, OnEvent
from gemma_serve.usecases.plan import ServePlan


def bring_model(
    report: CheckReport, make_plan: Callable[[], ServePlan], *, on_event: OnEvent
) -> ServePlan:
    """The plan to start with, once every file of the model is here and right.

    Where files came just now the plan is made again, since until then it rested on what the
    catalogue or the Hub said of them.

    Raises:
        GemmaServeError: a file can't be had or is damaged, or the new plan does not hold.
        Stopped: SIGINT, SIGTERM or SIGHUP came.
    """
    plan = report.plan
    if plan.config.model == DEMO_MODEL:
        return plan
    request = DownloadRequest(
        plan.config.model, plan.config.revision, plan.config.download_dir, refresh=False
    )
    result = download(request, access=report.access, on_event=on_event)
    if plan.model.location == str(result.folder) and not result.fetched_bytes:
        return plan
    plan = make_plan()
    # Downloads take hours, and others take ports.
    port = find_port_problem(plan.config)
    problems = (*plan.problems, *([port] if port else []))
    blocking = [problem for problem in problems if problem.blocking]
    if blocking:
        raise GemmaServeError.of(blocking)
    for problem in problems:
        if problem not in report.problems:
            on_event(Noticed(problem))
    return plan
