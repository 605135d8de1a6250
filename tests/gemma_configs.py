"""config.json files of public Gemmas, with the keys that memory follows from.

What the published files leave out is left out here too.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

SLIDING, FULL = "sliding_attention", "full_attention"


def _text(architecture: str, model_type: str, sizes: tuple[int, ...], **more: Any) -> Config:
    hidden, inner, layers, heads, kv_heads = sizes
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "torch_dtype": "bfloat16",
        **more,
    }


def _gemma(*sizes: int) -> Config:
    more = {"head_dim": 256, "hidden_act": "gelu", "max_position_embeddings": 8192}
    more |= {"rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256000}
    return _text("GemmaForCausalLM", "gemma", sizes, **more)


def _gemma2(*sizes: int, head_dim: int = 256) -> Config:
    more = {"head_dim": head_dim, "max_position_embeddings": 8192, "rope_theta": 10000.0}
    more |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    more |= {"sliding_window": 4096, "vocab_size": 256000, "cache_implementation": "hybrid"}
    return _text("Gemma2ForCausalLM", "gemma2", sizes, **more)


def _gemma3_text(*sizes: int) -> Config:
    more = {"head_dim": 256, "max_position_embeddings": 32768, "sliding_window": 512}
    more |= {"rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000}
    more |= {"sliding_window_pattern": 6, "vocab_size": 262144, "attn_logit_softcapping": None}
    return _text("Gemma3ForCausalLM", "gemma3_text", sizes, **more)


def _siglip(image_size: int) -> Config:
    return {
        "hidden_size": 1152,
        "image_size": image_size,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    }


def _gemma3(**text: Any) -> Config:
    scaling = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "mm_tokens_per_image": 256,
        "image_token_index": 262144,
        "text_config": {"model_type": "gemma3_text", "sliding_window": 1024, **scaling, **text},
        "torch_dtype": "bfloat16",
        "vision_config": _siglip(896),
    }


def _gemma3n(inner: int, layers: int, shared: int) -> Config:
    text = {
        "model_type": "gemma3n_text",
        "hidden_size": 2048,
        "intermediate_size": [inner] * layers,
    }
    text |= {"num_hidden_layers": layers, "num_kv_shared_layers": shared, "vocab_size": 262400}
    text |= {"layer_types": [SLIDING if (i + 1) % 5 else FULL for i in range(layers)]}
    text |= {"activation_sparsity_pattern": [0.95] * 10 + [0.0] * (layers - 10)}
    text |= {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rope_scaling": None}
    text |= {"sliding_window": 512, "max_position_embeddings": 32768, "laurel_rank": 64}
    return {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "model_type": "gemma3n",
        "text_config": text,
        "audio_config": {"model_type": "gemma3n_audio", "hidden_size": 1536},
        "vision_config": {"model_type": "gemma3n_vision", "architecture": "mobilenetv5_300m_enc"},
        "torch_dtype": "bfloat16",
    }


_GEMMA4_ROPE = {
    FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
    SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
}
_GEMMA4_SMALL_VISION = {"model_type": "gemma4_vision", "use_clipped_linears": True}
_GEMMA4_LARGE_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "standardize": True,
}


def _gemma4_text(*sizes: int, every: int = 6, **more: Any) -> Config:
    layers = sizes[2]
    more = {
        "head_dim": 256,
        "global_head_dim": 512,
        "layer_types": [SLIDING if (i + 1) % every else FULL for i in range(layers)],
        "rope_parameters": _GEMMA4_ROPE,
        "final_logit_softcapping": 30.0,
        "vocab_size": 262144,
        **more,
    }
    text = _text("Gemma4ForCausalLM", "gemma4_text", sizes, **more)
    del text["architectures"]
    return text


def _gemma4(text: Config, vision: Config, *, audio: bool) -> Config:
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": "bfloat16",
        "text_config": text,
        "vision_config": vision,
        "audio_config": {"model_type": "gemma4_audio"} if audio else None,
    }


def _large(global_kv_heads: int, **more: Any) -> Config:
    return {
        "attention_k_eq_v": True,
        "num_global_key_value_heads": global_kv_heads,
        "hidden_size_per_layer_input": 0,
        "max_position_embeddings": 262144,
        "sliding_window": 1024,
        "use_bidirectional_attention": "vision",
        **more,
    }


def _gemma4_unified() -> Config:
    text = _gemma4_text(3840, 15360, 48, 16, 8, **_large(1)) | {"model_type": "gemma4_unified_text"}
    return {
        "architectures": ["Gemma4UnifiedForConditionalGeneration"],
        "model_type": "gemma4_unified",
        "dtype": "bfloat16",
        "text_config": text,
        "vision_config": {"model_type": "gemma4_unified_vision"},
        "audio_config": {"model_type": "gemma4_unified_audio"},
    }


def _paligemma(text: Config, width: int, image_size: int) -> Config:
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "projection_dim": width,
        "hidden_size": 2048,
        "text_config": {**text, "vocab_size": 257216},
        "vision_config": _siglip(image_size) | {"projection_dim": width},
        "torch_dtype": "float32",
    }


def _paligemma2(image_size: int) -> Config:
    text = _gemma2(3584, 14336, 42, 16, 8)
    for key in ("architectures", "torch_dtype", "max_position_embeddings", "rope_theta"):
        del text[key]
    return _paligemma(text, 3584, image_size)


_PALIGEMMA_TEXT: Config = {
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
}


PUBLIC: dict[str, Config] = {
    "gemma-2b": _gemma(2048, 16384, 18, 8, 1),
    "gemma-7b": _gemma(3072, 24576, 28, 16, 16),
    "gemma-2-2b": _gemma2(2304, 9216, 26, 8, 4),
    "gemma-2-9b": _gemma2(3584, 14336, 42, 16, 8),
    "gemma-2-27b": _gemma2(4608, 36864, 46, 32, 16, head_dim=128),
    "gemma-3-270m": _gemma3_text(640, 2048, 18, 4, 1),
    "gemma-3-1b": _gemma3_text(1152, 6912, 26, 4, 1),
    "gemma-3-4b": _gemma3(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34),
    "gemma-3-12b": _gemma3(
        hidden_size=3840,
        intermediate_size=15360,
        num_attention_heads=16,
        num_hidden_layers=48,
        num_key_value_heads=8,
    ),
    "gemma-3-27b": _gemma3(
        head_dim=128,
        hidden_size=5376,
        intermediate_size=21504,
        num_attention_heads=32,
        num_hidden_layers=62,
        num_key_value_heads=16,
    ),
    "gemma-3n-E2B": _gemma3n(8192, 30, 10),
    "gemma-3n-E4B": _gemma3n(16384, 35, 15),
    "gemma-4-E2B": _gemma4(
        _gemma4_text(
            1536, 6144, 35, 8, 1, every=5, num_kv_shared_layers=20, use_double_wide_mlp=True
        ),
        _GEMMA4_SMALL_VISION,
        audio=True,
    ),
    "gemma-4-E4B": _gemma4(
        _gemma4_text(2560, 10240, 42, 8, 2, num_kv_shared_layers=18),
        _GEMMA4_SMALL_VISION,
        audio=True,
    ),
    "gemma-4-12B": _gemma4_unified(),
    "gemma-4-26B-A4B": _gemma4(
        _gemma4_text(
            2816,
            2112,
            30,
            16,
            8,
            **_large(
                2,
                enable_moe_block=True,
                num_experts=128,
                moe_intermediate_size=704,
                top_k_experts=8,
            ),
        ),
        _GEMMA4_LARGE_VISION,
        audio=False,
    ),
    "gemma-4-31B": _gemma4(
        _gemma4_text(5376, 21504, 60, 32, 16, **_large(4)), _GEMMA4_LARGE_VISION, audio=False
    ),
    "paligemma-3b-224": _paligemma(_PALIGEMMA_TEXT, 2048, 224),
    "paligemma2-10b-448": _paligemma2(448),
    "vaultgemma-1b": _text(
        "VaultGemmaForCausalLM",
        "vaultgemma",
        (1152, 6912, 26, 4, 4),
        head_dim=256,
        max_position_embeddings=1024,
        sliding_window=512,
        layer_types=[FULL] * 26,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        vocab_size=256000,
    ),
    "embeddinggemma-300m": _gemma3_text(768, 1152, 24, 3, 1)
    | {
        "architectures": ["Gemma3TextModel"],
        "max_position_embeddings": 2048,
        "use_bidirectional_attention": True,
    },
}
