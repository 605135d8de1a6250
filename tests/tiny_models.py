"""Tiny checkpoints of every text architecture that vLLM's CPU build serves.

    python tiny_models.py FOLDER     (an interpreter with transformers)

writes one folder for each, with random weights of less than a megabyte and the demo model's
tokenizer. The shapes are such that windows, shared layers, uneven groups and two head sizes occur.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parent.parent / "src" / "gemma_serve" / "data" / "demo"

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "head_dim": 32,
    "vocab_size": 1024,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}


def _types(count: int, period: int) -> list[str]:
    return [
        "sliding_attention" if (index + 1) % period else "full_attention" for index in range(count)
    ]


CONFIGS: dict[str, dict[str, Any]] = {
    "gemma": {
        "architectures": ["GemmaForCausalLM"],
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "sliding_window": 128,
        "layer_types": [_types(2, 2)[index % 2] for index in range(5)],
        "max_position_embeddings": 4096,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "architectures": ["Gemma3ForCausalLM"],
        "num_hidden_layers": 13,
        "num_key_value_heads": 1,
        "sliding_window": 256,
        "layer_types": _types(13, 6),
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 32,
    },
    "gemma3n_text": {
        "architectures": ["Gemma3nForCausalLM"],
        "num_hidden_layers": 10,
        "num_key_value_heads": 2,
        "intermediate_size": [128] * 10,
        "sliding_window": 256,
        "layer_types": _types(10, 5),
        "num_kv_shared_layers": 3,
        "max_position_embeddings": 8192,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 1024,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 10,
    },
    "gemma4_text": {
        "architectures": ["Gemma4ForCausalLM"],
        "num_hidden_layers": 12,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "global_head_dim": 128,
        "sliding_window": 256,
        "layer_types": _types(12, 6),
        "num_kv_shared_layers": 0,
        "max_position_embeddings": 8192,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 1024,
    },
    "vaultgemma": {
        "architectures": ["VaultGemmaForCausalLM"],
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "sliding_window": 128,
        "layer_types": _types(4, 2),
        "max_position_embeddings": 2048,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
}


def tiny_config(model_type: str) -> dict[str, Any]:
    """The config.json of a tiny model."""
    return {"model_type": model_type, **_COMMON, **CONFIGS[model_type]}


def write_checkpoint(folder: Path, model_type: str) -> Path:
    """A folder that vLLM can serve. Needs torch and transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = folder / model_type
    config = tiny_config(model_type)
    parsed = AutoConfig.for_model(**{key: config[key] for key in config if key != "architectures"})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(parsed, dtype=torch.bfloat16)
    model.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, path / name)
    return path


if __name__ == "__main__":
    for each in CONFIGS:
        print(write_checkpoint(Path(sys.argv[1]), each))
