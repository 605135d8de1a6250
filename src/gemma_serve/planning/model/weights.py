"""What vLLM allocates for a model's weights on each GPU, in bytes.

Two ways lead there: from the geometry alone, and from the headers of the weight files. A test
holds them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_serve.planning.model.geometry import Geometry, Group, Parameter
from gemma_serve.planning.model.header_weights import HeaderTensor, headers_by_group, unknown_bytes
from gemma_serve.planning.model.parameters import NEWEST_RELEASE, allocation_rules, text_parameters
from gemma_serve.planning.model.quantized_weights import (
    ONLINE_SCHEMES,
    QuantizationScheme,
    checkpoint_scheme,
)
from gemma_serve.planning.model.torch_allocator import allocated_bytes

DTYPE_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}

__all__ = [
    "HeaderTensor",
    "ModelWeights",
    "model_weights",
    "weights_bytes",
    "weights_from_headers",
]

_FLOAT32_BYTES = 4
_EMBEDDINGS: frozenset[Group] = frozenset({"embeddings"})
_OTHER: frozenset[Group] = frozenset({"buffers", "constants"})


@dataclass(frozen=True)
class ModelWeights:
    """What one GPU holds of a model once it is loaded, in bytes; the parts add up to the total.

    `text_bytes` are the layers of the language model, `rope_bytes` its tables of positions,
    `buffers_bytes` scales and other constants, `staging_bytes` what is set aside for the per-layer
    inputs of a batch. `approximate` marks a figure from headers of a model that we don't know.
    `rounding_bytes` is what torch's allocator takes on a GPU beyond the tensors themselves: no part
    of the total, but of vLLM's "Model loading took".
    """

    text_bytes: int
    embeddings_bytes: int = 0
    rope_bytes: int = 0
    towers_bytes: int = 0
    buffers_bytes: int = 0
    staging_bytes: int = 0
    approximate: bool = False
    rounding_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All tensors of the model."""
        return (
            self.text_bytes
            + self.embeddings_bytes
            + self.rope_bytes
            + self.towers_bytes
            + self.buffers_bytes
            + self.staging_bytes
        )


def model_weights(
    geometry: Geometry | None,
    tensors: Sequence[HeaderTensor] = (),
    *,
    dtype: str,
    quantization: str | None = None,
    quantization_config: Mapping[str, Any] | None = None,
    tensor_parallel_size: int = 1,
    max_num_batched_tokens: int = 0,
    language_model_only: bool = False,
    release: tuple[int, int] = NEWEST_RELEASE,
) -> ModelWeights | None:
    """The best figure that can be had: from the geometry, else from the headers.

    Checkpoints that come quantized are read from their headers first. None where neither tells.
    Arguments as for `weights_bytes` and `weights_from_headers`.
    """
    by_headers = None
    if tensors and (geometry is None or quantization_config is not None):
        by_headers = weights_from_headers(
            tensors,
            geometry,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
            max_num_batched_tokens=max_num_batched_tokens,
            language_model_only=language_model_only,
            release=release,
        )
    if by_headers or geometry is None:
        return by_headers
    return weights_bytes(
        geometry,
        dtype=dtype,
        quantization=quantization,
        quantization_config=quantization_config,
        tensor_parallel_size=tensor_parallel_size,
        max_num_batched_tokens=max_num_batched_tokens,
        language_model_only=language_model_only,
        release=release,
    )


def weights_bytes(
    geometry: Geometry,
    *,
    dtype: str,
    quantization: str | None = None,
    quantization_config: Mapping[str, Any] | None = None,
    tensor_parallel_size: int = 1,
    max_num_batched_tokens: int = 0,
    language_model_only: bool = False,
    release: tuple[int, int] = NEWEST_RELEASE,
) -> ModelWeights | None:
    """What vLLM allocates, from the geometry alone; None where a quantization leaves it open.

    Args:
        dtype: the model's, with "auto" resolved.
        quantization: what vLLM is told to quantize while it loads, as `--quantization` has it.
        quantization_config: the part of that name of config.json, for a checkpoint that comes
            quantized.
        max_num_batched_tokens: sizes the staging area of models with per-layer inputs.
        release: of vLLM, like (0, 32).
    """
    scheme: QuantizationScheme | None = None
    if quantization_config is not None:
        scheme = checkpoint_scheme(quantization_config)
    elif quantization is not None:
        scheme = ONLINE_SCHEMES.get(quantization)
    if scheme is None and (quantization or quantization_config is not None):
        return None
    parts: dict[str, int] = {}
    rounding = 0
    for place, parameter in _placed(
        geometry, release, max_num_batched_tokens, language_model_only=language_model_only
    ):
        size = _rank_bytes(parameter, tensor_parallel_size, DTYPE_BYTES[dtype], scheme)
        parts[place] = parts.get(place, 0) + size
        rounding += _rounding_bytes(parameter, tensor_parallel_size, DTYPE_BYTES[dtype], scheme)
    sentence = geometry.sentence_parameters * _FLOAT32_BYTES
    return _model_weights(parts, text_bytes=sentence, rounding_bytes=rounding)


def weights_from_headers(
    tensors: Iterable[HeaderTensor],
    geometry: Geometry | None,
    *,
    dtype: str,
    tensor_parallel_size: int = 1,
    max_num_batched_tokens: int = 0,
    language_model_only: bool = False,
    release: tuple[int, int] = NEWEST_RELEASE,
) -> ModelWeights:
    """What vLLM allocates for the tensors of a checkpoint, and beside them.

    Without a geometry only the tensors are counted, as if every GPU took an equal share.
    Arguments as for `weights_bytes`.
    """
    dtype_bytes, tensors = DTYPE_BYTES[dtype], tuple(tensors)
    if geometry is None:
        total = unknown_bytes(tensors, dtype_bytes)
        return ModelWeights(-(-total // tensor_parallel_size), approximate=True)
    parts = headers_by_group(
        tensors,
        geometry,
        dtype_bytes=dtype_bytes,
        tensor_parallel_size=tensor_parallel_size,
        language_model_only=language_model_only,
        shared_layers_hold_kv=allocation_rules(release).shared_layers_hold_kv,
    )
    rounding, is_plain = 0, all(tensor.is_plain for tensor in tensors)
    for place, parameter in _placed(
        geometry, release, max_num_batched_tokens, language_model_only=language_model_only
    ):
        if parameter.group in ("rope", "buffers", "constants", "staging"):
            size = _rank_bytes(parameter, tensor_parallel_size, dtype_bytes, None)
            parts[place] = parts.get(place, 0) + size
        if is_plain:  # how others are put together as they are loaded isn't known
            rounding += _rounding_bytes(parameter, tensor_parallel_size, dtype_bytes, None)
    return _model_weights(parts, rounding_bytes=rounding)


def _placed(
    geometry: Geometry,
    release: tuple[int, int],
    max_num_batched_tokens: int,
    *,
    language_model_only: bool,
) -> list[tuple[str, Parameter]]:
    """Every tensor that is built, with the part of `ModelWeights` that it counts for."""
    rules = allocation_rules(release)
    text = text_parameters(geometry, rules, max_num_batched_tokens=max_num_batched_tokens)
    towers = (
        parameter
        for tower in geometry.towers
        if not (language_model_only and tower.optional)
        for parameter in tower.contents
    )
    return [(_place(parameter.group), parameter) for parameter in (*text, *towers)]


def _place(group: Group) -> str:
    if group in _EMBEDDINGS:
        return "embeddings"
    if group in _OTHER:
        return "buffers"
    return group if group in ("rope", "towers", "staging") else "text"


def _rank_bytes(
    parameter: Parameter,
    tensor_parallel_size: int,
    dtype_bytes: int,
    scheme: QuantizationScheme | None,
) -> int:
    if scheme is not None and scheme.takes(parameter):
        return scheme.rank_bytes(parameter, tensor_parallel_size, dtype_bytes)
    size = parameter.bytes_per_element or dtype_bytes
    return parameter.rank_elements(tensor_parallel_size) * size


def _rounding_bytes(
    parameter: Parameter,
    tensor_parallel_size: int,
    dtype_bytes: int,
    scheme: QuantizationScheme | None,
) -> int:
    """What the allocator takes beyond the tensors. Scales are too small to be rounded by much."""
    each = parameter.rank_rows(tensor_parallel_size) * parameter.rank_columns(tensor_parallel_size)
    each *= parameter.bytes_per_element or dtype_bytes
    if scheme is not None and scheme.takes(parameter):
        each = scheme.matrix_bytes(parameter, tensor_parallel_size)
    return (allocated_bytes(each) - each) * parameter.count


def _model_weights(
    parts: Mapping[str, int], *, text_bytes: int = 0, rounding_bytes: int = 0
) -> ModelWeights:
    return ModelWeights(
        text_bytes=parts.get("text", 0) + text_bytes,
        embeddings_bytes=parts.get("embeddings", 0),
        rope_bytes=parts.get("rope", 0),
        towers_bytes=parts.get("towers", 0),
        buffers_bytes=parts.get("buffers", 0),
        staging_bytes=parts.get("staging", 0),
        rounding_bytes=rounding_bytes,
    )
