"""One way to run a model on one kind of device, and what came of judging it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gemma_serve.errors import Problem
from gemma_serve.planning.memory.attention_backend import AttentionPlan
from gemma_serve.planning.memory.kv_cache import KvCacheCapacity, KvCacheLayout
from gemma_serve.planning.memory.runtime_memory import RuntimeMemory
from gemma_serve.planning.model.weights import ModelWeights


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
    start this way, whatever the memory. `tight` says that the KV cache fits within the margin of
    error only, `spills` that what vLLM takes beside its share does.
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
    spills: bool = False
    refusal: Problem | None = None

    @property
    def beside_bytes(self) -> int:
        """What the engine takes of a GPU beside its share: before it counts, and after it sized."""
        if self.runtime is None:
            return 0
        return self.runtime.outside_bytes + self.runtime.after_sizing_bytes

    @property
    def largest_share(self) -> float:
        """The largest gpu_memory_utilization, to two decimals, that leaves room for the rest."""
        total = self.memory.total_bytes
        return max(0, 100 * (total - self.beside_bytes) // total) / 100

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
