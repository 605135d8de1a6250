"""What is to be decided: what was fixed, for which machine and which vLLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gemma_serve.planning.memory.engine_flags import EngineFlags
from gemma_serve.planning.memory.engine_rules import EngineRules
from gemma_serve.planning.memory.fit import DeviceMemory
from gemma_serve.planning.memory.runtime_constants import RuntimeConstants


@dataclass(frozen=True)
class Wishes:
    """What was fixed. None (for the types: "auto") leaves it to the planner."""

    tensor_parallel_size: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    enforce_eager: bool = False
    language_model_only: bool = False
    flags: EngineFlags = field(default_factory=EngineFlags)

    @property
    def text_only(self) -> bool:
        """Whether the towers are left out, by either of the two ways to say so."""
        return self.language_model_only or self.flags.text_only


@dataclass(frozen=True)
class Machine:
    """Where the engine would run.

    `most_gpus` is how many of one kind there are, and `device(n)` the tightest of the `n` that
    would be taken; on a CPU it is the main memory, whatever `n`.
    """

    most_gpus: int
    device: Callable[[int], DeviceMemory]


@dataclass(frozen=True)
class EngineKnowledge:
    """What is known of the vLLM that would run."""

    rules: EngineRules
    constants: RuntimeConstants
