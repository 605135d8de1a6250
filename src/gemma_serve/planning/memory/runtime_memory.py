"""What a GPU must hold beside weights and KV cache, with how far each figure may be off.

Three kinds of memory, told apart because vLLM does: what its profile run counts before it gives the
rest to the KV cache (`runtime` and `activation`), what was there before vLLM first looked
(`outside`), and what it allocates once the KV cache is sized (`after_sizing`); the latter two live
on the share of the GPU that `gpu_memory_utilization` leaves. What needs no measuring follows from
shapes; the few measured figures are data (`data/runtime_constants.yaml`).
"""

from __future__ import annotations

from dataclasses import dataclass

from gemma_serve.planning.memory.activation_memory import expert_workspace, forward_peak
from gemma_serve.planning.memory.graph_memory import capture_sizes, graphs_part
from gemma_serve.planning.memory.profile_peak import (
    activation_part,
    has_towers,
    on_second_runner,
    profile_run,
)
from gemma_serve.planning.memory.runtime_constants import MIB, RuntimeConstants
from gemma_serve.planning.memory.runtime_settings import DTYPE_BYTES, MemoryPart, RuntimeSettings
from gemma_serve.planning.model.geometry import Geometry

__all__ = [
    "MemoryPart",
    "RuntimeMemory",
    "RuntimeSettings",
    "capture_sizes",
    "runtime_memory",
]

# Rows of the V2 runner's tables of sampling parameters: sample/logit_bias.py (allowed tokens,
# biased tokens, their biases, stop tokens), bad_words.py (tokens, offsets) and logprob.py.
_SAMPLING_INTS_PER_SEQUENCE = 4 * 1024 + 129 + 128 + 128


@dataclass(frozen=True)
class RuntimeMemory:
    """The uses of one GPU's memory (or of main memory) beside weights and KV cache.

    `runtime` and `activation` are what vLLM takes off its requested memory before it sizes the KV
    cache; `outside` and `after_sizing` are not in its count and need the rest of the GPU.
    """

    runtime: tuple[MemoryPart, ...]
    activation: MemoryPart
    outside: tuple[MemoryPart, ...]
    after_sizing: tuple[MemoryPart, ...]

    @property
    def runtime_bytes(self) -> int:
        """What is counted of kernels, tables and graphs."""
        return sum(part.bytes for part in self.runtime)

    @property
    def activation_bytes(self) -> int:
        """The most that a forward or the sampler needs at one moment of the profile run."""
        return self.activation.bytes

    @property
    def margin_bytes(self) -> int:
        """By how much the counted memory, and with it the KV cache, may be off."""
        return self.activation.margin_bytes + sum(part.margin_bytes for part in self.runtime)

    @property
    def outside_bytes(self) -> int:
        """What is in use before vLLM first looks at the memory: it lowers what is free."""
        return sum(part.bytes for part in self.outside)

    @property
    def after_sizing_bytes(self) -> int:
        """What vLLM allocates once the KV cache has its size."""
        return sum(part.bytes for part in self.after_sizing)


def runtime_memory(
    geometry: Geometry, settings: RuntimeSettings, constants: RuntimeConstants
) -> RuntimeMemory:
    """All memory of one GPU, or of main memory, beside weights and KV cache.

    Source: v1/worker/gpu_worker.py (determine_available_memory), utils/mem_utils.py
    (memory_profiling) and v1/worker/gpu/model_runner.py of vLLM 0.26 to 0.33.
    """
    if settings.device == "cpu":
        return _on_cpu(geometry, settings, constants)
    rules = constants.rules(settings.release)
    second_runner = on_second_runner(geometry, rules)
    run = profile_run(geometry, settings)
    graphs = graphs_part(geometry, run, settings, constants, sampled=not second_runner)
    tables = _tables(geometry, settings, second_runner=second_runner)
    runtime = [_non_torch(settings, constants)]
    after = [_block_tables(settings)]
    (runtime if rules.counts_tables else after).extend(tables)
    estimated = rules.estimates_graphs or not second_runner
    if graphs is not None:
        (runtime if estimated else after).append(graphs)
    if settings.attention_backend == "FLASHINFER":
        (runtime if estimated and graphs else after).append(_flashinfer(constants))
    return RuntimeMemory(
        runtime=tuple(runtime),
        activation=activation_part(geometry, settings, constants, rules),
        outside=_outside(settings, constants),
        after_sizing=tuple(after),
    )


def _non_torch(settings: RuntimeSettings, constants: RuntimeConstants) -> MemoryPart:
    estimate = constants.gpu(settings.compute_capability).non_torch
    return MemoryPart(
        "kernels",
        estimate.bytes,
        estimate.margin_bytes,
        "CUDA kernels loaded and driver memory taken since vLLM started.",
    )


def _tables(
    geometry: Geometry, settings: RuntimeSettings, *, second_runner: bool
) -> tuple[MemoryPart, ...]:
    """The runner's tables, sized for every sequence and token that may be under way.

    Source: v1/worker/gpu/sample/penalties.py, structured_outputs.py, logit_bias.py, bad_words.py,
    states.py, input_batch.py and, for models with towers, mm/encoder_runner.py; the first runner
    has no sampling tables, but room for embeddings always (v1/worker/gpu_model_runner.py).
    """
    masks = -(-geometry.vocab_size // 32) * 4
    parts = []
    if second_runner and not geometry.is_pooling:
        rows = settings.max_num_seqs
        size = rows * (geometry.vocab_size * 4 + 2 * masks + _SAMPLING_INTS_PER_SEQUENCE * 4)
        parts.append(
            MemoryPart(
                "sampling tables",
                size,
                size // 100 + MIB,
                "Counts of tokens for penalties and masks, one row of the vocabulary a sequence.",
            )
        )
    inputs = settings.max_num_batched_tokens * 16 + settings.max_num_seqs * 64
    if has_towers(geometry, settings) or not second_runner:
        element = DTYPE_BYTES[settings.dtype]
        inputs += settings.max_num_batched_tokens * geometry.hidden_size * element
    parts.append(MemoryPart("input buffers", inputs, MIB, "Token ids, positions, embeddings."))
    return tuple(parts)


def _block_tables(settings: RuntimeSettings) -> MemoryPart:
    """Two tables a group: block_table.py and, for the rounding, model_runner.py."""
    size = 0
    for block in settings.group_block_sizes:
        blocks = -(-settings.max_model_len // block)
        if block <= 128:
            aligned = 128 // block
            blocks = -(-blocks // aligned) * aligned
        size += 2 * settings.max_num_seqs * blocks * 4 + settings.max_num_batched_tokens * 8
    return MemoryPart(
        "block tables", size, size // 20, "Where each sequence's blocks lie, for each KV group."
    )


def _flashinfer(constants: RuntimeConstants) -> MemoryPart:
    return MemoryPart(
        "FlashInfer workspace", constants.flashinfer_workspace, 0, "Scratch space of its kernels."
    )


def _outside(settings: RuntimeSettings, constants: RuntimeConstants) -> tuple[MemoryPart, ...]:
    estimate = constants.gpu(settings.compute_capability).context
    context = MemoryPart(
        "CUDA context",
        estimate.bytes,
        estimate.margin_bytes,
        "What the driver takes for the process, before vLLM counts.",
    )
    if settings.tensor_parallel_size == 1:
        return (context,)
    peers = MemoryPart(
        "NCCL and all-reduce buffers",
        constants.tensor_parallel.bytes,
        constants.tensor_parallel.margin_bytes,
        "Buffers through which the GPUs exchange partial results.",
    )
    return (context, peers)


def _on_cpu(
    geometry: Geometry, settings: RuntimeSettings, constants: RuntimeConstants
) -> RuntimeMemory:
    """Main memory of the processes; nothing is taken off the KV cache, whose size is given."""
    run = profile_run(geometry, settings)
    peak = forward_peak(geometry, run) + expert_workspace(geometry, run)
    workers = settings.tensor_parallel_size
    server, worker = constants.cpu_server, constants.cpu_worker
    processes = MemoryPart(
        "processes",
        server.bytes + workers * worker.bytes,
        server.margin_bytes + workers * worker.margin_bytes,
        "Python, torch and vLLM in the server, the engine and its workers.",
    )
    activation = MemoryPart(
        "activations", peak, peak // 2, "The most at one moment of a forward, as on a GPU."
    )
    return RuntimeMemory((processes,), activation, (), ())
