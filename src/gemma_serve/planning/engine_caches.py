"""Where an engine keeps what it compiles: a folder for each engine, torch and kind of GPU. Pure.

What was compiled by one engine is never met by another: the folder's name says for what it was
made, so a cache that no longer fits is not found rather than mistrusted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_serve.planning.hardware.gpus import Gpu

if TYPE_CHECKING:
    from gemma_serve.planning.launch import Engine

_COMPILED_GRAPHS = "torch_compile_cache"


def cache_key(engine: Engine, gpus: tuple[Gpu, ...], *, machine: str) -> str:
    """The folder's name: `vllm-0.26.0_torch-2.11.0_NVIDIA-H200`.

    Args:
        gpus: those that the engine runs on; empty on a CPU engine.
        machine: the processor's architecture, `x86_64`.
    """
    if engine.device == "cpu":
        hardware = f"cpu-{machine}"
    else:
        hardware = "_".join(sorted({_safe(gpu.name) for gpu in gpus})) or "cuda-unknown"
    parts = (f"vllm-{_safe(engine.version)}", f"torch-{_safe(engine.torch_version)}", hardware)
    return "_".join(parts)


def _safe(text: str | None) -> str:
    """`text` with nothing in it that a shell, a build tool or a file system would trip over."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text or "").strip("-.") or "unknown"


def cache_environment(folder: Path) -> dict[str, str]:
    """The variables that keep all compiled parts below `folder`.

    vLLM compiles a model into `VLLM_CACHE_ROOT/torch_compile_cache/<hash>` and there sets
    `TORCHINDUCTOR_CACHE_DIR` itself, whatever it was; ours holds for what torch compiles outside
    of that. vLLM 0.32 leaves `TRITON_CACHE_DIR` as it finds it. FlashInfer keeps what it builds
    and downloads in `.cache/flashinfer` below its base.
    """
    return {
        "VLLM_CACHE_ROOT": str(folder / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "FLASHINFER_WORKSPACE_BASE": str(folder / "flashinfer"),
    }


def compiled_folders(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """The folders that hold compiled graphs of an engine with this environment.

    Those may be broken after a death in compilation. The kernels of Triton and FlashInfer are
    each found by what they were made of, and are not among them.
    """
    root = environment.get("VLLM_CACHE_ROOT")
    inductor = environment.get("TORCHINDUCTOR_CACHE_DIR")
    found = [Path(root).expanduser() / _COMPILED_GRAPHS] if root else []
    return (*found, Path(inductor)) if inductor else tuple(found)
