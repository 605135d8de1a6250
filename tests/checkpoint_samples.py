"""Model folders for tests: real files, with next to nothing in them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from gemma_serve.planning.checkpoint import CheckpointReading

GEMMA = {
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 8192,
}


def write_weights(file: Path, *, size: int, dtype: str = "BF16", cut: int = 0) -> None:
    """A safetensors file of one tensor of `size` bytes, with `cut` bytes missing at the end."""
    tensor = {"dtype": dtype, "shape": [size // 2], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": tensor}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size - cut))


def write_model(folder: Path, config: dict[str, Any] = GEMMA) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder / "model.safetensors", size=1000)
    return folder


def codes(reading: CheckpointReading) -> list[str]:
    return [problem.code for problem in reading.problems]
