"""What CUDA graphs take: the driver's record of each kernel, and the tensors that they share."""

from __future__ import annotations

from dataclasses import replace

from gemma_serve.planning.memory.activation_memory import ProfileRun, forward_peak
from gemma_serve.planning.memory.runtime_constants import MIB, RuntimeConstants
from gemma_serve.planning.memory.runtime_settings import MemoryPart, RuntimeSettings
from gemma_serve.planning.model.geometry import Geometry

# FlashAttention 3 is Hopper's, for heads of up to this size (v1/attention/backends/fa_utils.py). In
# a graph it may split each sequence in so many parts (config/attention.py,
# flash_attn_max_num_splits_for_cuda_graph) and has room for the float32 output of each.
_HOPPER = 9
_LARGEST_HEAD_OF_FLASH_3 = 256
_SPLITS = 32
_FLOAT32_BYTES = 4


def capture_sizes(settings: RuntimeSettings) -> tuple[int, ...]:
    """The batch sizes that vLLM captures CUDA graphs for; none if it runs eagerly.

    Source: config/vllm.py, _set_cudagraph_sizes.
    """
    if settings.enforce_eager:
        return ()
    blackwell = (settings.compute_capability or (0, 0))[0] == 10
    largest = settings.max_cudagraph_capture_size or min(
        2 * settings.max_num_seqs, 1024 if blackwell else 512
    )
    largest = min(largest, settings.max_num_batched_tokens)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16)]
    return tuple(size for size in sizes if size <= largest)


def graphs_part(
    geometry: Geometry,
    run: ProfileRun,
    settings: RuntimeSettings,
    constants: RuntimeConstants,
    *,
    sampled: bool,
) -> MemoryPart | None:
    """The CUDA graphs; None for an engine that captures none.

    vLLM captures every size in pieces, one before, between and after the attentions of all layers,
    and as a whole those that a batch of one token a sequence can have (config/compilation.py,
    FULL_AND_PIECEWISE). `run` is the profile run, of which the tokens do not matter; `sampled`
    says that the figure is the first runner's guess from two graphs of each kind.
    """
    sizes = capture_sizes(settings)
    if not sizes:
        return None
    whole = [size for size in sizes if size <= settings.max_num_seqs]
    layers, gpu = len(geometry.layers), constants.gpu(settings.compute_capability)
    driver = len(sizes) * (layers + 1) * constants.graph_piece_bytes
    driver += len(whole) * layers * constants.graph_layer_bytes
    # The capturing stream and its pool have a workspace of cuBLAS each; the products of quantized
    # weights go to other kernels.
    workspaces = 0 if settings.quantization else 2 * gpu.cublas_workspace.bytes
    tensors = _tensors(geometry, run, pieces=sizes[-1], whole=whole[-1])
    steady = driver + constants.graph_pools_bytes + workspaces + tensors
    open_share = gpu.graph_margin
    if settings.tensor_parallel_size > 1:
        open_share = max(open_share, constants.reasoned_margin)
    margin = int(steady * open_share)
    if sampled:
        # It takes the driver's steps of two MiB for what one graph costs.
        margin += 2 * MIB * len(sizes)
    splits = _splits(geometry, run, settings, whole[-1])
    # One or two copies, by how the pool of the graphs is split.
    return MemoryPart(
        "CUDA graphs",
        steady + splits * 3 // 2,
        margin + splits // 2,
        f"{len(sizes) + len(whole)} recorded graphs for batches of up to {sizes[-1]} tokens.",
    )


def _tensors(geometry: Geometry, run: ProfileRun, *, pieces: int, whole: int) -> int:
    """What all graphs share: half as much again as a forward takes, and half for whole graphs."""
    in_pieces = forward_peak(geometry, replace(run, tokens=pieces))
    as_a_whole = forward_peak(geometry, replace(run, tokens=whole))
    return in_pieces * 3 // 2 + as_a_whole // 2


def _splits(geometry: Geometry, run: ProfileRun, settings: RuntimeSettings, tokens: int) -> int:
    """FlashAttention 3's outputs of the parts of all sequences, for the largest whole graph."""
    capability = settings.compute_capability or (0, 0)
    if settings.attention_backend not in (None, "FLASH_ATTN") or capability[0] != _HOPPER:
        return 0
    if geometry.largest_head_size > _LARGEST_HEAD_OF_FLASH_3:
        return 0
    widest = max(
        run.share(layer.attention.query_heads) * layer.attention.head_size
        for layer in geometry.layers
    )
    return _SPLITS * tokens * widest * _FLOAT32_BYTES
