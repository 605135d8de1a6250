"""What each of vLLM's attention backends can serve, and in which blocks it reads the KV cache.

A backend is asked about one layer at a time; its answer depends on the GPU, the head size, the
dtypes and the release. Sources: platforms/cuda.py (_get_backend_priorities) and
v1/attention/backends/*.py (validate_configuration, get_supported_kernel_block_sizes).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gemma_serve.planning.memory.engine_rules import EngineRules

Dtype = Literal["bfloat16", "float16", "float32"]

DEFAULT_BLOCK_SIZE = 16
FA4_HEAD_256_BLOCK_SIZE = 128

DENSE = ("auto", "float16", "bfloat16")
FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")
PER_TOKEN_HEAD = ("int4_per_token_head", "int8_per_token_head", "fp8_per_token_head")
NVFP4 = ("nvfp4", "nvfp4_4over6")


@dataclass(frozen=True)
class KernelBlocks:
    """The block sizes that a backend's kernels read: these exactly, or any multiple of them."""

    sizes: tuple[int, ...]
    any_multiple: bool = False

    def holds(self, block_size: int) -> bool:
        """Whether a cache block of this size can be cut into kernel blocks."""
        return any(block_size % size == 0 for size in self.sizes)

    def of_sliding_layer(self, block_size: int, *, follows_cache_block: bool) -> int:
        """The block of a sliding-window layer, given the cache's block size in tokens.

        Source: model_executor/layers/attention/attention.py, _largest_kernel_block_within.
        """
        if not follows_cache_block:
            return min(self.sizes)
        sizes = self.sizes
        if self.any_multiple:
            sizes = tuple(max(size, block_size // size * size) for size in sizes)
        return max((size for size in sizes if size <= block_size), default=min(sizes))


@dataclass(frozen=True)
class LayerRequest:
    """What vLLM chooses a backend for."""

    rules: EngineRules
    capability: tuple[int, int]
    dtype: Dtype
    kv_cache_dtype: str
    block_size: int | None
    softcaps: bool
    mm_prefix: bool
    largest_head_size: int
    grouped_queries: bool
    forced_flash_version: int | None

    @property
    def kv_is_fp8(self) -> bool:
        return self.kv_cache_dtype in ("fp8", "fp8_e4m3")

    @property
    def kv_is_quantized(self) -> bool:
        return self.kv_cache_dtype not in DENSE


def backend_priorities(request: LayerRequest) -> Iterator[str]:
    """Source: platforms/cuda.py, _get_backend_priorities."""
    major, rules = request.capability[0], request.rules
    if major == 10:
        if request.mm_prefix and rules.triton_flashinfer_block_size:
            yield "TRITON_FLASHINFER"
        yield from ("FLASHINFER", "FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION")
        return
    if major == 9 and request.mm_prefix and rules.triton_flash_attn_versions:
        yield "TRITON_FLASH_ATTN"
    yield from ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION")


def backend_refusal(name: str, request: LayerRequest, head_size: int) -> str | None:
    """Why a backend can't serve a layer, as its validate_configuration says; None if it can."""
    if name == "FLASH_ATTN":
        return _flash_refusal(request, head_size, request.mm_prefix)
    if name == "FLASHINFER":
        return _flashinfer_refusal(request, head_size, request.mm_prefix)
    if name == "TRITON_ATTN":
        return _triton_refusal(request, head_size)
    if name == "FLEX_ATTENTION":
        if request.kv_is_quantized:
            return f"no KV cache dtype {request.kv_cache_dtype}"
        return _block_refusal(name, request)
    if name in ("TRITON_FLASH_ATTN", "TRITON_FLASHINFER"):
        return _composite_refusal(name, request, head_size)
    return "not an attention backend that the planner knows"


def _flash_refusal(request: LayerRequest, head_size: int, mm_prefix: bool) -> str | None:
    major, fa = request.capability[0], request.rules.flash_attention
    version = flash_attn_version(request, head_size, block_size=request.block_size)
    if major < 8:
        return "needs compute capability 8.0"
    if request.dtype == "float32":
        return "no float32"
    if head_size % 8 or head_size > (512 if major in (9, 10, 11) else 256):
        return f"no head size {head_size}"
    if request.kv_is_quantized:
        if not request.kv_is_fp8:
            return f"no KV cache dtype {request.kv_cache_dtype}"
        if mm_prefix and major == 9 and fa.fp8_kv_on_hopper_head_512:
            return "fp8 KV with images seen both ways needs Triton"
        if not _flash_takes_fp8(request, head_size, version):
            return "no fp8 KV cache here"
    if mm_prefix and (major not in (9, 10, 11) or version != 4):
        return "images seen both ways need FlashAttention 4"
    return _block_refusal("FLASH_ATTN", request)


def _flash_takes_fp8(request: LayerRequest, head_size: int, version: int) -> bool:
    """Source: v1/attention/backends/fa_utils.py, flash_attn_supports_kv_cache_dtype."""
    major, fa = request.capability[0], request.rules.flash_attention
    if major == 9:
        return version == 3 or (head_size == 512 and fa.fp8_kv_on_hopper_head_512)
    return version == 4 and major == 10 and fa.fp8_kv_on_blackwell


def flash_attn_version(
    request: LayerRequest, head_size: int, *, block_size: int | None = None
) -> int:
    """The FlashAttention that a layer runs: 2, 3 or 4; `block_size` is what the cache must have.

    Source: v1/attention/backends/fa_utils.py, get_flash_attn_version.
    """
    major = request.capability[0]
    version = request.forced_flash_version or {9: 3, 10: 4}.get(major, 2)
    if version == 3 and head_size > 256:
        return 4
    if version == 4 and major >= 10 and head_size > 128:
        return 4 if head_size == 256 and _blackwell_fa4_takes_head_256(request, block_size) else 2
    return version


def _blackwell_fa4_takes_head_256(request: LayerRequest, block_size: int | None) -> bool:
    kernel = request.rules.flash_attention.blackwell_fa4_head_256
    if kernel == "in blocks of 128":
        return not (
            request.softcaps
            or request.kv_is_quantized
            or request.mm_prefix
            or (block_size or FA4_HEAD_256_BLOCK_SIZE) % FA4_HEAD_256_BLOCK_SIZE
        )
    return kernel == "yes"


def _flashinfer_refusal(request: LayerRequest, head_size: int, mm_prefix: bool) -> str | None:
    if not (8, 0) <= request.capability <= (12, 1):
        return "needs compute capability 8.0 to 12.1"
    if request.dtype == "float32":
        return "no float32"
    if head_size not in (64, 128, 256, 512):
        return f"no head size {head_size}"
    if request.kv_cache_dtype in NVFP4:
        early = request.rules.nvfp4_kv_before_blackwell and request.kv_cache_dtype == "nvfp4"
        early = early and request.capability[0] in (8, 9, 12) and head_size != 64
        if request.capability[0] != 10 and not early:
            return f"no KV cache dtype {request.kv_cache_dtype} on this GPU"
    elif request.kv_cache_dtype not in (*DENSE, *FP8):
        return f"no KV cache dtype {request.kv_cache_dtype}"
    if mm_prefix:
        return "images are not seen both ways"
    return _block_refusal("FLASHINFER", request)


def _triton_refusal(request: LayerRequest, head_size: int) -> str | None:
    if head_size < 32:
        return f"no head size {head_size}"
    if request.kv_cache_dtype not in (*DENSE, *FP8, *PER_TOKEN_HEAD):
        return f"no KV cache dtype {request.kv_cache_dtype}"
    return _block_refusal("TRITON_ATTN", request)


def _composite_refusal(name: str, request: LayerRequest, head_size: int) -> str | None:
    if head_size not in (256, 512):
        return f"no head size {head_size}"
    if request.capability[0] != (9 if name == "TRITON_FLASH_ATTN" else 10):
        return "made for another GPU"
    if name == "TRITON_FLASHINFER":
        part = _flashinfer_refusal(request, head_size, mm_prefix=False)
    else:
        part = _flash_refusal(request, head_size, mm_prefix=False)
        version = flash_attn_version(request, head_size, block_size=request.block_size)
        if version not in request.rules.triton_flash_attn_versions:
            part = part or "FlashAttention is too old for it here"
    return part or _triton_refusal(request, head_size) or _block_refusal(name, request)


def _block_refusal(name: str, request: LayerRequest) -> str | None:
    if request.block_size is None or kernel_blocks(name, request).holds(request.block_size):
        return None
    return f"no block size {request.block_size}"


def kernel_blocks(name: str, request: LayerRequest, head_size: int | None = None) -> KernelBlocks:
    """The blocks of a backend for a layer, or for the model where no head size is given."""
    if name == "TRITON_FLASHINFER":
        return KernelBlocks((request.rules.triton_flashinfer_block_size or DEFAULT_BLOCK_SIZE,))
    if name == "FLASHINFER":
        # Blackwell's kernels for grouped queries read longer blocks too.
        long = request.capability[0] == 10 and request.grouped_queries
        return KernelBlocks((16, 32, 64, 128, 256, 512, 1024) if long else (16, 32, 64))
    if name in ("FLASH_ATTN", "TRITON_FLASH_ATTN"):
        fixed = _flash_block_size(request, head_size or request.largest_head_size)
        if fixed:
            return KernelBlocks((fixed,))
    return KernelBlocks((16,), any_multiple=True)


def layer_kernel_blocks(name: str, request: LayerRequest, head_size: int) -> KernelBlocks:
    """The blocks of a backend for one layer; in older releases it knows the model's head only."""
    return kernel_blocks(name, request, head_size if request.rules.blocks_by_layer else None)


def _flash_block_size(request: LayerRequest, head_size: int) -> int | None:
    """Source: v1/attention/backends/flash_attn.py, get_supported_kernel_block_sizes."""
    major, fa = request.capability[0], request.rules.flash_attention
    if (
        fa.hopper_fp8_head_512_block_size
        and major == 9
        and head_size == 512
        and request.kv_is_fp8
        and flash_attn_version(request, head_size) == 4
    ):
        return fa.hopper_fp8_head_512_block_size
    if (
        fa.blackwell_fa4_head_256 == "in blocks of 128"
        and major in (10, 11)
        and head_size == 256
        and flash_attn_version(request, head_size) == 4
    ):
        return FA4_HEAD_256_BLOCK_SIZE
    return None
