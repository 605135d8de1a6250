"""One set of settings on one kind of device: where every byte of its memory goes."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import cast

from gemma_serve.errors import GemmaServeError, Problem
from gemma_serve.planning.memory.attention_backend import (
    AttentionPlan,
    choose_attention,
    start_refusal,
)
from gemma_serve.planning.memory.attention_kernels import Dtype
from gemma_serve.planning.memory.engine_rules import EngineRules
from gemma_serve.planning.memory.fit import DeviceMemory, EngineSettings, Fit, MemoryBudget
from gemma_serve.planning.memory.kv_cache import KvCacheLayout, plan_kv_cache
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
    try:
        laid_out = _lay_out(facts.geometry, facts, settings, device, rules)
    except GemmaServeError as error:
        return _refused(facts, settings, device, weights, error.problems[0], rules, constants)
    attention, layout = laid_out
    runtime = _runtime(facts.geometry, settings, device, weights, laid_out, rules, constants)
    memory = _divide(settings, device, weights, runtime, layout)
    capacity = layout.with_memory(
        memory.kv_cache_bytes, num_gpu_blocks_override=settings.num_gpu_blocks_override
    )
    fits = capacity.fits and _has_room(memory, settings, device, runtime)
    fit = Fit(settings, memory, weights, runtime, attention, layout, capacity, fits)
    return replace(
        fit,
        tight=fits and fit.longest_model_len < settings.max_model_len,
        spills=fits and device.kind == "cuda" and _beyond(memory, runtime) > 0,
    )


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
    fits = memory.kv_cache_bytes > 0 and _has_room(memory, settings, device, None)
    return Fit(settings, memory, weights, None, None, None, None, fits)


def _refused(
    facts: ModelFacts,
    settings: EngineSettings,
    device: DeviceMemory,
    weights: ModelWeights,
    refusal: Problem,
    rules: EngineRules,
    constants: RuntimeConstants,
) -> Fit:
    """Where the memory would go if the KV cache were left to vLLM, and why it can't be as said."""
    assert facts.geometry is not None
    plain = replace(
        settings,
        kv_cache_dtype="auto",
        block_size=None,
        attention_backend=None,
        hybrid_kv_cache_manager=True,
        num_gpu_blocks_override=None,
    )
    runtime = None
    with suppress(GemmaServeError):
        laid_out = _lay_out(facts.geometry, facts, plain, device, rules)
        runtime = _runtime(facts.geometry, plain, device, weights, laid_out, rules, constants)
    memory = _divide(settings, device, weights, runtime)
    return Fit(settings, memory, weights, runtime, None, None, None, fits=False, refusal=refusal)


def _lay_out(
    geometry: Geometry,
    facts: ModelFacts,
    settings: EngineSettings,
    device: DeviceMemory,
    rules: EngineRules,
) -> tuple[AttentionPlan, KvCacheLayout]:
    """The attention backends and the KV cache.

    Raises:
        GemmaServeError: vLLM has no backend for it, or refuses the layout.
    """
    attention = choose_attention(
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
    refusal = attention.unsupported or start_refusal(attention, device.compute_capability)
    if refusal is not None:
        raise GemmaServeError(
            refusal,
            code="plan.kv_cache_unsupported",
            hint="leave `--kv-cache-dtype`, block size and attention backend to vLLM",
        )
    layout = plan_kv_cache(
        geometry,
        rules=rules,
        attention=attention,
        tensor_parallel_size=settings.tensor_parallel_size,
        max_model_len=settings.max_model_len,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        async_scheduling=settings.async_scheduling,
        hybrid_kv_cache_manager=settings.hybrid_kv_cache_manager,
    )
    return attention, layout


def _counted_backend(attention: AttentionPlan) -> str:
    """The backend whose workspace counts: FlashInfer's, where any layer uses it."""
    return "FLASHINFER" if "FLASHINFER" in attention.backends else attention.backends[0]


def _runtime(
    geometry: Geometry,
    settings: EngineSettings,
    device: DeviceMemory,
    weights: ModelWeights,
    laid_out: tuple[AttentionPlan, KvCacheLayout],
    rules: EngineRules,
    constants: RuntimeConstants,
) -> RuntimeMemory:
    attention, layout = laid_out
    runtime = runtime_memory(
        geometry,
        RuntimeSettings(
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
            attention_backend=_counted_backend(attention),
        ),
        constants,
    )
    if device.kind == "cpu":
        return runtime
    return replace(runtime, runtime=(*runtime.runtime, _rounding(weights)))


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

    A model that keeps no keys and values gets none, whatever was said.
    Source: v1/core/kv_cache_utils.py, may_override_num_blocks.
    """
    if layout is not None and not layout.groups:
        return 0
    if settings.num_gpu_blocks_override is not None and layout is not None and layout.groups:
        return settings.num_gpu_blocks_override * layout.pool_bytes_per_block
    return settings.kv_cache_memory_bytes


def _has_room(
    memory: MemoryBudget,
    settings: EngineSettings,
    device: DeviceMemory,
    runtime: RuntimeMemory | None,
) -> bool:
    """Whether the parts stay within what was requested, and that within what there is.

    What comes beside the share decides only where it can't be by any margin.
    """
    if device.kind == "cpu":
        # All ranks live in the same main memory, and others may be using it.
        ranks = settings.tensor_parallel_size
        each = memory.weights_bytes + memory.activation_bytes + memory.kv_cache_bytes
        return memory.runtime_bytes + ranks * each <= device.free_bytes
    if not memory.used_bytes <= memory.requested_bytes <= memory.total_bytes:
        return False
    if runtime is None:
        return True
    beside = (*runtime.outside, *runtime.after_sizing)
    return _beyond(memory, runtime) <= sum(part.margin_bytes for part in beside)


def _beyond(memory: MemoryBudget, runtime: RuntimeMemory) -> int:
    """By how much the share and what comes beside it exceed the GPU; negative where they don't."""
    beside = runtime.outside_bytes + runtime.after_sizing_bytes
    return memory.requested_bytes + beside - memory.total_bytes
