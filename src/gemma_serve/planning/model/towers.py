"""The encoders of images and sound that a Gemma may have, tensor by tensor as vLLM allocates them.

Source: vLLM's model_executor/models/siglip.py, gemma3_mm.py, paligemma.py, gemma3n_mm.py,
gemma4_mm.py and gemma4_unified.py, and transformers' modelling of Gemma 3n's and Gemma 4's towers,
which vLLM uses as they are: these are whole on every GPU, while SigLIP is split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from gemma_serve.planning.model.geometry import Parameter

_FLOAT32_BYTES = 4
_INT64_BYTES = 8
_BOOL_BYTES = 1

# MobileNet V5 (300M), as the timm library builds its encoder.
MOBILENET_V5_PARAMETERS = 294_126_912

# vLLM's kernels want the sizes of quantized matrices to be multiples of this (gemma4_mm.py).
_QUANTIZATION_ALIGNMENT = 64


@dataclass(frozen=True)
class EncoderSizes:
    """The sizes that every transformer encoder has."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    head_size: int
    kv_heads: int


def count_weights(contents: Iterable[Parameter]) -> int:
    """How many weights a tower has, without its buffers and constants."""
    return sum(parameter.rank_elements(1) for parameter in contents if parameter.group == "towers")


def matrix(name: str, rows: int, columns: int, count: int = 1) -> Parameter:
    """Weights that every GPU holds whole."""
    return Parameter(name, "towers", (rows,), columns, count)


def vector(name: str, size: int, count: int = 1) -> Parameter:
    """A norm, a bias or the like."""
    return Parameter(name, "towers", (size,), count=count)


def buffer(name: str, size: int, count: int = 1, *, bytes_each: int | None = None) -> Parameter:
    """Values that are no weights of the checkpoint's."""
    return Parameter(name, "buffers", (size,), count=count, bytes_per_element=bytes_each)


def constant(name: str, size: int) -> Parameter:
    """The ones of a norm without weights."""
    return Parameter(name, "constants", (size,))


def siglip(sizes: EncoderSizes, *, channels: int, patch: int, positions: int) -> list[Parameter]:
    """SigLIP's vision transformer, without the pooling head that no Gemma uses."""
    hidden, inner, n = sizes.hidden_size, sizes.intermediate_size, sizes.layers
    heads = (sizes.heads,) * 3
    qkv = Parameter("qkv_proj", "towers", heads, hidden, n, sizes.head_size, "rows")
    out = Parameter("out_proj", "towers", (hidden,), hidden, n, split="columns")
    up = Parameter("fc1", "towers", (inner,), hidden, n, split="rows")
    down = Parameter("fc2", "towers", (hidden,), inner, n, split="columns")
    return [
        matrix("patch_embedding", hidden, channels * patch**2),
        vector("patch_embedding.bias", hidden),
        matrix("position_embedding", positions, hidden),
        buffer("position_ids", positions, bytes_each=_INT64_BYTES),
        *(replace(linear, quantizable=True) for linear in (qkv, out, up, down)),
        replace(qkv, name="qkv_proj.bias", columns=1),
        vector("out_proj.bias", hidden, n),
        replace(up, name="fc1.bias", columns=1),
        vector("fc2.bias", hidden, n),
        vector("layer_norm", hidden, 4 * n),
        vector("post_layernorm", hidden, 2),
    ]


def gemma3_projector(vision_size: int, text_size: int) -> list[Parameter]:
    """Gemma 3's way from SigLIP into the language model."""
    return [
        matrix("mm_input_projection_weight", vision_size, text_size),
        vector("mm_soft_emb_norm", vision_size),
    ]


def paligemma_projector(vision_size: int, projection_size: int) -> list[Parameter]:
    """PaliGemma's way from SigLIP into the language model."""
    return [
        matrix("linear", projection_size, vision_size),
        vector("linear.bias", projection_size),
    ]


def mobilenet_v5() -> list[Parameter]:
    """Gemma 3n's vision encoder, which comes in one size."""
    return [vector("timm_model", MOBILENET_V5_PARAMETERS)]


def gemma3n_embedder(tower_size: int, vocab_size: int, text_size: int) -> list[Parameter]:
    """Gemma 3n's way from a tower into the language model."""
    table = Parameter("embedding", "towers", (vocab_size,), tower_size, split="vocabulary")
    projection = Parameter(
        "embedding_projection", "towers", (text_size,), tower_size, split="columns"
    )
    return [
        table,
        vector("embedding norms", tower_size, 2),
        projection,
        constant("embedding_post_projection_norm", text_size),
    ]


@dataclass(frozen=True)
class Gemma3nAudioSizes:
    """The sizes of Gemma 3n's audio encoder. `context` is what one chunk of frames sees."""

    hidden_size: int
    layers: int
    heads: int
    channels: tuple[int, int]
    kernels: tuple[tuple[int, int], tuple[int, int]]
    frequencies: int
    conv_kernel: int
    chunk: int
    context: int


def gemma3n_audio(sizes: Gemma3nAudioSizes) -> list[Parameter]:
    """Gemma 3n's audio encoder (a conformer). `frequencies` is what the convolutions leave."""
    hidden, n = sizes.hidden_size, sizes.layers
    first, second = sizes.channels
    (height_0, width_0), (height_1, width_1) = sizes.kernels
    return [
        matrix("conv_0", first, height_0 * width_0),
        matrix("conv_1", second, first * height_1 * width_1),
        vector("conv norms", first + second),
        matrix("input_proj_linear", hidden, second * sizes.frequencies),
        matrix("ffw_layer_1, ffw_layer_2", 4 * hidden, hidden, 4 * n),
        matrix("q, k, v, post, pos_proj", hidden, hidden, 5 * n),
        vector("per_dim_scale", hidden // sizes.heads, n),
        matrix("linear_start", 2 * hidden, hidden, n),
        matrix("linear_end", hidden, hidden, n),
        matrix("depthwise_conv1d", hidden, sizes.conv_kernel, n),
        # Two of each feed-forward, two of the attention, two of the convolution, one at the end.
        vector("norm", hidden, 9 * n),
        buffer("gradient_clipping, q_scale", 1, 6 * n),
        buffer("softcap", 1, n, bytes_each=_FLOAT32_BYTES),
        buffer("inv_timescales", hidden // 2, n, bytes_each=_FLOAT32_BYTES),
        buffer("local_causal_valid_mask", sizes.chunk * sizes.context, n, bytes_each=_BOOL_BYTES),
    ]


def gemma4_quantizes_towers(sizes: EncoderSizes) -> bool:
    """Whether vLLM quantizes Gemma 4's towers, which all follow the vision tower."""
    sides = (sizes.hidden_size, sizes.intermediate_size)
    return all(size % _QUANTIZATION_ALIGNMENT == 0 for size in sides)


def gemma4_vision(
    sizes: EncoderSizes, *, patch: int, positions: int, clipped: bool, standardize: bool
) -> list[Parameter]:
    """Gemma 4's vision transformer; with `clipped` linear layers each keeps four bounds."""
    hidden, inner, n = sizes.hidden_size, sizes.intermediate_size, sizes.layers
    query, keys = sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size
    contents = [
        matrix("position_embedding_table", positions, hidden, 2),
        matrix("input_proj", hidden, 3 * patch**2),
        matrix("q_proj", query, hidden, n),
        matrix("k_proj, v_proj", keys, hidden, 2 * n),
        matrix("o_proj", hidden, query, n),
        matrix("gate_proj, up_proj", inner, hidden, 2 * n),
        matrix("down_proj", hidden, inner, n),
        vector("q_norm, k_norm", sizes.head_size, 2 * n),
        vector("layernorm", hidden, 4 * n),
        # Two copies of the frequencies, for a quarter of the head each.
        buffer("inv_freq", sizes.head_size // 4, 2, bytes_each=_FLOAT32_BYTES),
    ]
    if clipped:
        contents.append(buffer("bounds", 4, 7 * n))
    if standardize:
        contents.append(buffer("std_bias, std_scale", hidden, 2))
    return _quantizable(contents, gemma4_quantizes_towers(sizes))


def gemma4_audio(
    sizes: EncoderSizes,
    *,
    channels: tuple[int, int],
    conv_kernel: int,
    output_size: int,
    clipped: bool,
    quantizable: bool,
) -> list[Parameter]:
    """Gemma 4's audio encoder (a conformer)."""
    hidden, n = sizes.hidden_size, sizes.layers
    first, second = channels
    contents = [
        matrix("layer0.conv", first, 9),
        matrix("layer1.conv", second, 9 * first),
        vector("conv norms", first + second),
        matrix("input_proj_linear", hidden, first // 4 * second),
        matrix("ffw_layer_1, ffw_layer_2", 4 * hidden, hidden, 4 * n),
        matrix("q, k, v, post, relative_k_proj", hidden, hidden, 5 * n),
        vector("per_dim_scale", hidden // sizes.heads, n),
        matrix("linear_start", 2 * hidden, hidden, n),
        matrix("linear_end", hidden, hidden, n),
        matrix("depthwise_conv1d", hidden, conv_kernel, n),
        vector("norm", hidden, 9 * n),
        matrix("output_proj", output_size, hidden),
        vector("output_proj.bias", output_size),
        buffer("inv_timescales", hidden // 2),
        buffer("softcap", 1, n),
    ]
    if clipped:
        contents.append(buffer("bounds", 4, 10 * n))
    return _quantizable(contents, quantizable)


def gemma4_embedder(tower_size: int, text_size: int, *, quantizable: bool) -> list[Parameter]:
    """Gemma 4's way from a tower into the language model."""
    return [
        replace(matrix("embedding_projection", text_size, tower_size), quantizable=quantizable),
        constant("embedding_pre_projection_norm", tower_size),
    ]


def unified_vision_embedder(patch_side: int, positions: int, size: int) -> list[Parameter]:
    """Gemma 4 Unified's way from the pixels of a patch, without an encoder."""
    pixels = 3 * patch_side**2
    dense = Parameter("patch_dense", "towers", (size,), pixels, split="rows", quantizable=True)
    return [
        vector("patch_ln1", pixels, 2),
        dense,
        replace(dense, name="patch_dense.bias", columns=1, quantizable=False),
        vector("patch_ln2, pos_norm", size, 4),
        matrix("pos_embedding", positions, size, 2),
    ]


def _quantizable(contents: list[Parameter], quantizable: bool) -> list[Parameter]:
    return list(_mark(contents)) if quantizable else contents


# What is no linear layer, though it is a matrix.
_NO_LINEAR = ("position_embedding_table", "layer0.conv", "layer1.conv", "depthwise_conv1d")


def _mark(contents: list[Parameter]) -> Iterator[Parameter]:
    for parameter in contents:
        linear = parameter.columns > 1 and parameter.name not in _NO_LINEAR
        yield replace(parameter, quantizable=linear) if linear else parameter
