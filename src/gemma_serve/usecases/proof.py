"""What is found when an engine was ended: the processes, the port, the GPUs' memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from gemma_serve.adapters.gpu import read_gpus
from gemma_serve.adapters.host import port_problem
from gemma_serve.engine.reports import Stopped
from gemma_serve.errors import Problem
from gemma_serve.planning.sizes import gib
from gemma_serve.usecases.events import EngineStopped
from gemma_serve.usecases.run import Run

# Giving back tens of GB takes a driver seconds.
PROOF_TIMEOUT_S = 5.0
# What other programs may take of a GPU in the meantime without being taken for a remainder.
_GPU_TOLERANCE_BYTES = 64 * 2**20


def prove_stopped(run: Run, stopped: Stopped, gpu_before: Mapping[str, int]) -> EngineStopped:
    """Look, for some seconds at most, until the port is free and the memory is back.

    `gpu_before` is `gpu_used_bytes` from before the start.
    """
    until = time.monotonic() + PROOF_TIMEOUT_S
    while True:
        port_is_free = port_problem(run.host, run.port) is None
        held = still_held(gpu_before, gpu_used_bytes(run.gpus))
        if (port_is_free and not held) or time.monotonic() > until:
            break
        time.sleep(0.1)
    return EngineStopped(
        duration_s=stopped.duration_s,
        killed=stopped.descent.killed,
        left=stopped.descent.left,
        steps=stopped.descent.steps,
        port_is_free=port_is_free,
        gpu_bytes_held=held,
    )


def gpu_used_bytes(uuids: Sequence[str]) -> dict[str, int]:
    """The memory in use of each of the GPUs `uuids`."""
    if not uuids:
        return {}
    return {gpu.uuid: gpu.used_bytes for gpu in read_gpus().gpus if gpu.uuid in uuids}


def still_held(before: Mapping[str, int], now: Mapping[str, int]) -> int | None:
    """Bytes that the GPUs have not got back, beyond what others may take; None without a GPU."""
    if not before:
        return None
    more = (used - before.get(uuid, used) for uuid, used in now.items())
    return sum(extra for extra in more if extra > _GPU_TOLERANCE_BYTES)


def stop_problems(stopped: EngineStopped) -> tuple[Problem, ...]:
    """What an engine has left behind: processes, or memory of a GPU."""
    found = []
    if stopped.left:
        found.append(left_behind(stopped.left))
    if stopped.gpu_bytes_held:
        found.append(
            Problem(
                "gpu.memory_held",
                f"{gib(stopped.gpu_bytes_held)} more GPU memory is in use than before the start",
                "`gemma-serve check-gpu` shows who holds it",
                blocking=False,
            )
        )
    return tuple(found)


def left_behind(pids: Sequence[int]) -> Problem:
    """That processes of an engine outlived SIGKILL."""
    return Problem(
        "engine.left_behind",
        f"these processes of the engine would not end: {', '.join(map(str, pids))}",
        "they ignore SIGKILL, so the driver or a disk holds them; see `dmesg`",
    )
