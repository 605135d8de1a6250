"""Over how many GPUs vLLM can split a model."""

from __future__ import annotations

from gemma_serve.planning.model.geometry import VOCABULARY_PADDING, Geometry


def illegal_tensor_parallel_reason(geometry: Geometry, tensor_parallel_size: int) -> str | None:
    """Why vLLM can't split the model over so many GPUs, as a sentence; None if it can.

    Sources: config/model.py (verify_with_parallel_config), distributed/utils.py (divide) and the
    assertions of model_executor/models/gemma*.py.
    """
    size = tensor_parallel_size
    if size < 1:
        return "The tensor parallel size must be at least 1."
    if geometry.query_heads % size:
        return f"The model's {geometry.query_heads} attention heads can't be split over {size}."
    for layer in geometry.layers:
        heads = layer.attention.kv_heads
        if heads % size and size % heads:
            return f"The model's {heads} KV heads can be neither split nor copied over {size}."
        widths = [layer.intermediate_size]
        widths += [layer.experts.intermediate_size] if layer.experts else []
        for width in widths:
            if width % size:
                return f"The model's MLP of width {width} can't be split over {size}."
    if -(-geometry.vocab_size // VOCABULARY_PADDING) * VOCABULARY_PADDING % size:
        return f"The vocabulary of {geometry.vocab_size} can't be split over {size}."
    return None
