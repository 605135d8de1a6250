"""Processes of vLLM on this machine whose server is gone, and what they hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import psutil

from gemma_serve.adapters.gpu import read_gpus
from gemma_serve.adapters.vllm_processes import is_orphan, process_title


@dataclass(frozen=True)
class EngineOrphan:
    """An engine that some init inherited from a dead server: nothing will ever end it.

    `gpu_bytes` is None where no driver tells; `memory_bytes` is main memory.
    """

    pid: int
    title: str
    user: str
    session: int
    memory_bytes: int
    gpu_bytes: int | None


def find_orphans() -> tuple[EngineOrphan, ...]:
    """Every orphan that this account can see, by pid."""
    processes = list(_orphaned_processes())
    if not processes:
        return ()
    held = {p.pid: p.used_bytes for gpu in read_gpus().gpus for p in gpu.processes}
    found = []
    for process in processes:
        with suppress(psutil.Error, OSError):
            found.append(
                EngineOrphan(
                    pid=process.pid,
                    title=process_title(process),
                    user=process.username(),
                    session=os.getsid(process.pid),
                    memory_bytes=process.memory_info().rss,
                    gpu_bytes=held.get(process.pid),
                )
            )
    return tuple(sorted(found, key=lambda orphan: orphan.pid))


def _orphaned_processes() -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and is_orphan(process):
                yield process
