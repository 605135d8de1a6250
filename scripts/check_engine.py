"""Does the engine in this environment import? Run by scripts/install, once per installation.

Imports go through importlib, so that type checkers don't read the engine's sources.
"""

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
GEMMA_CLASSES = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForConditionalGeneration")


def broken_companions() -> list[str]:
    """Of torch's companions that are installed, those that don't load beside this torch."""
    found = [name for name in COMPANIONS if importlib.util.find_spec(name)]
    # Each in its own process: a failed import leaves its operators half registered.
    trials = [
        subprocess.Popen([sys.executable, "-c", f"import {name}"], stderr=subprocess.DEVNULL)
        for name in found
    ]
    return [name for name, trial in zip(found, trials, strict=True) if trial.wait() != 0]


def check_imports(engine: str) -> str:
    """Import what serving Gemma imports; returns the versions."""
    torch = importlib.metadata.version("torch")
    if engine == "gpu" and torch.endswith("+cpu"):
        # 2.13.0+cpu satisfies ==2.13.0 and sorts above it, wherever pip is shown both.
        sys.exit(f"torch {torch} is a build for CPUs: keep its index out of pip's configuration.")
    vllm = importlib.import_module("vllm")
    importlib.import_module("vllm.entrypoints.openai.api_server")
    transformers = importlib.import_module("transformers")
    for name in GEMMA_CLASSES:
        getattr(transformers, name)
    return f"vLLM {vllm.__version__}, torch {torch}, transformers {transformers.__version__}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--broken-companions"]:
        print(*broken_companions())
    else:
        print(check_imports(sys.argv[1]))
