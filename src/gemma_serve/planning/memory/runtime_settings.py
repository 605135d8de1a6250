"""What the memory of an engine depends on beside its model, and one use of that memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class MemoryPart:
    """One use of memory in bytes, by how much it may be off both ways, and what it is."""

    name: str
    bytes: int
    margin_bytes: int
    explanation: str


@dataclass(frozen=True)
class RuntimeSettings:
    """What the memory depends on beside the model. One entry of `group_block_sizes` for each
    group of the KV cache: how many tokens one of its blocks holds. A `first_start` compiles, which
    takes the most; a later one finds what it compiled.
    """

    device: Literal["cuda", "cpu"]
    release: tuple[int, int]
    dtype: str
    tensor_parallel_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    group_block_sizes: tuple[int, ...]
    compute_capability: tuple[int, int] | None = None
    quantization: str | None = None
    enforce_eager: bool = False
    language_model_only: bool = False
    attention_backend: str | None = None
    max_cudagraph_capture_size: int | None = None
    first_start: bool = True

    @property
    def rows(self) -> int:
        """Sequences that the profile run samples for."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)
