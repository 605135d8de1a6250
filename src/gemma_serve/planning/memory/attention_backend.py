"""Which attention backend vLLM will take, and what follows for the KV cache: block and cell sizes.

vLLM asks its backends in a fixed order and takes the first that can serve a layer; the backends of
all layers then settle on one block size. Sources: platforms/cuda.py (_get_backend_priorities,
get_valid_backends), platforms/interface.py (update_block_size_for_backend),
v1/attention/backends/*.py and, for Gemma 4's two head sizes, model_executor/models/config.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gemma_serve.planning.memory.attention_kernels import (
    DEFAULT_BLOCK_SIZE,
    DENSE,
    FP8,
    NVFP4,
    PER_TOKEN_HEAD,
    Dtype,
    KernelBlocks,
    LayerRequest,
    backend_priorities,
    backend_refusal,
    kernel_blocks,
    layer_kernel_blocks,
)
from gemma_serve.planning.memory.engine_rules import EngineRules
from gemma_serve.planning.model.geometry import Geometry

CPU_BLOCK_SIZE = 128

_BFLOAT16_SINCE, _FP8_SINCE = (8, 0), (8, 9)
_DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class AttentionPlan:
    """The attention backends of a model on one device, and the KV cache blocks they lead to.

    `backends` are vLLM's names, one for each kind of layer. `block_size` is the cache's block in
    tokens, before page sizes are made equal; `sliding_block_sizes` the block of a sliding-window
    layer by its head size. `unsupported` is a sentence where no backend can serve the model this
    way (or the planner doesn't know the size of the KV dtype); the sizes then mean nothing.
    """

    device: Literal["cuda", "cpu"]
    backends: tuple[str, ...]
    block_size: int
    sliding_block_sizes: tuple[tuple[int, int], ...]
    kv_cache_dtype: str
    dtype: Dtype
    reason: str
    unsupported: str | None = None

    def sliding_block_size(self, head_size: int) -> int:
        """The block of a sliding-window layer with this head size, in tokens."""
        return dict(self.sliding_block_sizes)[head_size]


def choose_attention(
    geometry: Geometry,
    *,
    rules: EngineRules,
    capability: tuple[int, int] | None,
    dtype: Dtype,
    kv_cache_dtype: str = "auto",
    checkpoint_kv_is_fp8: bool = False,
    block_size: int | None = None,
    attention_backend: str | None = None,
    text_only: bool = False,
) -> AttentionPlan:
    """The backends and block sizes that vLLM will take for a model.

    `capability` is the GPU's compute capability, like (9, 0); None plans for the CPU build.
    `block_size` and `attention_backend` are what the user fixed with `--block-size` and
    `--attention-backend`. `checkpoint_kv_is_fp8`: the checkpoint's quantization_config has a
    kv_cache_scheme, which turns `auto` into `fp8`. `text_only` is `--language-model-only`.
    """
    if checkpoint_kv_is_fp8 and kv_cache_dtype == "auto":
        kv_cache_dtype = "fp8"
    if capability is None:
        return _on_cpu(geometry, rules, dtype, kv_cache_dtype, block_size)
    mm_prefix = geometry.attends_both_ways_to_images and not (
        text_only and rules.text_only_clears_mm_prefix
    )
    forced_backend, forced_version = _gemma4_choice(
        geometry, rules, capability, kv_cache_dtype, attention_backend
    )
    request = LayerRequest(
        rules=rules,
        capability=capability,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        block_size=block_size,
        softcaps=geometry.softcaps_attention,
        mm_prefix=mm_prefix,
        largest_head_size=geometry.largest_head_size,
        grouped_queries=_grouped_queries(geometry),
        forced_flash_version=forced_version,
    )
    return _on_cuda(geometry, request, forced_backend)


def start_refusal(attention: AttentionPlan, capability: tuple[int, int] | None) -> str | None:
    """What the chosen backend refuses once the engine starts, though vLLM has chosen it.

    Source: v1/attention/backends/triton_attn.py, TritonAttentionImpl.__init__.
    """
    uses_triton = any(name.startswith("TRITON") for name in attention.backends)
    if capability is None or not uses_triton:
        return None
    gpu = f"compute capability {capability[0]}.{capability[1]}"
    if attention.kv_cache_dtype.startswith("fp8") and capability < _FP8_SINCE:
        return f"vLLM's Triton attention takes an fp8 KV cache from 8.9 on, and the GPU has {gpu}"
    if attention.kv_cache_dtype == "bfloat16" and capability < _BFLOAT16_SINCE:
        return f"a bfloat16 KV cache wants compute capability 8.0, and the GPU has {gpu}"
    return None


def kv_cell_bytes(
    kv_cache_dtype: str, dtype: Dtype, head_size: int, *, rules: EngineRules, sliding: bool = False
) -> int:
    """Bytes that one token takes in one KV head of one layer, keys and values together.

    No backend pads the head size. Raises KeyError for a KV dtype whose size isn't known.
    Source: v1/kv_cache_interface.py (AttentionSpec), customize_spec in
    v1/attention/backends/triton_attn.py and flashinfer.py.
    """
    if kv_cache_dtype in FP8:
        return 2 * head_size
    if kv_cache_dtype in NVFP4:  # half a byte a value and one fp8 scale for 16 values
        return 2 * (head_size // 2 + head_size // 16)
    if kv_cache_dtype in PER_TOKEN_HEAD:  # a float32 scale each for the key and the value
        halved = kv_cache_dtype == "int4_per_token_head" and not (
            sliding and rules.int4_sliding_pages_are_full
        )
        return 2 * (head_size // 2 if halved else head_size) + 2 * 4
    stored = dtype if kv_cache_dtype == "auto" else kv_cache_dtype
    return 2 * head_size * _DTYPE_BYTES[stored]


def _on_cpu(
    geometry: Geometry,
    rules: EngineRules,
    dtype: Dtype,
    kv_cache_dtype: str,
    block_size: int | None,
) -> AttentionPlan:
    kernel = KernelBlocks((rules.cpu_kernel_block_size,), any_multiple=True)
    chosen = block_size or CPU_BLOCK_SIZE
    unsupported = _unknown_kv_dtype(rules, kv_cache_dtype)
    if unsupported is None and kv_cache_dtype not in (*DENSE, *FP8):
        unsupported = f"vLLM's CPU backend has no KV cache dtype {kv_cache_dtype}"
    if unsupported is None and not kernel.holds(chosen):
        unsupported = f"on the CPU --block-size must be a multiple of {kernel.sizes[0]}"
    return AttentionPlan(
        device="cpu",
        backends=("CPU_ATTN",),
        block_size=chosen,
        sliding_block_sizes=_sliding_blocks(geometry, rules, chosen, lambda _: kernel),
        kv_cache_dtype=kv_cache_dtype,
        dtype=dtype,
        reason="--block-size" if block_size else f"the CPU backend uses blocks of {chosen}",
        unsupported=unsupported,
    )


def _on_cuda(
    geometry: Geometry, request: LayerRequest, forced_backend: str | None
) -> AttentionPlan:
    head_sizes = tuple(dict.fromkeys(layer.attention.head_size for layer in geometry.layers))
    unsupported = _unknown_kv_dtype(request.rules, request.kv_cache_dtype)
    chosen: dict[int, str] = {}
    for head_size in head_sizes:
        refusals: list[str] = []
        for name in (forced_backend,) if forced_backend else backend_priorities(request):
            if refusal := backend_refusal(name, request, head_size):
                refusals.append(f"{name}: {refusal}")
            else:
                chosen[head_size] = name
                break
        else:
            unsupported = unsupported or (
                f"no attention backend of vLLM serves a head size of {head_size} "
                f"on compute capability {request.capability[0]}.{request.capability[1]} this way "
                f"({'; '.join(refusals)})"
            )
            chosen[head_size] = "TRITON_ATTN"
    backends = tuple(dict.fromkeys(chosen.values()))
    block_size, reason = _block_size(backends, request)
    if block_size is None:
        unsupported = unsupported or f"{' and '.join(backends)} share no KV cache block size"
        block_size = DEFAULT_BLOCK_SIZE
    return AttentionPlan(
        device="cuda",
        backends=backends,
        block_size=block_size,
        sliding_block_sizes=_sliding_blocks(
            geometry,
            request.rules,
            block_size,
            lambda head_size: layer_kernel_blocks(chosen[head_size], request, head_size),
        ),
        kv_cache_dtype=request.kv_cache_dtype,
        dtype=request.dtype,
        reason=reason,
        unsupported=unsupported,
    )


def _sliding_blocks(
    geometry: Geometry, rules: EngineRules, block_size: int, kernel: Callable[[int], KernelBlocks]
) -> tuple[tuple[int, int], ...]:
    head_sizes = dict.fromkeys(
        layer.attention.head_size for layer in geometry.layers if layer.attention.window is not None
    )
    return tuple(
        (
            head_size,
            kernel(head_size).of_sliding_layer(
                block_size, follows_cache_block=rules.sliding_block_follows_cache_block
            ),
        )
        for head_size in head_sizes
    )


def _grouped_queries(geometry: Geometry) -> bool:
    return geometry.query_heads > max(layer.attention.kv_heads for layer in geometry.layers)


def _unknown_kv_dtype(rules: EngineRules, kv_cache_dtype: str) -> str | None:
    if kv_cache_dtype not in rules.kv_cache_dtypes:
        return (
            f"vLLM {rules.version} has no KV cache dtype {kv_cache_dtype}; "
            f"it has {', '.join(rules.kv_cache_dtypes)}"
        )
    if kv_cache_dtype not in (*DENSE, *FP8, *PER_TOKEN_HEAD, *NVFP4):
        return f"the planner does not know the size of the KV cache dtype {kv_cache_dtype}"
    return None


def _gemma4_choice(
    geometry: Geometry,
    rules: EngineRules,
    capability: tuple[int, int],
    kv_cache_dtype: str,
    attention_backend: str | None,
) -> tuple[str | None, int | None]:
    """The backend and the FlashAttention version that are fixed before any layer is built.

    vLLM fixes them for a Gemma 4 whose layers differ in head size.
    Source: model_executor/models/config.py, Gemma4Config.
    """
    head_sizes = {layer.attention.head_size for layer in geometry.layers}
    if not geometry.model_type.startswith("gemma4") or len(head_sizes) == 1:
        return attention_backend, None
    if not (capability[0] in (9, 10, 11) and max(head_sizes) <= 512):
        return attention_backend or "TRITON_ATTN", None
    by_layer = (
        rules.flash_attention.fp8_kv_on_hopper_head_512
        and capability[0] == 9
        and kv_cache_dtype.startswith("fp8")
    )
    if attention_backend not in (None, "FLASH_ATTN") or by_layer:
        return attention_backend, None
    return attention_backend, 4


def _block_size(backends: tuple[str, ...], request: LayerRequest) -> tuple[int | None, str]:
    """The cache's block size and why. Source: platforms/interface.py."""
    if request.block_size:
        return request.block_size, "--block-size"
    if request.rules.first_layer_decides_block_size:
        backends = backends[:1]
    kernels = [kernel_blocks(name, request) for name in backends]
    names = " and ".join(backends)
    if all(kernel.holds(DEFAULT_BLOCK_SIZE) for kernel in kernels):
        return DEFAULT_BLOCK_SIZE, f"{names} use vLLM's default"
    candidates = {math.lcm(*sizes) for sizes in itertools.product(*(k.sizes for k in kernels))}
    for candidate in sorted(candidates):
        if all(kernel.holds(candidate) for kernel in kernels):
            return candidate, f"{names} need blocks of {candidate}"
    return None, f"{names} share no block size"
