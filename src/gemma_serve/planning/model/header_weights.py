"""What becomes of the tensors of a checkpoint on each GPU, by their names.

Source: the weight mappings and `load_weights` of vLLM's Gemma models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from gemma_serve.planning.model.geometry import VOCABULARY_PADDING, Geometry

_FLOAT32_BYTES = 4

# Plain weights, which vLLM converts to the model's dtype.
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_FLOAT_8 = "F8"

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
_TOWER = re.compile(
    r"(?:^|\.)(vision_tower|vision_model|audio_tower|vision_embedder|multi_modal_projector"
    r"|embed_vision|embed_audio)\."
)
_AUDIO = re.compile(r"(?:^|\.)(audio_tower|embed_audio)\.")

# Buffers that checkpoints bring along; they are counted with the others of their kind. And what
# vLLM has no use for: angles that it computes, the pooling head of SigLIP.
_NOT_WEIGHTS = re.compile(
    r"(layer_scalar|std_bias|std_scale|(?:in|out)put_(?:min|max)|inv_freq|position_ids"
    r"|gradient_clipping|softcap|local_causal_valid_mask|inv_timescales)$|vision_(?:model|tower)\.head\."
)
_SCALES = re.compile(r"(weight_scale|weight_scale_inv|input_scale|scales)$")

_SPLIT_BY_ROWS = re.compile(
    r"\.(q_proj|gate_proj|up_proj|gate_up_proj|linear_left|per_layer_model_projection"
    r"|altup_projections\.\d+|altup_unembed_projections\.\d+)\."
)
_SPLIT_BY_COLUMNS = re.compile(r"\.(o_proj|down_proj|linear_right)\.")
_KEYS_VALUES = re.compile(r"\.(k_proj|v_proj)\.")
_EMBEDDINGS = re.compile(r"(embed_tokens|embed_tokens_per_layer|lm_head)\.weight$")
_SIGLIP_MODELS = frozenset({"gemma3", "paligemma"})
_SIGLIP_ROWS = re.compile(r"\.(q_proj|k_proj|v_proj|fc1)\.")
_SIGLIP_COLUMNS = re.compile(r"\.(out_proj|fc2)\.weight")


@dataclass(frozen=True)
class HeaderTensor:
    """One tensor as a safetensors header lists it; `dtype` is safetensors' own name ("BF16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int

    @property
    def is_plain(self) -> bool:
        """Whether it holds plain weights, which vLLM converts to the model's dtype."""
        return self.dtype in _FLOATS

    @property
    def elements(self) -> int:
        """How many values it has."""
        count = 1
        for side in self.shape:
            count *= side
        return count


def unknown_bytes(tensors: Iterable[HeaderTensor], dtype_bytes: int) -> int:
    """All tensors in the model's dtype, for a model of which nothing else is known."""
    return sum(_loaded_bytes(tensor, dtype_bytes, frozenset()) for tensor in tensors)


def headers_by_group(
    tensors: Iterable[HeaderTensor],
    geometry: Geometry,
    *,
    dtype_bytes: int,
    tensor_parallel_size: int,
    language_model_only: bool,
    shared_layers_hold_kv: bool,
) -> dict[str, int]:
    """The bytes that one GPU holds, as "text", "embeddings" and "towers".

    Args:
        shared_layers_hold_kv: whether layers that share another's KV cache have projections for
            keys and values all the same.
    """
    tensors = [tensor for tensor in tensors if not _NOT_WEIGHTS.search(tensor.name)]
    float_8 = frozenset(
        tensor.name.removesuffix(".weight") for tensor in tensors if tensor.dtype[:2] == _FLOAT_8
    )
    parts: dict[str, int] = {}
    for tensor in tensors:
        place = _place(tensor.name)
        copies = _copies(tensor.name, geometry, shared_layers_hold_kv=shared_layers_hold_kv)
        if place == "towers" and not _is_built(tensor.name, geometry, language_model_only):
            copies = 0
        if not copies:
            continue
        share = _share(tensor, geometry, tensor_parallel_size)
        size = _loaded_bytes(tensor, dtype_bytes, float_8) * copies * share
        parts[place] = parts.get(place, 0) + -(-size.numerator // size.denominator)
    return parts


def _place(name: str) -> str:
    if _TOWER.search(name):
        return "towers"
    return "embeddings" if _EMBEDDINGS.search(name) else "text"


def _is_built(name: str, geometry: Geometry, language_model_only: bool) -> bool:
    """Whether vLLM builds the tower that a tensor belongs to."""
    wanted = "audio" if _AUDIO.search(name) else "image"
    return any(
        tower.modality == wanted and not (language_model_only and tower.optional)
        for tower in geometry.towers
    )


def _copies(name: str, geometry: Geometry, *, shared_layers_hold_kv: bool) -> int:
    """How often vLLM keeps a tensor: not at all, once, or as keys and as values."""
    if name.endswith("lm_head.weight"):
        return 0 if geometry.tied_embeddings or geometry.is_pooling else 1
    layer = _LAYER.search(name)
    if not layer or _TOWER.search(name) or int(layer[1]) >= len(geometry.layers):
        return 1
    attention = geometry.layers[int(layer[1])].attention
    of_keys_values = re.match(r"self_attn\.(k_proj|v_proj|k_norm)\.", layer[2])
    if attention.shares_kv and of_keys_values and not shared_layers_hold_kv:
        return 0
    if attention.key_is_value and layer[2].startswith("self_attn.k_proj."):
        return 2
    return 1


def _share(tensor: HeaderTensor, geometry: Geometry, tensor_parallel_size: int) -> Fraction:
    """Which part of a tensor each GPU holds."""
    name = tensor.name
    if _EMBEDDINGS.search(name) and tensor.shape:
        return _vocabulary_share(tensor.shape[0], tensor_parallel_size)
    if _TOWER.search(name):
        return _tower_share(tensor, geometry, tensor_parallel_size)
    even = Fraction(1, tensor_parallel_size)
    layer = _LAYER.search(name)
    if _KEYS_VALUES.search(name) and layer and int(layer[1]) < len(geometry.layers):
        heads = geometry.layers[int(layer[1])].attention.kv_heads
        return _unless_scalar(tensor, Fraction(max(1, heads // tensor_parallel_size), heads))
    if _SPLIT_BY_ROWS.search(f"{name}."):
        return _unless_scalar(tensor, even)
    if _SPLIT_BY_COLUMNS.search(f"{name}."):
        # Biases and scales of whole rows are on every GPU.
        return even if len(tensor.shape) > 1 and tensor.shape[-1] > 1 else Fraction(1)
    return Fraction(1)


def _tower_share(tensor: HeaderTensor, geometry: Geometry, tensor_parallel_size: int) -> Fraction:
    """SigLIP is split, and of the other towers what vLLM wrote itself."""
    name, split = tensor.name, None
    if geometry.model_type in _SIGLIP_MODELS:
        split = _SIGLIP_ROWS.search(name) or _SIGLIP_COLUMNS.search(name)
    elif geometry.model_type == "gemma3n":
        if name.endswith(".embedding.weight") and tensor.shape:
            return _vocabulary_share(tensor.shape[0], tensor_parallel_size)
        split = re.search(r"\.embedding_projection\.", name)
    elif geometry.model_type == "gemma4_unified":
        split = re.search(r"\.patch_dense\.", name)
    return _unless_scalar(tensor, Fraction(1, tensor_parallel_size)) if split else Fraction(1)


def _vocabulary_share(rows: int, tensor_parallel_size: int) -> Fraction:
    padded = -(-rows // VOCABULARY_PADDING) * VOCABULARY_PADDING
    return Fraction(-(-padded // tensor_parallel_size), max(rows, 1))


def _unless_scalar(tensor: HeaderTensor, share: Fraction) -> Fraction:
    return share if tensor.elements > 1 else Fraction(1)


def _loaded_bytes(tensor: HeaderTensor, dtype_bytes: int, float_8: frozenset[str]) -> int:
    """A tensor's size once it is loaded: floats in the model's dtype, the rest as it is."""
    if tensor.dtype not in _FLOATS:
        return tensor.size_bytes
    module = tensor.name.rpartition(".")[0]
    of_float_8 = module in float_8 and _SCALES.search(tensor.name)
    if of_float_8 or tensor.name.endswith("correct_output_scale"):
        return tensor.elements * _FLOAT32_BYTES
    return tensor.elements * dtype_bytes
