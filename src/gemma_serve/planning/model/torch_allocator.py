"""How much torch's allocator takes for a tensor while vLLM loads a model."""

from __future__ import annotations

_MIB = 2**20
_SMALLEST_BLOCK = 512
# From here on a tensor gets memory of its own from CUDA, in steps of two MiB ...
_OWN_SEGMENT = 10 * _MIB
_STEP = 2 * _MIB
# ... of which a rest beyond one MiB goes to other tensors, unless vLLM forbids splitting.
_SMALLEST_REST = _MIB
_LARGEST_SPLIT = 20 * _MIB


def allocated_bytes(size: int) -> int:
    """What is counted as allocated for one tensor of `size` bytes.

    Summed over a model's tensors this is what vLLM logs as "Model loading took"; the tensors
    themselves are up to half a percent smaller. Source: c10/cuda/CUDACachingAllocator.cpp
    (round_size, get_allocation_size, should_split) and vLLM's v1/worker/gpu_worker.py
    (load_model: max_split_size_mb is 20).
    """
    if size < _OWN_SEGMENT:
        return -(-size // _SMALLEST_BLOCK) * _SMALLEST_BLOCK
    segment = -(-size // _STEP) * _STEP
    if size > _LARGEST_SPLIT or segment - size <= _SMALLEST_REST:
        return segment
    return -(-size // _SMALLEST_BLOCK) * _SMALLEST_BLOCK
