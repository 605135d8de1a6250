"""Engines that nobody looks after, as text and as JSON."""

from __future__ import annotations

from typing import Any

from gemma_serve.adapters.engine_orphans import EngineOrphan
from gemma_serve.errors import Problem
from gemma_serve.planning.sizes import gib


def orphan_data(orphan: EngineOrphan) -> dict[str, Any]:
    """One engine that nobody looks after."""
    return {
        "pid": orphan.pid,
        "title": orphan.title,
        "user": orphan.user,
        "memory_bytes": orphan.memory_bytes,
        "gpu_bytes": orphan.gpu_bytes,
    }


def orphan_problem(orphan: EngineOrphan) -> Problem:
    """An engine without a server, what it holds, and the way to end it."""
    on_gpu = "" if orphan.gpu_bytes is None else f"{gib(orphan.gpu_bytes)} of GPU memory and "
    return Problem(
        "orphan-engine",
        f"{orphan.title} (pid {orphan.pid}) of {orphan.user} has no server any more and holds "
        f"{on_gpu}{gib(orphan.memory_bytes)} of main memory",
        f"`gemma-serve stop --orphans` ends it if it is ours, else `kill -9 {orphan.pid}` does",
        blocking=False,
    )
