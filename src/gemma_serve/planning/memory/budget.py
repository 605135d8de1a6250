"""One set of settings on one kind of device: where every byte of its memory goes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, cast

from gemma_serve.errors import GemmaServeError, Problem
from gemma_serve.planning.memory.attention_backend import AttentionPlan, choose_attention
from gemma_serve.planning.memory.attention_kernels import Dtype
from gemma_serve.planning.memory.engine_rules import EngineRules
from gemma_serve.planning.memory.kv_cache import KvCacheCapacity, KvCacheLayout, plan_kv_cache
from gemma_serve.planning.memory.runtime_constants import RuntimeConstants
from gemma_serve.planning.memory.runtime_memory import (
    MemoryPart,
    RuntimeMemory,
    RuntimeSettings,
    runtime_memory,
)
from gemma_serve.planning.model.facts import ModelFacts
from gemma_serve.planning.model.geometry import Geometry
from gemma_serve.planning.model.weights import ModelWeights, model_weights

# What an engine takes beside the weights of a model that we know nothing of: one for the kernels
# and one for the activations. Only says whether it is worth a try.
_UNKNOWN_RUNTIME_BYTES = 512 * 2**20
_UNKNOWN_ACTIVATION_BYTES = 2**30
# Small tensors share memory in ways that depend on their order.
_ROUNDING_MARGIN_BYTES = 16 * 2**20
_OTHER_KV_CACHE = "leave `--kv-cache-dtype`, block size and attention backend to vLLM"


@dataclass(frozen=True)
class DeviceMemory:
    """The memory in which the engine must live: each of `count` equal GPUs, or main memory.

    `compute_capability` is None for the CPU.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class EngineSettings:
    """All that the engine's memory depends on, with nothing left open."""

    tensor_parallel_size: int
    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None = None
    enforce_eager: bool = False
    language_model_only: bool = False
    block_size: int | None = None
    attention_backend: str | None = None
    async_scheduling: bool = True
    hybrid_kv_cache_manager: bool = True
    num_gpu_blocks_override: int | None = None

    @property
    def fixes_kv_cache(self) -> bool:
        """Whether the KV cache has its size whatever the other parts leave."""
        return self.kv_cache_memory_bytes is not None or self.num_gpu_blocks_override is not None


@dataclass(frozen=True)
class MemoryBudget:
    """Where the bytes of one GPU (or of main memory) go.

    `requested_bytes` is what must be there for the engine: the share of
    `gpu_memory_utilization`, or the sum of the parts where the KV cache has a fixed size that
    goes beyond it. `margin_bytes` is by how much the estimated parts may be wrong, both ways.
    """

    total_bytes: int
    requested_bytes: int
    weights_bytes: int
    runtime_bytes: int
    activation_bytes: int
    kv_cache_bytes: int
    margin_bytes: int

    @property
    def used_bytes(self) -> int:
        """The sum of the parts."""
        return self.weights_bytes + self.runtime_bytes + self.activation_bytes + self.kv_cache_bytes

    @property
    def unused_bytes(self) -> int:
        """What stays free of the whole memory; never negative."""
        return max(0, self.total_bytes - self.used_bytes)


@dataclass(frozen=True)
class Fit:
    """One set of settings, judged: where the memory goes, and whether one full request has room.

    Without a known geometry, `attention`, `kv_cache` and `capacity` are None, and "fits" only
    says that the weights leave room for anything else at all. `refusal` is why vLLM would not
    start this way, whatever the memory. A `tight` fit is one within the margin of error.
    """

    settings: EngineSettings
    memory: MemoryBudget
    weights: ModelWeights
    runtime: RuntimeMemory | None
    attention: AttentionPlan | None
    kv_cache: KvCacheLayout | None
    capacity: KvCacheCapacity | None
    fits: bool
    tight: bool = False
    refusal: Problem | None = None

    @property
    def longest_model_len(self) -> int:
        """The longest context that fits with these settings, to be sure of it; 0 if none does."""
        if self.kv_cache is None:
            return self.settings.max_model_len if self.fits else 0
        sure = self.memory.kv_cache_bytes
        if not self.settings.fixes_kv_cache:
            sure -= self.memory.margin_bytes
        return self.kv_cache.longest_model_len(
            max(0, sure), num_gpu_blocks_override=self.settings.num_gpu_blocks_override
        )


def judge(
    facts: ModelFacts,
    settings: EngineSettings,
    device: DeviceMemory,
    *,
    rules: EngineRules,
    constants: RuntimeConstants,
) -> Fit | None:
    """Where the memory of one `device` goes with these settings, and whether it is enough.

    None where nobody knows how large the weights are.
    """
    weights = _weights(facts, settings, rules)
    if weights is None:
        return None
    if facts.geometry is None:
        return _without_geometry(settings, device, weights)
    attention = _attention(facts.geometry, facts, settings, device, rules)
    if attention.unsupported is not None:
        return _refused(settings, device, weights, attention.unsupported)
    try:
        layout = _layout(facts.geometry, settings, rules, attention)
    except GemmaServeError as error:
        return _refused(settings, device, weights, str(error))
    runtime = runtime_memory(
        facts.geometry, _runtime_settings(settings, device, attention, layout, rules), constants
    )
    if device.kind == "cuda":
        runtime = replace(runtime, runtime=(*runtime.runtime, _rounding(weights)))
    memory = _divide(settings, device, weights, runtime, layout)
    capacity = layout.with_memory(
        memory.kv_cache_bytes, num_gpu_blocks_override=settings.num_gpu_blocks_override
    )
    fits = capacity.fits and _has_room(memory, settings, device)
    fit = Fit(settings, memory, weights, runtime, attention, layout, capacity, fits)
    return replace(fit, tight=fits and fit.longest_model_len < settings.max_model_len)


def _rounding(weights: ModelWeights) -> MemoryPart:
    """What vLLM counts with the weights, though they don't hold it."""
    return MemoryPart(
        "allocator rounding",
        weights.rounding_bytes,
        _ROUNDING_MARGIN_BYTES,
        "Memory that torch's allocator takes for the weights beyond their size.",
    )


def _weights(
    facts: ModelFacts, settings: EngineSettings, rules: EngineRules
) -> ModelWeights | None:
    weights = model_weights(
        facts.geometry,
        facts.tensors,
        dtype=settings.dtype,
        quantization=settings.quantization,
        quantization_config=facts.quantization_config,
        tensor_parallel_size=settings.tensor_parallel_size,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        language_model_only=settings.language_model_only,
        release=rules.release,
    )
    if weights is None and facts.weights_bytes is not None:
        # Quantized in a way that we can't count: they take about what the files hold.
        share = math.ceil(facts.weights_bytes / settings.tensor_parallel_size)
        weights = ModelWeights(share, approximate=True)
    return weights


def _without_geometry(settings: EngineSettings, device: DeviceMemory, weights: ModelWeights) -> Fit:
    memory = _divide(settings, device, weights, None)
    fits = memory.kv_cache_bytes > 0 and _has_room(memory, settings, device)
    return Fit(settings, memory, weights, None, None, None, None, fits)


def _refused(
    settings: EngineSettings, device: DeviceMemory, weights: ModelWeights, why: str
) -> Fit:
    memory = _divide(settings, device, weights, None)
    refusal = Problem("plan.kv_cache_unsupported", why.rstrip("."), _OTHER_KV_CACHE)
    return Fit(settings, memory, weights, None, None, None, None, fits=False, refusal=refusal)


def _attention(
    geometry: Geometry,
    facts: ModelFacts,
    settings: EngineSettings,
    device: DeviceMemory,
    rules: EngineRules,
) -> AttentionPlan:
    return choose_attention(
        geometry,
        rules=rules,
        capability=device.compute_capability,
        dtype=cast(Dtype, settings.dtype),
        kv_cache_dtype=settings.kv_cache_dtype,
        checkpoint_kv_is_fp8=facts.has_fp8_kv_cache,
        block_size=settings.block_size,
        attention_backend=settings.attention_backend,
        text_only=settings.language_model_only,
    )


def _layout(
    geometry: Geometry, settings: EngineSettings, rules: EngineRules, attention: AttentionPlan
) -> KvCacheLayout:
    return plan_kv_cache(
        geometry,
        rules=rules,
        attention=attention,
        tensor_parallel_size=settings.tensor_parallel_size,
        max_model_len=settings.max_model_len,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        async_scheduling=settings.async_scheduling,
        hybrid_kv_cache_manager=settings.hybrid_kv_cache_manager,
    )


def _runtime_settings(
    settings: EngineSettings,
    device: DeviceMemory,
    attention: AttentionPlan,
    layout: KvCacheLayout,
    rules: EngineRules,
) -> RuntimeSettings:
    return RuntimeSettings(
        device=device.kind,
        release=rules.release,
        dtype=settings.dtype,
        tensor_parallel_size=settings.tensor_parallel_size,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        group_block_sizes=tuple(group.block_size for group in layout.groups),
        compute_capability=device.compute_capability,
        quantization=settings.quantization,
        enforce_eager=settings.enforce_eager,
        language_model_only=settings.language_model_only,
        attention_backend=attention.backends[0],
    )


def _divide(
    settings: EngineSettings,
    device: DeviceMemory,
    weights: ModelWeights,
    runtime: RuntimeMemory | None,
    layout: KvCacheLayout | None = None,
) -> MemoryBudget:
    """vLLM's own division: the KV cache gets what the rest leaves of the requested share.

    Source: v1/worker/gpu_worker.py, determine_available_memory; v1/worker/utils.py,
    request_memory.
    """
    runtime_bytes = _UNKNOWN_RUNTIME_BYTES if runtime is None else runtime.runtime_bytes
    activation_bytes = _UNKNOWN_ACTIVATION_BYTES if runtime is None else runtime.activation_bytes
    others = weights.total_bytes + runtime_bytes + activation_bytes
    requested = math.ceil(device.total_bytes * settings.gpu_memory_utilization)
    kv_cache_bytes = _fixed_kv_cache_bytes(settings, layout)
    if kv_cache_bytes is None:
        kv_cache_bytes = max(0, requested - others)
    elif device.kind == "cpu":
        requested = others + kv_cache_bytes
    else:
        # A fixed cache may go beyond the share, but the share must be free all the same.
        requested = max(requested, others + kv_cache_bytes)
    return MemoryBudget(
        total_bytes=device.total_bytes,
        requested_bytes=requested,
        weights_bytes=weights.total_bytes,
        runtime_bytes=runtime_bytes,
        activation_bytes=activation_bytes,
        kv_cache_bytes=kv_cache_bytes,
        margin_bytes=runtime_bytes + activation_bytes if runtime is None else runtime.margin_bytes,
    )


def _fixed_kv_cache_bytes(settings: EngineSettings, layout: KvCacheLayout | None) -> int | None:
    """The size of the KV cache where it was fixed; vLLM allocates as many blocks as it is told.

    Source: v1/core/kv_cache_utils.py, may_override_num_blocks.
    """
    if settings.num_gpu_blocks_override is not None and layout is not None and layout.groups:
        return settings.num_gpu_blocks_override * layout.pool_bytes_per_block
    return settings.kv_cache_memory_bytes


def _has_room(memory: MemoryBudget, settings: EngineSettings, device: DeviceMemory) -> bool:
    """Whether the parts stay within what was requested, and that within what there is."""
    if device.kind == "cpu":
        # All ranks live in the same main memory, and others may be using it.
        ranks = settings.tensor_parallel_size
        each = memory.weights_bytes + memory.activation_bytes + memory.kv_cache_bytes
        return memory.runtime_bytes + ranks * each <= device.free_bytes
    return memory.used_bytes <= memory.requested_bytes <= memory.total_bytes
