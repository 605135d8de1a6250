"""What an engine that is installed here would lack on this machine, beside memory."""

from __future__ import annotations

from collections.abc import Mapping

from gemma_serve.adapters import host
from gemma_serve.adapters.engine_source import read_serve_flags
from gemma_serve.adapters.package_data import load_engine_rules
from gemma_serve.adapters.toolchain import find_toolchain
from gemma_serve.errors import Problem
from gemma_serve.planning.config import ServeConfig
from gemma_serve.planning.engine_arguments import unknown_flag_problem
from gemma_serve.planning.hardware.host_problems import (
    inductor_problem,
    shared_memory_problem,
    triton_problem,
)
from gemma_serve.planning.launch import Engine, Launch
from gemma_serve.planning.memory.engine_rules import is_older, rules_for

# Since then vLLM refuses to start where one of its rings can't be held.
_REFUSES_SHM_SINCE = "0.27"


def start_problems(
    config: ServeConfig, engine: Engine, launch: Launch, environ: Mapping[str, str]
) -> tuple[Problem, ...]:
    """Flags, compilers, headers and shared memory, as the engine would meet them.

    Args:
        config: decided, also how many GPUs are used.
        launch: what would be run.
        environ: what the engine will inherit.
    """
    tools = find_toolchain(environ, engine.include_dir)
    if engine.device == "cpu":
        compiler = inductor_problem(tools, enforce_eager=config.enforce_eager)
    else:
        compiler = triton_problem(tools)
    shared = shared_memory_problem(
        host.free_shared_memory_bytes(),
        device=engine.device,
        ranks=config.tensor_parallel_size or 1,
        engine_refuses=not is_older(engine.version or "", _REFUSES_SHM_SINCE),
    )
    found = (_flag_problem(config, engine, launch), compiler, shared)
    return tuple(problem for problem in found if problem is not None)


def _flag_problem(config: ServeConfig, engine: Engine, launch: Launch) -> Problem | None:
    """A flag that this vLLM does not have; ours are known for the versions that we know."""
    _, known_version = rules_for(engine.version or "", load_engine_rules())
    if engine.package_dir is None or (known_version and not config.engine_args):
        return None
    known = read_serve_flags(engine.package_dir)
    if known is None:
        return None
    # After the interpreter, `-m` and the module.
    return unknown_flag_problem(launch.argv[3:], known, engine.version)
