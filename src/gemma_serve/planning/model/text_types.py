"""The types of Gemma's language models, with what transformers takes for a missing key.

Source: transformers' models/gemma*/configuration_gemma*.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_serve.planning.model.config_reader import ConfigReader
from gemma_serve.planning.model.rope_config import (
    RopeParameters,
    flat_rope,
    gemma4_rope,
    local_and_global_rope,
)


@dataclass(frozen=True)
class TextType:
    """What there is to know of one type of language model.

    `pattern`: in the absence of `layer_types`, every so-manieth layer sees everything and the
    others a window; 0 where all layers see everything. `ties_always`: vLLM has no output matrix
    apart from the embeddings. `lengthens`: a scaled rope makes for a longer context.
    `even_heads`: the model's width must be a multiple of its heads.
    """

    architecture: str
    defaults: Mapping[str, Any]
    rope: Callable[[ConfigReader], dict[str, RopeParameters]]
    pattern: int
    ties_always: bool = False
    lengthens: bool = False
    has_attention_bias: bool = True
    even_heads: bool = True


_COMMON: Mapping[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "tie_word_embeddings": True,
    "num_kv_shared_layers": 0,
    "rope_theta": 10_000.0,
}
_GEMMA_2: Mapping[str, Any] = {
    **_COMMON,
    "vocab_size": 256_000,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA_3: Mapping[str, Any] = {
    **_COMMON,
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}
_GEMMA_4: Mapping[str, Any] = {
    **_COMMON,
    "vocab_size": 262_144,
    "num_hidden_layers": 30,
    "max_position_embeddings": 131_072,
    "sliding_window": 512,
    "global_head_dim": 512,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262_144,
}

TEXT_TYPES: Mapping[str, TextType] = {
    "gemma": TextType(
        "GemmaForCausalLM",
        {
            **_COMMON,
            "vocab_size": 256_000,
            "hidden_size": 3072,
            "intermediate_size": 24_576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 8192,
        },
        flat_rope,
        pattern=0,
        lengthens=True,
        has_attention_bias=False,
        even_heads=False,
    ),
    "gemma2": TextType(
        "Gemma2ForCausalLM", _GEMMA_2, flat_rope, pattern=2, ties_always=True, lengthens=True
    ),
    "vaultgemma": TextType("VaultGemmaForCausalLM", _GEMMA_2, flat_rope, 2, lengthens=True),
    "gemma3_text": TextType(
        "Gemma3ForCausalLM",
        {**_GEMMA_3, "sliding_window_pattern": 6},
        local_and_global_rope,
        pattern=6,
    ),
    "gemma3n_text": TextType(
        "Gemma3nForCausalLM",
        {
            **_GEMMA_3,
            "vocab_size": 262_400,
            "hidden_size": 2048,
            "intermediate_size": 16_384,
            "num_hidden_layers": 35,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32_768,
            "sliding_window": 512,
            "final_logit_softcapping": 30.0,
            "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": 262_144,
            "altup_num_inputs": 4,
            "num_kv_shared_layers": 15,
            "laurel_rank": 64,
        },
        local_and_global_rope,
        pattern=5,
        ties_always=True,
    ),
    "gemma4_text": TextType("Gemma4ForCausalLM", _GEMMA_4, gemma4_rope, pattern=6, lengthens=True),
    "gemma4_unified_text": TextType(
        "Gemma4UnifiedForCausalLM",
        {
            **_GEMMA_4,
            "max_position_embeddings": 262_144,
            "sliding_window": 1024,
            "use_bidirectional_attention": "vision",
            "hidden_size_per_layer_input": 0,
        },
        gemma4_rope,
        pattern=6,
        lengthens=True,
        even_heads=False,
    ),
}

# Models that wrap a language model: their architecture and the type that it has by default.
WRAPPERS: Mapping[str, tuple[str, str]] = {
    "gemma3": ("Gemma3ForConditionalGeneration", "gemma3_text"),
    "gemma3n": ("Gemma3nForConditionalGeneration", "gemma3n_text"),
    "gemma4": ("Gemma4ForConditionalGeneration", "gemma4_text"),
    "gemma4_unified": ("Gemma4UnifiedForConditionalGeneration", "gemma4_unified_text"),
    "paligemma": ("PaliGemmaForConditionalGeneration", "gemma"),
}
PALIGEMMA_TEXT: Mapping[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 18,
    "intermediate_size": 16_384,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
}
