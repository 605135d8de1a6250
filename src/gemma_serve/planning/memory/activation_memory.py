"""The tensors that live at once in vLLM's profile run: forward, sampler, first compilation.

A forward is a chain of layers, so its peak is the widest step of its widest layer and what is
carried through all of them. Elements are for one token, on one of the GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemma_serve.planning.model.geometry import Experts, Geometry, Layer

# Their layers take and return the residual beside the hidden states, so that the caller holds both
# (gemma.py, gemma2.py, gemma3.py); Gemma 4's add it themselves (gemma4.py).
_HANDS_RESIDUAL_ON = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text"})

# The block of one program of v1/worker/gpu/sample/gumbel.py, which leaves its best token (int64)
# and that token's score (float32).
_GUMBEL_BLOCK = 1024
_GUMBEL_BYTES = 12

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class ProfileRun:
    """What vLLM's profile run feeds the model.

    `rows` are the sequences it samples for. With `embeds_outside` the compiled part gets
    embeddings, not token ids (a model with towers); `quantized`: a compiled model's linear layers
    get inputs of one byte each.
    """

    tokens: int
    rows: int
    element_bytes: int
    tensor_parallel_size: int = 1
    eager: bool = False
    embeds_outside: bool = False
    quantized: bool = False

    def share(self, count: int) -> int:
        """One GPU's part of what tensor parallelism splits."""
        return -(-count // self.tensor_parallel_size)


def forward_peak(geometry: Geometry, run: ProfileRun) -> int:
    """Bytes at the peak of one forward of the language model.

    Left out are the scratch space of experts and of cuBLAS, which outlive the forward. Source: the
    forward of model_executor/models/gemma*.py. Compiled, a layer holds its widest step, the
    residual, its normed input and the attention's output; eagerly, Python's frames hold more.
    """
    per_layer = len(geometry.layers) * geometry.per_layer_input_size
    copies = 2 if run.eager and not run.embeds_outside else 1
    # A compiled piece reaches from one attention to the next, and its caller holds the first's
    # output until it returns.
    outputs = [0, *(_heads(layer, run)[0] for layer in geometry.layers)]
    layers = max(
        _layer_elements(geometry, layer, run, before)
        for layer, before in zip(geometry.layers, outputs, strict=False)
    )
    # While the inputs of all layers are made: looked up, projected, scaled, normed.
    projecting = (4 if run.eager else 3) * per_layer + 2 * geometry.hidden_size
    return run.tokens * max(layers + copies * per_layer, projecting) * run.element_bytes


def _layer_elements(geometry: Geometry, layer: Layer, run: ProfileRun, before: int) -> int:
    hidden = geometry.hidden_size
    queries, keys = _heads(layer, run)
    # Gate and up in one tensor, and their product, which the same kernel quantizes.
    product = run.share(layer.intermediate_size)
    mlp = 2 * product + (-(-product // run.element_bytes) if run.quantized else product)
    # The fused projection, its normed and rotated parts, an output: eagerly the layer's own.
    attention = 2 * (queries + 2 * keys)
    if run.eager:
        attention += queries
        mlp_carried, attention_carried = _carried_eagerly(geometry)
    else:
        mlp += queries
        attention += before
        mlp_carried = attention_carried = 2 + _altup_carried(geometry)
    steps = [mlp + mlp_carried * hidden, attention + attention_carried * hidden]
    if layer.experts is not None:
        steps.append(layer.experts.count + (mlp_carried + 2) * hidden)
    # All-reduce writes a tensor of its own.
    return max(steps) + (hidden if run.tensor_parallel_size > 1 else 0)


def _carried_eagerly(geometry: Geometry) -> tuple[int, int]:
    """Tensors of the hidden size in Python's frames, in the MLP and in the attention.

    The layer's input, the residual, the normed input and the step's own output.
    """
    if geometry.language_model_type in _HANDS_RESIDUAL_ON:
        return 5, 5
    return 4 + _altup_carried(geometry), 3 + _altup_carried(geometry)


def _altup_carried(geometry: Geometry) -> int:
    """Gemma 3n's parallel streams, their predictions, and what its layer keeps beside them."""
    return 2 * geometry.altup_inputs + 2 if geometry.altup_inputs else 0


def _heads(layer: Layer, run: ProfileRun) -> tuple[int, int]:
    attention = layer.attention
    queries = run.share(attention.query_heads) * attention.head_size
    keys = max(1, run.share(attention.kv_heads)) * attention.head_size
    return queries, keys


def expert_workspace(geometry: Geometry, run: ProfileRun) -> int:
    """Bytes of the scratch space of the experts, which stays once it is there.

    Source: fused_moe/experts/triton_moe.py (workspace_shapes), v1/worker/workspace.py.
    """
    experts = [layer.experts for layer in geometry.layers if layer.experts is not None]
    widest = max((_expert_elements(each, geometry.hidden_size, run) for each in experts), default=0)
    return run.tokens * widest * run.element_bytes


def _expert_elements(experts: Experts, hidden: int, run: ProfileRun) -> int:
    width = run.share(experts.intermediate_size)
    return experts.top_k * (max(width, hidden) + max(2 * width, hidden))


def sampler_peak(
    geometry: Geometry,
    run: ProfileRun,
    *,
    first_runner: bool,
    all_parameters: bool,
    multiprocessors: int,
) -> int:
    """Bytes at the peak of sampling one token for each row, the forward's output with it.

    Logits are in the model's dtype; squashing them makes a second copy
    (model_executor/layers/logits_processor.py). The first runner makes float32 logits,
    probabilities and noise (v1/sample/sampler.py, v1/sample/ops/topk_topp_sampler.py); the second
    does so with all sampling parameters (v1/worker/gpu/sample/sampler.py).
    """
    hidden = geometry.hidden_size * run.element_bytes
    if geometry.is_pooling:
        # The pooler sums in float32 (layers/pooler).
        return run.tokens * (hidden + geometry.hidden_size * _FLOAT32_BYTES)
    vocabulary = geometry.vocab_size
    row = vocabulary * run.element_bytes
    copies = 2 if geometry.softcaps_logits else 1
    if run.tensor_parallel_size > 1:
        # Gathered, then put in order.
        copies = 2
        row += run.share(vocabulary) * run.element_bytes
    logits = run.rows * max(copies * row, row + -(-vocabulary // _GUMBEL_BLOCK) * _GUMBEL_BYTES)
    if first_runner or all_parameters:
        floats = 3 * run.rows + min(run.rows, multiprocessors)
        logits = max(logits, run.rows * row + floats * vocabulary * _FLOAT32_BYTES)
    kept_rows = 2 * run.rows if first_runner else run.rows
    return logits + (run.tokens + kept_rows) * hidden


def tuning_peak(geometry: Geometry, run: ProfileRun) -> int:
    """Bytes that torch.compile holds when it tries out the kernels of a first start; 0 if eager.

    It makes up the inputs of each kernel, and those of the lookup of embeddings have a table
    among them. A later start finds the kernels in the cache (torch/_inductor/runtime).
    """
    if run.eager or run.embeds_outside:
        return 0
    hidden, per_layer = geometry.hidden_size, len(geometry.layers) * geometry.per_layer_input_size
    table = run.share(geometry.vocab_size) * hidden
    elements = table + 2 * run.tokens * hidden
    if per_layer and not geometry.altup_inputs:
        # One kernel with the first layer's projections, of about three times the hidden size.
        table = run.share(geometry.per_layer_vocab_size) * per_layer
        elements = max(elements, table + run.tokens * (2 * per_layer + 3 * hidden))
    quantized = run.tokens * hidden if run.quantized else 0
    return elements * run.element_bytes + quantized
