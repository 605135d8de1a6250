"""Every tensor that vLLM allocates for a Gemma's language model, from its geometry.

Source: vLLM's model_executor/models/gemma.py, gemma2.py, gemma3.py, gemma3n.py, gemma4.py and
their multimodal wrappers. The towers' tensors come with the geometry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gemma_serve.planning.model.geometry import (
    Attention,
    Experts,
    Geometry,
    Group,
    Layer,
    Parameter,
)

FLOAT32_BYTES = 4

# Attention keeps the scales of keys, values, queries and probabilities, used or not.
_ATTENTION_SCALES = 4


@dataclass(frozen=True)
class AllocationRules:
    """What differs between vLLM's releases in the tensors of a Gemma.

    `shared_layers_hold_kv`: whether a layer that shares another's KV cache still has projections
    of its own for keys and values. `scale_ranges`: how many constants each attention layer keeps
    for the calibration of its KV scales.
    """

    shared_layers_hold_kv: bool
    scale_ranges: int


# The release that each set of rules came with.
_ALLOCATION_RULES: tuple[tuple[tuple[int, int], AllocationRules], ...] = (
    ((0, 30), AllocationRules(shared_layers_hold_kv=False, scale_ranges=0)),
    ((0, 28), AllocationRules(shared_layers_hold_kv=True, scale_ranges=0)),
    ((0, 0), AllocationRules(shared_layers_hold_kv=True, scale_ranges=3)),
)


@dataclass(frozen=True)
class _Family:
    """What all models of one type have in common, and that no config.json says.

    `layer_norms` norms as wide as the model in each layer, with `query_key_norms` also one of
    each per head, and with `value_norm` one without weights. `layer_scalar`: each layer scales
    its output. `rope_tables`: False where the angles are computed afresh.
    """

    layer_norms: int
    query_key_norms: bool = False
    value_norm: bool = False
    layer_scalar: bool = False
    rope_tables: bool = True


_FAMILIES = {
    "gemma": _Family(layer_norms=2),
    "gemma2": _Family(layer_norms=4),
    "vaultgemma": _Family(layer_norms=2, rope_tables=False),
    "gemma3_text": _Family(layer_norms=4, query_key_norms=True),
    "gemma3n_text": _Family(layer_norms=4, query_key_norms=True, value_norm=True),
    "gemma4_text": _Family(layer_norms=4, query_key_norms=True, value_norm=True, layer_scalar=True),
}
_SAME_AS = {"gemma4_unified_text": "gemma4_text"}

NEWEST_RELEASE = (0, 33)
_NOT_WEIGHTS: frozenset[Group] = frozenset({"rope", "buffers", "constants", "staging"})

# Wrappers that stage the per-layer inputs of a batch (gemma3n_mm.py, gemma4_mm.py).
_STAGES_PER_LAYER_INPUTS = frozenset({"gemma3n", "gemma4", "gemma4_unified"})


def allocation_rules(release: tuple[int, int]) -> AllocationRules:
    """The rules of one release of vLLM, like (0, 32)."""
    return next(rules for since, rules in _ALLOCATION_RULES if since <= release)


def text_parameters(
    geometry: Geometry, rules: AllocationRules, *, max_num_batched_tokens: int = 0
) -> tuple[Parameter, ...]:
    """Every tensor of the language model, with tied embeddings counted once.

    Args:
        max_num_batched_tokens: sizes the staging area of models with per-layer inputs.
    """
    return (
        *_embeddings(geometry),
        *_layers(geometry, rules),
        *_model_buffers(geometry),
        *_ropes(geometry),
        *_staging(geometry, max_num_batched_tokens),
    )


def parameter_count(geometry: Geometry) -> int:
    """The weights of the model as its authors count them: no tables, buffers or copies."""
    text = text_parameters(geometry, allocation_rules(NEWEST_RELEASE))
    return sum(
        parameter.rank_elements(1) for parameter in text if parameter.group not in _NOT_WEIGHTS
    ) + sum(tower.parameters for tower in geometry.towers)


def _family(geometry: Geometry) -> _Family:
    text_type = geometry.language_model_type
    return _FAMILIES[_SAME_AS.get(text_type, text_type)]


def _vector(name: str, group: Group, size: int, count: int = 1) -> Parameter:
    return Parameter(name, group, (size,), count=count)


def _scalars(name: str, count: int, bytes_per_element: int | None = None) -> Parameter:
    return Parameter(name, "buffers", (1,), count=count, bytes_per_element=bytes_per_element)


def _embeddings(geometry: Geometry) -> Iterator[Parameter]:
    table = Parameter(
        "embed_tokens",
        "embeddings",
        (geometry.vocab_size,),
        geometry.hidden_size,
        split="vocabulary",
    )
    yield table
    if not geometry.tied_embeddings and not geometry.is_pooling:
        yield replace(table, name="lm_head")
    yield _vector("norm", "norms", geometry.hidden_size)
    width = geometry.per_layer_input_size * len(geometry.layers)
    if not width:
        return
    yield Parameter(
        "embed_tokens_per_layer",
        "embeddings",
        (geometry.per_layer_vocab_size,),
        width,
        split="vocabulary",
    )
    yield Parameter(
        "per_layer_model_projection",
        "per_layer_inputs",
        (width,),
        geometry.hidden_size,
        split="rows",
        quantizable=True,
    )
    yield _vector("per_layer_projection_norm", "norms", geometry.per_layer_input_size)


def _layers(geometry: Geometry, rules: AllocationRules) -> Iterator[Parameter]:
    for layer, count in Counter(geometry.layers).items():
        for parameter in _layer(geometry, layer, rules):
            yield replace(parameter, count=parameter.count * count)
    if geometry.altup_inputs:
        for name in ("altup_projections", "altup_unembed_projections"):
            yield Parameter(
                name,
                "altup",
                (geometry.hidden_size,),
                geometry.hidden_size,
                geometry.altup_inputs - 1,
                split="rows",
                quantizable=True,
            )


def _layer(geometry: Geometry, layer: Layer, rules: AllocationRules) -> Iterator[Parameter]:
    family = _family(geometry)
    yield from _attention(geometry, layer.attention, family, rules)
    yield from _mlp(geometry.hidden_size, layer.intermediate_size)
    yield _vector("layernorm", "norms", geometry.hidden_size, family.layer_norms)
    if layer.experts:
        yield from _experts(geometry.hidden_size, layer.experts)
    if geometry.per_layer_input_size:
        yield from _per_layer_inputs(geometry.hidden_size, geometry.per_layer_input_size)
    if geometry.altup_inputs:
        yield from _altup(geometry.hidden_size, geometry.altup_inputs)
        yield from _laurel(geometry.hidden_size, geometry.laurel_rank)
    if family.layer_scalar:
        yield _scalars("layer_scalar", 1)


def _attention(
    geometry: Geometry, attention: Attention, family: _Family, rules: AllocationRules
) -> Iterator[Parameter]:
    head = attention.head_size
    holds_kv = not attention.shares_kv or rules.shared_layers_hold_kv
    heads: tuple[int, ...] = (attention.query_heads,)
    if holds_kv:
        heads = (attention.query_heads, attention.kv_heads, attention.kv_heads)
    hidden = geometry.hidden_size
    name = "qkv_proj" if holds_kv else "q_proj"
    yield Parameter(name, "attention", heads, hidden, unit=head, split="rows", quantizable=True)
    width = attention.query_heads * head
    yield Parameter("o_proj", "attention", (hidden,), width, split="columns", quantizable=True)
    if geometry.attention_bias:
        yield Parameter(f"{name}.bias", "attention", heads, unit=head, split="rows")
        yield _vector("o_proj.bias", "attention", hidden)
    if family.query_key_norms:
        yield _vector("q_norm, k_norm", "norms", head, 2 if holds_kv else 1)
    if family.value_norm and holds_kv:
        yield _vector("v_norm", "constants", head)
    yield _scalars("attention scales", _ATTENTION_SCALES, FLOAT32_BYTES)
    if rules.scale_ranges:
        ranges = _scalars("attention scale ranges", rules.scale_ranges, FLOAT32_BYTES)
        yield replace(ranges, group="constants")


def _mlp(hidden: int, intermediate: int) -> Iterator[Parameter]:
    pair = (intermediate, intermediate)
    yield Parameter("gate_up_proj", "mlp", pair, hidden, split="rows", quantizable=True)
    yield Parameter("down_proj", "mlp", (hidden,), intermediate, split="columns", quantizable=True)


def _experts(hidden: int, experts: Experts) -> Iterator[Parameter]:
    width, count = experts.intermediate_size, experts.count
    pair = (width, width)
    yield Parameter("w13_weight", "experts", pair, hidden, count, split="rows", quantizable=True)
    yield Parameter(
        "w2_weight", "experts", (hidden,), width, count, split="columns", quantizable=True
    )
    yield Parameter("router.proj", "experts", (count,), hidden)
    yield _vector("router.scale", "experts", hidden)
    yield _vector("router.per_expert_scale", "experts", count)
    yield _vector("experts' layernorm", "norms", hidden, 3)
    yield _scalars("router.root_size", 1)
    yield _vector("router.norm", "constants", hidden)


def _per_layer_inputs(hidden: int, width: int) -> Iterator[Parameter]:
    group: Group = "per_layer_inputs"
    yield Parameter("per_layer_input_gate", group, (width,), hidden, quantizable=True)
    yield Parameter("per_layer_projection", group, (hidden,), width, quantizable=True)
    yield _vector("post_per_layer_input_norm", "norms", hidden)


def _altup(hidden: int, inputs: int) -> Iterator[Parameter]:
    yield Parameter("correction_coefs", "altup", (inputs,), inputs, quantizable=True)
    yield Parameter("prediction_coefs", "altup", (inputs**2,), inputs, quantizable=True)
    yield Parameter("modality_router", "altup", (inputs,), hidden, quantizable=True)
    yield _vector("router_norm", "norms", hidden)
    yield replace(_vector("correct_output_scale", "altup", hidden), bytes_per_element=FLOAT32_BYTES)
    yield _scalars("router_input_scale", 1)


def _laurel(hidden: int, rank: int) -> Iterator[Parameter]:
    yield Parameter("linear_left", "altup", (rank,), hidden, split="rows", quantizable=True)
    yield Parameter("linear_right", "altup", (hidden,), rank, split="columns", quantizable=True)
    yield _vector("post_laurel_norm", "norms", hidden)


def _model_buffers(geometry: Geometry) -> Iterator[Parameter]:
    """The scale of the embeddings, and with per-layer inputs three more."""
    yield _scalars("embedding scales", 4 if geometry.per_layer_input_size else 1)


def _ropes(geometry: Geometry) -> Iterator[Parameter]:
    if not _family(geometry).rope_tables:
        head = geometry.largest_head_size
        yield Parameter("inv_freq", "rope", (head,), bytes_per_element=FLOAT32_BYTES)
        return
    for rope in geometry.ropes:
        yield Parameter("cos_sin_cache", "rope", (rope.positions,), rope.rotary_size)


def _staging(geometry: Geometry, max_num_batched_tokens: int) -> Iterator[Parameter]:
    width = geometry.per_layer_input_size * len(geometry.layers)
    if width and geometry.model_type in _STAGES_PER_LAYER_INPUTS:
        yield Parameter("per_layer_embeddings", "staging", (max_num_batched_tokens,), width)
