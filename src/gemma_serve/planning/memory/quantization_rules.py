"""Whether vLLM takes a quantization method on a GPU, and beside what a checkpoint stores.

What stands here is the same in vLLM 0.26 to 0.33.
"""

from __future__ import annotations

# get_min_capability of vLLM's quantization methods, and what online/fp8.py (PTPC needs kernels
# that Ada brought) and online/nvfp4.py raise beside it.
_LEAST_CAPABILITY = {
    "fp8": (7, 5),
    "fp8_per_tensor": (7, 5),
    "fp8_per_block": (7, 5),
    "fp8_per_channel": (8, 9),
    "mxfp4": (8, 0),
    "mxfp8": (7, 5),
    "int8_per_channel_weight_only": (7, 5),
    "compressed-tensors": (7, 0),
}
_BLACKWELL_ONLY = frozenset({"nvfp4_per_token"})

# Names of which vLLM takes one for another (config/model.py, the list of overrides).
_SAME_FAMILY = (
    frozenset({"gptq", "gptq_marlin", "auto_gptq", "moe_wna16", "humming"}),
    frozenset({"awq", "awq_marlin", "auto_awq", "moe_wna16", "humming"}),
)


def quantization_refusal(method: str, capability: tuple[int, int] | None) -> str | None:
    """Why vLLM refuses weights quantized this way on a GPU; None if it doesn't.

    `capability` is the GPU's compute capability, like (9, 0); of the CPU build, None, nothing is
    known here.
    """
    if capability is None:
        return None
    has = f"compute capability {capability[0]}.{capability[1]}"
    if method in _BLACKWELL_ONLY and capability[0] != 10:
        return f"`{method}` runs on compute capability 10.x (B200) only, and the GPU has {has}"
    least = _LEAST_CAPABILITY.get(method)
    if least is None or capability >= least:
        return None
    return f"`{method}` wants compute capability {least[0]}.{least[1]}, and the GPU has {has}"


def quantization_conflict(wanted: str, stored: str | None) -> str | None:
    """Why vLLM refuses `--quantization wanted` for a checkpoint that stores another method.

    `stored` is the `quant_method` of the checkpoint's quantization_config; None if it has none.
    """
    if stored is None or wanted == stored:
        return None
    if any(wanted in family and stored in family for family in _SAME_FAMILY):
        return None
    return f"the checkpoint comes quantized with `{stored}`, so it can't be loaded as `{wanted}`"
