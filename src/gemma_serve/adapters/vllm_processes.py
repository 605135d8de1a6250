"""How vLLM's processes are told from others, and those whose server is gone."""

from __future__ import annotations

import os

import psutil


def process_title(process: psutil.Process) -> str:
    """The title that vLLM gave it, such as `VLLM::EngineCore`; else its name."""
    title = " ".join(process.cmdline()).strip()
    return title if title.startswith("VLLM::") else process.name()


def is_orphan(process: psutil.Process) -> bool:
    """Whether it is a vLLM engine that some init has inherited from a dead server.

    A server starts its engine in its own session; init lives in another, or is no Python. The
    engine's own processes are below it: only the topmost is called an orphan.
    """
    if not process_title(process).startswith("VLLM::"):
        return False
    parent = process.parent()
    if parent is None:
        return True
    try:
        if os.getsid(parent.pid) != os.getsid(process.pid):
            return True
    except OSError:
        return False
    words = " ".join([parent.name(), *parent.cmdline()]).lower()
    return not ("python" in words or "vllm" in words)
