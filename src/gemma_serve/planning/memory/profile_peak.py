"""The highest point of vLLM's profile run, which it takes off the KV cache.

Source: v1/worker/gpu/model_runner.py (profile_run) and, for the first runner,
v1/worker/gpu_model_runner.py, of vLLM 0.26 to 0.33.
"""

from __future__ import annotations

from gemma_serve.planning.memory.activation_memory import (
    ProfileRun,
    expert_workspace,
    forward_peak,
    sampler_peak,
    tuning_peak,
)
from gemma_serve.planning.memory.encoder_memory import EncoderMemory, encoder_memory
from gemma_serve.planning.memory.runtime_constants import MIB, RuntimeConstants, RuntimeRules
from gemma_serve.planning.memory.runtime_settings import DTYPE_BYTES, MemoryPart, RuntimeSettings
from gemma_serve.planning.model.geometry import Geometry

# Above this share of open bytes a peak was reasoned, not traced.
_TRACED_SHARE = 0.02

# Token ids, positions and other vectors of a batch, beside the tensors that are counted.
_SMALL_TENSORS = 64 * 1024

# Those with which vLLM, compiled, hands activations on in eight bits (traced for the first).
_QUANTIZES_ACTIVATIONS = frozenset({"fp8", "fp8_per_tensor"})

# What the allocator may round up of the tensors at the peak.
_ROUNDING_MARGIN = 4 * MIB


def on_second_runner(geometry: Geometry, rules: RuntimeRules) -> bool:
    """Whether vLLM runs the model with its second model runner."""
    has_experts = any(layer.experts is not None for layer in geometry.layers)
    return not (rules.experts_and_pooling_on_v1 and (has_experts or geometry.is_pooling))


def profile_run(
    geometry: Geometry, settings: RuntimeSettings, tokens: int | None = None
) -> ProfileRun:
    """The profile run of these settings, or a run of another number of `tokens`."""
    return ProfileRun(
        tokens=settings.max_num_batched_tokens if tokens is None else tokens,
        rows=settings.rows,
        element_bytes=DTYPE_BYTES[settings.dtype],
        tensor_parallel_size=settings.tensor_parallel_size,
        eager=settings.enforce_eager,
        embeds_outside=has_towers(geometry, settings),
        quantized=settings.quantization in _QUANTIZES_ACTIVATIONS and not settings.enforce_eager,
    )


def has_towers(geometry: Geometry, settings: RuntimeSettings) -> bool:
    """Whether the engine takes images or sound, and with them embeddings instead of token ids."""
    return bool(geometry.towers) and not settings.language_model_only


def activation_part(
    geometry: Geometry,
    settings: RuntimeSettings,
    constants: RuntimeConstants,
    rules: RuntimeRules,
) -> MemoryPart:
    """The highest point of the profile run: compiling, encoding, the forward, or sampling."""
    run, gpu = profile_run(geometry, settings), constants.gpu(settings.compute_capability)
    first_runner = not on_second_runner(geometry, rules)
    encoder = EncoderMemory(0, 0, 0.0)
    if rules.profiles_encoder or first_runner:
        encoder = _encoder(geometry, settings, run)
    stays = encoder.cached_bytes + expert_workspace(geometry, run)
    sampler = sampler_peak(
        geometry,
        run,
        first_runner=first_runner,
        all_parameters=rules.profiles_sampling_parameters,
        multiprocessors=gpu.multiprocessors,
    )
    # cuBLAS takes its workspace with the first matrix product: compiling comes before it.
    workspace = gpu.cublas_workspace
    uses = {
        f"a forward of {run.tokens} tokens": stays + forward_peak(geometry, run) + workspace.bytes,
        f"sampling for {run.rows} sequences": stays + sampler + workspace.bytes,
    }
    if encoder.forward_bytes:
        uses["the encoder's forward"] = encoder.forward_bytes + workspace.bytes
    later, highest = max((size, name) for name, size in uses.items())
    peak = later
    if settings.first_start:
        peak = max(later, encoder.cached_bytes + tuning_peak(geometry, run))
    tuned = 0
    if peak > later:
        # The kernel of per-layer inputs was fitted to one model.
        if geometry.per_layer_input_size:
            tuned = run.tokens * geometry.hidden_size * run.element_bytes
        highest = f"the first compilation; a later start takes {(peak - later) // MIB} MiB less"
    share = _peak_margin(geometry, run, settings, constants, rules)
    # The encoder may be the highest where the formula says that it isn't.
    encoded = int(encoder.forward_bytes * (1 + encoder.margin_share)) + workspace.bytes - peak
    basis = "traced" if share <= _TRACED_SHARE else "reasoned from vLLM's source"
    return MemoryPart(
        "activations",
        peak + _SMALL_TENSORS,
        max(int(peak * share), encoded) + tuned + workspace.margin_bytes + _ROUNDING_MARGIN,
        f"The most at one moment: {highest} ({basis}).",
    )


def _encoder(geometry: Geometry, settings: RuntimeSettings, run: ProfileRun) -> EncoderMemory:
    if not has_towers(geometry, settings):
        return EncoderMemory(0, 0, 0.0)
    return encoder_memory(
        geometry,
        tokens=settings.max_num_batched_tokens,
        sequences=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        element_bytes=run.element_bytes,
        tensor_parallel_size=settings.tensor_parallel_size,
    )


def _peak_margin(
    geometry: Geometry,
    run: ProfileRun,
    settings: RuntimeSettings,
    constants: RuntimeConstants,
    rules: RuntimeRules,
) -> float:
    """The share of the peak that is open: little where the tensors of such a peak were traced."""
    untraced = (
        settings.tensor_parallel_size > 1
        or (settings.quantization is not None and not run.quantized)
        or settings.dtype == "float32"
        or geometry.altup_inputs > 0
        or geometry.is_pooling
        or has_towers(geometry, settings)
    )
    return max(rules.peak_margin, constants.reasoned_margin) if untraced else rules.peak_margin
