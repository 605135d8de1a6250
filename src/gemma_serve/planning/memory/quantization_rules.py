"""Whether vLLM takes a quantization method on a device, and beside what a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_serve.planning.memory.engine_rules import EngineRules

# model_executor/layers/quantization/modelopt.py: one name for several ways to store weights.
_MODELOPT_ALGORITHMS = (
    ("MXFP8", "modelopt_mxfp8"),
    ("FP4", "modelopt_fp4"),
    ("MIXED_PRECISION", "modelopt_mixed"),
)


def quantization_refusal(
    method: str,
    capability: tuple[int, int] | None,
    rules: EngineRules,
    *,
    has_experts: bool,
    while_loading: bool,
) -> str | None:
    """Why weights quantized this way don't run on a device; None if they do.

    `capability` is the GPU's compute capability, like (9, 0); None asks for the CPU build.
    `while_loading`: vLLM is to quantize the weights itself, the checkpoint doesn't store them so.
    A method that would leave a model without experts as it is counts as refused.
    """
    if method in rules.expert_quantization_methods and not has_experts:
        return f"`{method}` quantizes experts only, and the model has none"
    if capability is None:
        runs = method in rules.cpu_online_quantization_methods and not has_experts
        if runs or not while_loading:
            return None
        return f"vLLM's CPU build does not quantize weights with `{method}` while loading"
    return capability_refusal(method, capability, rules)


def capability_refusal(method: str, capability: tuple[int, int], rules: EngineRules) -> str | None:
    """Why a GPU has no kernels for weights quantized this way; None if it has."""
    has = f"the GPU has compute capability {capability[0]}.{capability[1]}"
    if method in rules.blackwell_quantization_methods and capability[0] != 10:
        return f"`{method}` runs on compute capability 10.x (B200) only, and {has}"
    least = rules.quantization_capabilities.get(method)
    if least is None or capability >= least:
        return None
    return (
        f"in vLLM {rules.version} `{method}` wants compute capability {least[0]}.{least[1]}, "
        f"and {has}"
    )


def quantization_conflict(wanted: str, stored: str | None, rules: EngineRules) -> str | None:
    """Why `--quantization wanted` can't be for a checkpoint that stores another method.

    `stored` is the `quant_method` of the checkpoint's quantization_config; None if it has none.
    Source: config/model.py, _verify_quantization.
    """
    if stored is None or wanted in (stored, "humming"):
        return None
    if wanted in rules.quantization_overrides.get(stored, ()):
        return None
    return f"the checkpoint comes quantized with `{stored}`, so it can't be loaded as `{wanted}`"


def stored_method(quantization_config: Mapping[str, Any] | None) -> str | None:
    """The method that vLLM will run a quantized checkpoint with, by its quantization_config.

    Weights in fp8 with a scale for each block count as `fp8_per_block`: they take other kernels.
    """
    config = quantization_config or {}
    method = config.get("quant_method")
    if not isinstance(method, str):
        return None
    if method == "fp8" and config.get("weight_block_size"):
        return "fp8_per_block"
    if method == "modelopt":
        nested = config.get("quantization")
        algorithm = str((nested if isinstance(nested, Mapping) else config).get("quant_algo"))
        names = (name for part, name in _MODELOPT_ALGORITHMS if part in algorithm.upper())
        return next(names, method)
    return method
