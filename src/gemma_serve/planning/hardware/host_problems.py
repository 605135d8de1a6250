"""What an engine needs of the machine beside its GPUs: a compiler, headers, shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemma_serve.errors import Problem
from gemma_serve.planning.launch import Device
from gemma_serve.planning.sizes import file_size

# One of vLLM's rings for messages between its processes: 10 parts of 24 MiB.
# Source: distributed/device_communicators/shm_broadcast.py, MessageQueue.
_RING_BYTES = 240 * 2**20
# What NCCL's manual gives a container (`--shm-size=1g`). The rings fill only as far as they are
# used, and NCCL takes some 10 MB for each channel between GPUs without a direct link.
_ENOUGH_BYTES = 2**30


@dataclass(frozen=True)
class Toolchain:
    """What the engine could compile with; None for a compiler that is not there.

    `include_dir` is where the C headers of its Python should be, None where that can't be told.
    """

    c_compiler: str | None
    cxx_compiler: str | None
    include_dir: Path | None
    has_python_h: bool = False


def triton_problem(tools: Toolchain) -> Problem | None:
    """Why Triton can't build what it launches kernels with, which it does on every start.

    A warning where nothing is known of the engine's Python, since it may run elsewhere.
    """
    if tools.c_compiler is None:
        return Problem(
            "python-headers",
            "neither gcc nor clang is found, nor what CC names, and Triton compiles with one of "
            "them when the engine starts",
            "install one: `sudo apt-get install gcc`, or name it: `export CC=/path/to/gcc`",
            blocking=tools.include_dir is not None,
        )
    return _no_headers(tools, "Triton")


def inductor_problem(tools: Toolchain, *, enforce_eager: bool) -> Problem | None:
    """Why torch can't compile for the CPU.

    An eager engine starts all the same, and dies of the first request that wants log
    probabilities: those are gathered by a function that is compiled then.
    """
    if tools.cxx_compiler is None:
        when = "on a request for log probabilities, of which the engine dies"
        hint = "install it: `sudo apt-get install g++`, or name one: `export CXX=/path/to/g++`"
        if not enforce_eager:
            when = "when the engine starts"
            hint += "; or say `--enforce-eager`"
        return Problem(
            "python-headers",
            f"no C++ compiler is found (g++, or what CXX names), and torch compiles with it {when}",
            hint,
            blocking=not enforce_eager,
        )
    return None if enforce_eager else _no_headers(tools, "torch")


def shared_memory_problem(
    free_bytes: int | None, *, device: Device, ranks: int, engine_refuses: bool
) -> Problem | None:
    """What is wrong with so much free in /dev/shm (None: not known) for so many ranks.

    vLLM 0.27 and later (`engine_refuses`) don't start where one ring has no room, on the CPU with
    a single rank either. Earlier ones fail once more is used than there is.
    """
    if free_bytes is None or (device == "cuda" and ranks < 2):
        return None
    if device == "cpu" and not (engine_refuses and free_bytes < _RING_BYTES):
        return None
    if free_bytes >= _ENOUGH_BYTES:
        return None
    wanted = f"{ranks} GPUs that share a model want {file_size(_ENOUGH_BYTES)} or more there"
    if free_bytes < _RING_BYTES and engine_refuses:
        wanted = f"vLLM wants {file_size(_RING_BYTES)} for each of its message queues"
    return Problem(
        "shm-small",
        f"/dev/shm has {file_size(free_bytes)} free, and {wanted}",
        "start the container with `--ipc=host` or `--shm-size=10g`; in Kubernetes, mount an "
        "`emptyDir` with `medium: Memory` there",
        blocking=engine_refuses and free_bytes < _RING_BYTES,
    )


def _no_headers(tools: Toolchain, who: str) -> Problem | None:
    where = tools.include_dir
    if where is None or tools.has_python_h:
        return None
    return Problem(
        "python-headers",
        f"{where / 'Python.h'} is missing, with which {who} compiles when the engine starts",
        f"install the headers: `sudo apt-get install {where.name}-dev`, or use a Python that "
        "brings them, as uv's do",
    )
