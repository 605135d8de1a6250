"""From a model's config.json to its geometry, as vLLM will see it.

What a config leaves out is filled in as transformers does it (models/gemma*/configuration_*.py);
where vLLM builds something else than transformers says, vLLM decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_serve.planning.model.config_reader import MOST_LAYERS, ConfigReader, ModelConfigError
from gemma_serve.planning.model.geometry import Attention, Experts, Geometry, Layer, Rope
from gemma_serve.planning.model.rope_config import (
    FULL,
    SLIDING,
    RopeParameters,
    gemma4_rope,
    length_factor,
    rope_table,
)
from gemma_serve.planning.model.text_types import PALIGEMMA_TEXT, TEXT_TYPES, WRAPPERS, TextType
from gemma_serve.planning.model.tower_config import read_towers

_UNKNOWN = "model.unknown_architecture"


# Wrappers of which vLLM always looks at images in both directions.
_MM_PREFIX_TYPES = frozenset({"gemma3", "paligemma"})
# Related models that need plans of their own.
_RELATIVES = ("recurrent_gemma", "t5gemma", "shieldgemma2", "diffusion_gemma", "embedding_gemma2")
# Where else vLLM looks for the longest context; the least of all counts.
_LENGTH_KEYS = ("n_positions", "max_seq_len", "seq_length", "max_sequence_length")


def read_geometry(config: Mapping[str, Any]) -> Geometry:
    """The geometry of the model that a config.json describes.

    Raises:
        ModelConfigError: it describes no Gemma that we know ("model.unknown_architecture"), or a
            value in it makes no sense ("model.bad_config").
    """
    whole = ConfigReader(config)
    model_type = _model_type(whole)
    text, text_type = _text_config(whole, model_type)
    kind = TEXT_TYPES[text_type]
    text = text.with_defaults({**kind.defaults, **text.defaults})
    layer_types = _layer_types(text, kind)
    layers = _layers(text, text_type, layer_types)
    parameters = kind.rope(text)
    architecture = _architecture(whole, model_type)
    tied = whole if model_type in WRAPPERS else text
    return Geometry(
        model_type=model_type,
        architecture=architecture,
        hidden_size=_hidden_size(text, kind),
        vocab_size=text.whole("vocab_size"),
        layers=layers,
        ropes=_ropes(text, text_type, layers, layer_types, parameters),
        max_model_len=_max_model_len(
            text, parameters if kind.lengthens and text_type == model_type else {}
        ),
        tied_embeddings=kind.ties_always or _ties(tied),
        # Gemma 3 has the key too, but vLLM passes it on for Gemma 2 and 4 only.
        softcaps_attention=not text_type.startswith("gemma3")
        and text.is_on("attn_logit_softcapping"),
        softcaps_logits=text_type != "gemma" and text.is_on("final_logit_softcapping"),
        attends_both_ways_to_images=_attends_both_ways(whole, model_type, text),
        is_pooling=not architecture.endswith(("ForCausalLM", "ForConditionalGeneration")),
        per_layer_input_size=_per_layer_input_size(text),
        per_layer_vocab_size=_per_layer_vocab_size(text),
        towers=read_towers(model_type, whole, text.whole("hidden_size")),
        text_model_type=text_type,
        attention_bias=kind.has_attention_bias and text.switch("attention_bias"),
        altup_inputs=text.whole("altup_num_inputs") if text_type == "gemma3n_text" else 0,
        laurel_rank=text.whole("laurel_rank") if text_type == "gemma3n_text" else 0,
    )


def _model_type(config: ConfigReader) -> str:
    model_type = config.text("model_type")
    if model_type in TEXT_TYPES or model_type in WRAPPERS:
        return str(model_type)
    architectures = config.get("architectures")
    named = str(architectures[0]) if isinstance(architectures, list) and architectures else None
    found = model_type or named
    if not found:
        raise ModelConfigError(
            "config.json says neither `model_type` nor `architectures`, so nobody can tell "
            "what model it is",
            code=_UNKNOWN,
            hint="check that it is the config.json of a model in Hugging Face's format",
        )
    if "gemma" in found.lower():
        related = "a relative of Gemma" if found.startswith(_RELATIVES) else "a newer kind"
        raise ModelConfigError(
            f"`{found}` is {related} whose memory can't be planned from its config.json yet",
            code=_UNKNOWN,
            hint=f"known are {', '.join(sorted({*TEXT_TYPES, *WRAPPERS}))}",
        )
    raise ModelConfigError(
        f"`{found}` is no Gemma, and gemma-serve plans the memory of Gemmas",
        code=_UNKNOWN,
        hint="vLLM may serve it all the same, but no figure here was made for it",
    )


def _text_config(config: ConfigReader, model_type: str) -> tuple[ConfigReader, str]:
    """The language model's part of the config, and its type."""
    if model_type not in WRAPPERS:
        return config, model_type
    default_type = WRAPPERS[model_type][1]
    text = config.section("text_config")
    if text is None:
        defaults: Mapping[str, Any] = {}
        if model_type == "paligemma":
            vocabulary = config.with_defaults({"vocab_size": 257_152}).get("vocab_size")
            defaults = {**PALIGEMMA_TEXT, "vocab_size": vocabulary}
        return ConfigReader({}, "text_config.", defaults), default_type
    text_type = text.text("model_type") or default_type
    wanted = ("gemma", "gemma2") if model_type == "paligemma" else (default_type,)
    if text_type not in wanted:
        raise text.error("model_type", " or ".join(f'"{name}"' for name in wanted))
    return text, text_type


def _architecture(config: ConfigReader, model_type: str) -> str:
    given = config.get("architectures")
    if isinstance(given, list | tuple) and given and isinstance(given[0], str):
        return given[0]
    if model_type in WRAPPERS:
        return WRAPPERS[model_type][0]
    return TEXT_TYPES[model_type].architecture


def _ties(config: ConfigReader) -> bool:
    return config.with_defaults({"tie_word_embeddings": True}).switch("tie_word_embeddings")


def _hidden_size(text: ConfigReader, kind: TextType) -> int:
    hidden, heads = text.whole("hidden_size"), text.whole("num_attention_heads")
    # transformers insists, although the heads have a size of their own.
    if kind.even_heads and hidden % heads:
        raise text.error("hidden_size", f"a multiple of the {heads} attention heads")
    return hidden


def _layer_types(text: ConfigReader, kind: TextType) -> tuple[str, ...]:
    count = text.whole("num_hidden_layers", most=MOST_LAYERS)
    # Of all types, only Gemma 3 has the key.
    reads_pattern = "sliding_window_pattern" in kind.defaults
    pattern = text.whole("sliding_window_pattern") if reads_pattern else kind.pattern
    if not pattern:
        return (FULL,) * count
    if not text.has("layer_types"):
        types = [SLIDING if (i + 1) % pattern else FULL for i in range(count)]
    else:
        types = [str(name) for name in text.sequence("layer_types", count)]
    if not set(types) <= {FULL, SLIDING}:
        raise text.error("layer_types", f'"{FULL}" or "{SLIDING}" for each layer')
    if kind.rope is gemma4_rope:
        # Both transformers and vLLM see to it that the last layer sees everything.
        types[-1] = FULL
    return tuple(types)


def _layers(text: ConfigReader, text_type: str, layer_types: tuple[str, ...]) -> tuple[Layer, ...]:
    window = _window(text)
    heads = _heads(text, text_type, layer_types)
    first_shared = _first_shared_layer(text, text_type, layer_types)
    keys_are_values = text_type.startswith("gemma4") and text.switch("attention_k_eq_v")
    widths = _widths(text, text_type, first_shared, len(layer_types))
    experts = _experts(text) if text_type.startswith("gemma4") else None
    return tuple(
        Layer(
            Attention(
                query_heads=text.whole("num_attention_heads"),
                kv_heads=kv_heads,
                head_size=head_size,
                window=window if layer_type == SLIDING else None,
                shares_kv=index >= first_shared,
                key_is_value=keys_are_values and layer_type == FULL and index < first_shared,
            ),
            width,
            experts,
        )
        for index, (layer_type, (head_size, kv_heads), width) in enumerate(
            zip(layer_types, heads, widths, strict=True)
        )
    )


def _window(text: ConfigReader) -> int | None:
    window = text.whole_or_none("sliding_window")
    both_ways = text.get("use_bidirectional_attention")
    # Text seen in both directions: half of the window lies on either side.
    if window and (both_ways is True or both_ways == "all"):
        return window // 2 + 1
    return window


def _heads(
    text: ConfigReader, text_type: str, layer_types: tuple[str, ...]
) -> list[tuple[int, int]]:
    """Size and number of the key-value heads of each layer."""
    usual = (text.whole("head_dim"), text.whole("num_key_value_heads"))
    if not text_type.startswith("gemma4"):
        return [usual] * len(layer_types)
    if text.has("per_layer_config"):
        return _heads_by_layer(text, usual, len(layer_types))
    kv_heads = usual[1]
    if text.switch("attention_k_eq_v") and text.has("num_global_key_value_heads"):
        kv_heads = text.whole("num_global_key_value_heads")
    full = (text.whole("global_head_dim"), kv_heads)
    return [full if layer_type == FULL else usual for layer_type in layer_types]


def _heads_by_layer(
    text: ConfigReader, usual: tuple[int, int], count: int
) -> list[tuple[int, int]]:
    """What `per_layer_config` says: for some layers, by number, what differs from the others."""
    given = text.section("per_layer_config")
    heads = [usual] * count
    for key in given.values if given else ():
        if given is None or not str(key).isdecimal() or int(key) >= count:
            raise text.error("per_layer_config", "the numbers of layers")
        layer = ConfigReader({key: given.values[key]}, given.place).section_or_empty(
            key, {"head_dim": usual[0], "num_key_value_heads": usual[1]}
        )
        if not set(layer.values) <= {"head_dim", "num_key_value_heads"}:
            raise given.error(key, "nothing but `head_dim` and `num_key_value_heads`")
        heads[int(key)] = (layer.whole("head_dim"), layer.whole("num_key_value_heads"))
    return heads


def _first_shared_layer(text: ConfigReader, text_type: str, layer_types: tuple[str, ...]) -> int:
    """The first layer that reads the KV cache of an earlier one; their number if there is none."""
    count = len(layer_types)
    shares = text_type.startswith(("gemma3n", "gemma4"))
    first = count - (text.whole("num_kv_shared_layers", least=0) if shares else 0)
    if first < count and not set(layer_types[first:]) <= set(layer_types[: max(first, 0)]):
        raise text.error("num_kv_shared_layers", "earlier layers of each kind to share with")
    return first


def _widths(text: ConfigReader, text_type: str, first_shared: int, count: int) -> list[int]:
    """How wide each layer's MLP is."""
    if text_type == "gemma3n_text" and isinstance(text.get("intermediate_size"), list | tuple):
        return text.wholes("intermediate_size", count)
    width = text.whole("intermediate_size")
    double = text_type.startswith("gemma4") and text.switch("use_double_wide_mlp")
    # vLLM's own condition, which also wants one layer at least that shares nothing.
    return [width * (2 if double and index >= first_shared > 0 else 1) for index in range(count)]


def _experts(text: ConfigReader) -> Experts | None:
    if not text.has("num_experts"):
        return None
    key = "moe_intermediate_size"
    if not text.has(key) and text.has("expert_intermediate_size"):
        key = "expert_intermediate_size"
    return Experts(text.whole("num_experts"), text.whole("top_k_experts"), text.whole(key))


def _per_layer_input_size(text: ConfigReader) -> int:
    if text.get("hidden_size_per_layer_input") is None:
        return 0
    return text.whole("hidden_size_per_layer_input", least=0)


def _per_layer_vocab_size(text: ConfigReader) -> int:
    return text.whole("vocab_size_per_layer_input") if _per_layer_input_size(text) else 0


def _ropes(
    text: ConfigReader,
    text_type: str,
    layers: tuple[Layer, ...],
    layer_types: tuple[str, ...],
    parameters: Mapping[str, RopeParameters],
) -> tuple[Rope, ...]:
    """One table for all layers whose parameters and head size are equal.

    VaultGemma has none: it runs in transformers' own code, which keeps frequencies only.
    """
    if text_type == "vaultgemma":
        return ()
    positions = text.whole("max_position_embeddings")
    kinds = dict.fromkeys(
        (layer_type, layer.attention.head_size)
        for layer_type, layer in zip(layer_types, layers, strict=True)
    )
    tables = (
        rope_table(parameters[layer_type], head_size=head_size, positions=positions)
        for layer_type, head_size in kinds
    )
    return tuple({table.key: table for table in tables}.values())


def _max_model_len(text: ConfigReader, parameters: Mapping[str, RopeParameters]) -> int:
    """The longest context that vLLM allows (config/model.py, _get_and_verify_max_len)."""
    lengths = [text.whole(key) for key in _LENGTH_KEYS if text.has(key)]
    length = min(text.whole("max_position_embeddings"), *lengths, 2**62)
    if text.has("model_max_length"):
        length = text.whole("model_max_length")
    return int(length * length_factor(parameters))


def _attends_both_ways(whole: ConfigReader, model_type: str, text: ConfigReader) -> bool:
    if model_type.startswith("gemma4"):
        return bool(text.get("use_bidirectional_attention") == "vision")
    if whole.has("is_mm_prefix_lm"):
        return whole.switch("is_mm_prefix_lm")
    return model_type in _MM_PREFIX_TYPES
