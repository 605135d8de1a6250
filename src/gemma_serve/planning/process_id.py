"""Which process is meant, for good: a pid alone is used again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessId:
    """One process of one boot of the machine.

    `start_ticks` is when the kernel started it, in clock ticks since boot (field 22 of
    /proc/PID/stat). Unlike seconds since 1970 it stays the same when somebody sets the clock.
    """

    pid: int
    start_ticks: int


@dataclass(frozen=True)
class Member:
    """A process of an engine, and the title that vLLM gave it ("VLLM::EngineCore"), or ""."""

    process: ProcessId
    title: str = ""

    def __str__(self) -> str:
        return f"{self.title or 'process'} (pid {self.process.pid})"


@dataclass(frozen=True)
class SharedFile:
    """A file in shared memory; with its inode it is the same file, and not one of that name."""

    path: str
    inode: int
