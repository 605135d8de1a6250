"""Model folders for tests: real files, with next to nothing in them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_serve.planning.model.facts import FactsReading, ModelFacts

GEMMA = {
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 8192,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


def weights_file(tensors: Mapping[str, int], *, dtype: str = "BF16", cut: int = 0) -> bytes:
    """A safetensors file of `tensors`, by name and size in bytes, with `cut` bytes missing."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in tensors.items():
        offsets = [end, end + size]
        header[name] = {
            "dtype": dtype,
            "shape": [size // DTYPE_BYTES[dtype]],
            "data_offsets": offsets,
        }
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end - cut)


def write_weights(file: Path, *, size: int, dtype: str = "BF16", cut: int = 0) -> None:
    """A safetensors file of one tensor, named after the file, of `size` bytes."""
    file.write_bytes(weights_file({file.stem: size}, dtype=dtype, cut=cut))


def write_model(folder: Path, config: Mapping[str, Any] = GEMMA) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder / "model.safetensors", size=1000)
    return folder


def codes(reading: FactsReading) -> list[str]:
    return [problem.code for problem in reading.problems]


def facts_of(reading: FactsReading) -> ModelFacts:
    assert reading.facts is not None
    return reading.facts
