"""How many bytes a matrix takes once quantized.

Source: vLLM's layers/quantization/online/ for what is quantized while it loads, and
layers/quantization/compressed_tensors/ and fp8.py for checkpoints that come quantized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from gemma_serve.planning.model.geometry import Parameter

Scales = Literal["tensor", "channel", "block", "group"]

_SIDE_OF_BLOCK = 128


@dataclass(frozen=True)
class QuantizationScheme:
    """How matrices are stored: `bits` for each element, and their scales.

    Scales are one for all, one per row (`channel`), per 128 x 128 block, or per `group_size`
    elements of a row (the whole row where it is 0); `scale_bytes` each, None for the model's own
    dtype. `zero_points` have `bits` each beside them. `extra_bytes` come with every matrix.
    `linear` and `experts` say which matrices are meant, `towers` whether those outside of the
    language model are among them, and `patch_embedder` the one of Gemma 4 Unified.
    """

    bits: int
    scales: Scales
    scale_bytes: int | None = 4
    group_size: int = 0
    zero_points: bool = False
    extra_bytes: int = 0
    linear: bool = True
    experts: bool = True
    towers: bool = True
    patch_embedder: bool = True

    def takes(self, parameter: Parameter) -> bool:
        """Whether this matrix is quantized."""
        if parameter.group == "towers":
            taken = self.patch_embedder if parameter.name == "patch_dense" else self.towers
            return parameter.quantizable and taken
        wanted = self.experts if parameter.group == "experts" else self.linear
        return parameter.quantizable and wanted

    def rank_bytes(self, parameter: Parameter, tensor_parallel_size: int, dtype_bytes: int) -> int:
        """What one GPU holds of a matrix that is quantized."""
        rows = parameter.rank_rows(tensor_parallel_size)
        scales = self._count_scales(rows, parameter.rank_columns(tensor_parallel_size))
        each = self.matrix_bytes(parameter, tensor_parallel_size)
        each += scales * (self.scale_bytes or dtype_bytes) + self.extra_bytes
        if self.zero_points:
            each += -(-rows * self.bits // 32) * 4 * (scales // rows)
        return each * parameter.count

    def matrix_bytes(self, parameter: Parameter, tensor_parallel_size: int) -> int:
        """One of the matrices on one GPU, without its scales, which are tensors of their own."""
        columns = parameter.rank_columns(tensor_parallel_size)
        row_bytes = -(-columns * self.bits // 8)
        if self.bits < 8:
            # Packed into whole int32.
            row_bytes = -(-columns * self.bits // 32) * 4
        return parameter.rank_rows(tensor_parallel_size) * row_bytes

    def _count_scales(self, rows: int, columns: int) -> int:
        if self.scales == "tensor":
            return 1
        if self.scales == "channel":
            return rows
        if self.scales == "block":
            return -(-rows // _SIDE_OF_BLOCK) * -(-columns // _SIDE_OF_BLOCK)
        return rows * -(-columns // self.group_size) if self.group_size else rows


# What vLLM quantizes while it loads, by the name that `--quantization` takes.
ONLINE_SCHEMES: Mapping[str, QuantizationScheme] = {
    "fp8": QuantizationScheme(8, "tensor"),
    "fp8_per_tensor": QuantizationScheme(8, "tensor"),
    "fp8_per_channel": QuantizationScheme(8, "channel"),
    "fp8_per_block": QuantizationScheme(8, "block"),
    "mxfp8": QuantizationScheme(8, "group", scale_bytes=1, group_size=32),
    "mxfp4": QuantizationScheme(4, "group", scale_bytes=1, group_size=32),
    "int8_per_channel_weight_only": QuantizationScheme(8, "channel", linear=False),
    "experts_int8": QuantizationScheme(8, "channel", linear=False),
    "nvfp4_per_token": QuantizationScheme(
        4, "group", scale_bytes=1, group_size=16, extra_bytes=4, linear=False
    ),
}

# Parts of a model beside its language model, as `ignore` lists name them.
_TOWER_NAMES = re.compile(
    r"vision|audio|siglip|multi_modal_projector|multimodal|embed_(vision|audio)"
)
# vLLM builds these without quantization whatever the list says.
_NEVER_QUANTIZED = re.compile(r"lm_head|router")
_PATCH_EMBEDDER_NAMES = re.compile(r"vision_embedder|(?<!embed_)vision\W*$")


def checkpoint_scheme(quantization: Mapping[str, Any]) -> QuantizationScheme | None:
    """The scheme of config.json's `quantization_config`; None where it can't be told for sure.

    Sure are compressed-tensors with one group for all linear layers, in fp8 or packed integers,
    and plain fp8. Everything else (GPTQ, AWQ, lists of exceptions) is known from the headers only.
    """
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        scheme, key = _compressed_tensors(quantization), "ignore"
    elif method == "fp8":
        scheme, key = _fp8(quantization), "modules_to_not_convert"
    else:
        return None
    ignored = quantization.get(key) or quantization.get("ignored_layers") or ()
    if scheme is None or not isinstance(ignored, list | tuple):
        return None
    names = [str(name) for name in ignored if not _NEVER_QUANTIZED.search(str(name))]
    if not all(_TOWER_NAMES.search(name) for name in names):
        # Single layers of the language model stay as they are.
        return None
    return replace(
        scheme,
        towers=not names,
        patch_embedder=not any(_PATCH_EMBEDDER_NAMES.search(name) for name in names),
    )


def _compressed_tensors(quantization: Mapping[str, Any]) -> QuantizationScheme | None:
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        return None
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or group.get("targets") != ["Linear"]:
        return None
    kind = quantization.get("format") or group.get("format")
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    if kind == "pack-quantized" and bits in (4, 8) and weights.get("type") == "int":
        return _packed(weights, int(bits))
    dynamic = group.get("input_activations")
    if kind == "float-quantized" and bits == 8 and strategy in ("tensor", "channel"):
        static = isinstance(dynamic, Mapping) and dynamic.get("dynamic") is False
        return QuantizationScheme(8, strategy, extra_bytes=4 * static)
    return None


def _packed(weights: Mapping[str, Any], bits: int) -> QuantizationScheme | None:
    group_size, strategy = weights.get("group_size"), weights.get("strategy")
    grouped = strategy == "group" and isinstance(group_size, int) and group_size > 0
    if not grouped and strategy != "channel":
        return None
    return QuantizationScheme(
        bits,
        "group",
        scale_bytes=None,
        group_size=group_size if grouped and isinstance(group_size, int) else 0,
        zero_points=weights.get("symmetric") is False,
        # The matrix's own shape is kept beside it, as two int64.
        extra_bytes=16,
    )


def _fp8(quantization: Mapping[str, Any]) -> QuantizationScheme | None:
    if quantization.get("weight_block_size") == [_SIDE_OF_BLOCK, _SIDE_OF_BLOCK]:
        return QuantizationScheme(8, "block")
    if quantization.get("weight_block_size") is not None:
        return None
    static = quantization.get("activation_scheme") == "static"
    return QuantizationScheme(8, "tensor", extra_bytes=4 * static)
