"""Which compilers and headers an engine would find."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from gemma_serve.planning.hardware.host_problems import Toolchain


def find_toolchain(environ: Mapping[str, str], include_dir: Path | None) -> Toolchain:
    """As Triton (for C) and torch (for C++) look for them.

    Args:
        environ: what the engine will inherit.
        include_dir: where the headers of its Python should be, if that is known.

    Source: triton/runtime/build.py; torch/_inductor/cpp_builder.py.
    """
    return Toolchain(
        _find(environ, "CC", ("gcc", "clang")),
        _find(environ, "CXX", ("g++",)),
        include_dir,
        include_dir is not None and (include_dir / "Python.h").is_file(),
    )


def _find(environ: Mapping[str, str], variable: str, usual: tuple[str, ...]) -> str | None:
    """The compiler that a variable names, and no other then; else the first of the usual ones."""
    names = (environ[variable],) if variable in environ else usual
    path = environ.get("PATH")
    return next((found for name in names if (found := shutil.which(name, path=path))), None)
