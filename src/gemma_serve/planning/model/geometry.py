"""The shape of a Gemma: all that its memory follows from, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Modality = Literal["image", "audio", "video"]

Group = Literal[
    "embeddings",
    "attention",
    "mlp",
    "experts",
    "norms",
    "per_layer_inputs",
    "altup",
    "rope",
    "towers",
    "buffers",
    "constants",
    "staging",
]
Split = Literal["none", "rows", "columns", "vocabulary"]

# vLLM pads a vocabulary to a multiple of this before it splits it (vocab_parallel_embedding.py).
VOCABULARY_PADDING = 64


@dataclass(frozen=True)
class Parameter:
    """Tensors of one shape that vLLM allocates: weights, buffers, tables.

    Each is a matrix of `rows`, given as stacked parts in units of `unit` rows (a head is one unit
    of head_size rows), by `columns`; there are `count` of them. `split` says along which side
    tensor parallelism divides it: rows in whole units, of which each GPU keeps at least one.
    `bytes_per_element` is None for the model's own dtype. `quantizable` matrices are the ones
    that a quantization method may replace.
    """

    name: str
    group: Group
    rows: tuple[int, ...]
    columns: int = 1
    count: int = 1
    unit: int = 1
    split: Split = "none"
    bytes_per_element: int | None = None
    quantizable: bool = False

    def rank_rows(self, tensor_parallel_size: int) -> int:
        """How many rows one GPU holds."""
        if self.split == "vocabulary":
            padded = -(-sum(self.rows) // VOCABULARY_PADDING) * VOCABULARY_PADDING
            return -(-padded // tensor_parallel_size)
        if self.split == "rows":
            parts = (max(1, -(-rows // tensor_parallel_size)) for rows in self.rows)
            return sum(parts) * self.unit
        return sum(self.rows) * self.unit

    def rank_columns(self, tensor_parallel_size: int) -> int:
        """How many columns one GPU holds."""
        if self.split == "columns":
            return -(-self.columns // tensor_parallel_size)
        return self.columns

    def rank_elements(self, tensor_parallel_size: int) -> int:
        """How many elements one GPU holds, of all `count` tensors."""
        rows = self.rank_rows(tensor_parallel_size)
        return rows * self.rank_columns(tensor_parallel_size) * self.count


@dataclass(frozen=True)
class Attention:
    """One layer's attention, of the whole model (before any tensor parallelism).

    `window` is how many tokens back the layer sees, the current one included; None is all of
    them. A layer that `shares_kv` reads the keys and values of an earlier layer and keeps none.
    `key_is_value`: the checkpoint has no value projection; vLLM allocates one all the same.
    """

    query_heads: int
    kv_heads: int
    head_size: int
    window: int | None = None
    shares_kv: bool = False
    key_is_value: bool = False


@dataclass(frozen=True)
class Experts:
    """A layer's mixture of experts, beside its dense MLP: `top_k` of `count` run for a token."""

    count: int
    top_k: int
    intermediate_size: int


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its attention and the width of its dense MLP."""

    attention: Attention
    intermediate_size: int
    experts: Experts | None = None


@dataclass(frozen=True)
class Rope:
    """A table of rotary positions: `positions` rows of `rotary_size` values.

    vLLM keeps one table for all layers whose `key` is equal.
    """

    key: tuple[object, ...]
    positions: int
    rotary_size: int


@dataclass(frozen=True)
class Tower:
    """What turns one modality into tokens: a vision or audio encoder with its projector.

    `parameters` counts the weights, of which `contents` is the list as vLLM allocates them.
    `tokens_per_item` is the most that one item (an image, a clip) can take of a prompt. Where
    the image tower serves videos too, these are a tower of their own without parameters. A tower
    that isn't `optional` is there even when only text is served.
    """

    modality: Modality
    parameters: int
    tokens_per_item: int
    contents: tuple[Parameter, ...] = ()
    optional: bool = True


@dataclass(frozen=True)
class Geometry:
    """A Gemma's architecture, read from its config.json (or the catalogue's copy of it).

    Sizes are counts of elements, tokens or heads, never bytes. `max_model_len` is the longest
    context that the model was made for. `softcaps_attention` and `softcaps_logits` say whether
    the scores are squashed with tanh; `attends_both_ways_to_images` whether an image's tokens
    see one another in both directions (vLLM's "mm prefix", which decides about backends).
    `is_pooling` marks embedding models, which generate nothing.

    `text_model_type` is the language model's own type ("gemma3_text" within a "gemma3").
    `altup_inputs` and `laurel_rank` belong to Gemma 3n. `sentence_parameters` counts the dense
    layers that a sentence embedder has after its pooling; they are no part of config.json.
    """

    model_type: str
    architecture: str
    hidden_size: int
    vocab_size: int
    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...]
    max_model_len: int
    tied_embeddings: bool = True
    softcaps_attention: bool = False
    softcaps_logits: bool = False
    attends_both_ways_to_images: bool = False
    is_pooling: bool = False
    per_layer_input_size: int = 0
    per_layer_vocab_size: int = 0
    towers: tuple[Tower, ...] = ()
    text_model_type: str = ""
    attention_bias: bool = False
    altup_inputs: int = 0
    laurel_rank: int = 0
    sentence_parameters: int = 0

    @property
    def query_heads(self) -> int:
        """Attention heads of a layer; equal in all layers of every Gemma."""
        return self.layers[0].attention.query_heads

    @property
    def largest_head_size(self) -> int:
        """The widest head of any layer."""
        return max(layer.attention.head_size for layer in self.layers)

    @property
    def language_model_type(self) -> str:
        """The model type of the language model, also where it is all that there is."""
        return self.text_model_type or self.model_type
