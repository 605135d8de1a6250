"""The KV cache as vLLM lays it out: blocks, tokens and requests, to the byte.

vLLM keeps one pool of equal blocks. Layers with the same cache spec form groups of equal size, each
group has a block table of its own, and a block holds the pages of every layer of one group. What a
request of `max_model_len` tokens takes is then a number of blocks, and everything else follows.
Sources: v1/core/kv_cache_utils.py and v1/kv_cache_interface.py (since 0.33 also
v1/core/kv_cache_planning.py and kv_cache_config_builder.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gemma_serve.errors import GemmaServeError
from gemma_serve.planning.memory.attention_backend import AttentionPlan, kv_cell_bytes
from gemma_serve.planning.memory.engine_rules import EngineRules
from gemma_serve.planning.model.geometry import Attention, Geometry

# Models whose layers look at the whole text at once keep no keys and values between steps.
_ENCODER_ONLY = ("gemma3_text", "embedding_gemma2")


@dataclass(frozen=True)
class KvCacheGroup:
    """Layers that share a block table. `page_bytes` is what each layer stores of one block.

    The pages of a group are equal unless all layers of the model see everything and differ in
    size. A group may have fewer layers than the widest one; the pool is cut for the widest.
    """

    kind: Literal["full", "sliding"]
    block_size: int
    window: int | None
    page_bytes: tuple[int, ...]

    @property
    def layers(self) -> int:
        """How many layers share the block table."""
        return len(self.page_bytes)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block of the group, over all its layers."""
        return sum(self.page_bytes)

    def blocks_per_request(self, max_model_len: int, in_flight_tokens: int) -> int:
        """Blocks that a request of `max_model_len` tokens may hold at once.

        A sliding layer keeps its window and the tokens of all batches in flight, and one block
        more since a window needn't start at a block's edge.
        Source: v1/kv_cache_interface.py, max_memory_usage_bytes of the two specs.
        """
        if self.window is None:
            return _ceil_div(max_model_len, self.block_size)
        kept = min(self.window - 1 + in_flight_tokens, max_model_len)
        return _ceil_div(kept, self.block_size) + 1


@dataclass(frozen=True)
class KvCacheCapacity:
    """What fits into a given memory. `tokens` and `max_concurrency` are vLLM's own log figures."""

    num_blocks: int
    tokens: int
    max_concurrency: float
    fits: bool


@dataclass(frozen=True)
class KvCacheLayout:
    """The KV cache of one GPU (all GPUs of a tensor-parallel group are alike).

    `in_flight_tokens` are those of all batches that may run at once. Without groups the model
    keeps no KV cache.
    """

    groups: tuple[KvCacheGroup, ...]
    max_model_len: int
    in_flight_tokens: int
    reserves_null_block: bool

    @property
    def block_size(self) -> int:
        """Tokens of the smallest block of any group, which vLLM reports as its block size."""
        return min((group.block_size for group in self.groups), default=0)

    @property
    def pool_bytes_per_block(self) -> int:
        """Bytes that one block takes of the pool: those of the widest group."""
        return max((group.bytes_per_block for group in self.groups), default=0)

    @property
    def blocks_per_request(self) -> int:
        """Blocks that one request of `max_model_len` tokens may hold."""
        return self._blocks(self.max_model_len)

    @property
    def bytes_per_sequence(self) -> int:
        """Bytes that one request of `max_model_len` tokens may hold."""
        return self.pool_bytes_per_block * self.blocks_per_request

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token more costs a request once its windows are full."""
        return sum(
            _ceil_div(self.pool_bytes_per_block, group.block_size)
            for group in self.groups
            if group.window is None
        )

    @property
    def smallest_memory(self) -> int:
        """The least bytes with which vLLM starts: one request, and the block it holds back."""
        return self.bytes_per_sequence + self._reserved_bytes

    def with_memory(
        self, available_bytes: int, *, num_gpu_blocks_override: int | None = None
    ) -> KvCacheCapacity:
        """How much the cache holds in `available_bytes` (or in an overridden number of blocks).

        `fits` is vLLM's own check at start-up. Without a KV cache everything fits, and there are
        neither tokens nor a concurrency to speak of.
        """
        if not self.groups:
            return KvCacheCapacity(num_blocks=1, tokens=0, max_concurrency=0.0, fits=True)
        blocks = self._num_blocks(available_bytes, num_gpu_blocks_override)
        available_bytes = self._available(available_bytes, num_gpu_blocks_override)
        # A float on purpose: vLLM truncates the product of this very quotient.
        concurrency = blocks / self.blocks_per_request
        return KvCacheCapacity(
            num_blocks=blocks,
            tokens=int(concurrency * self.max_model_len),
            max_concurrency=concurrency,
            fits=self._fits(self.max_model_len, available_bytes - self._reserved_bytes),
        )

    def longest_model_len(
        self, available_bytes: int, *, num_gpu_blocks_override: int | None = None
    ) -> int:
        """The longest `max_model_len`, up to the layout's own, of which one request fits; 0: none.

        Source: v1/core/kv_cache_utils.py, _estimate_max_model_len_from_groups.
        """
        usable = self._available(available_bytes, num_gpu_blocks_override) - self._reserved_bytes
        if not self._fits(1, usable):
            return 0
        low, high = 1, self.max_model_len
        while low < high:
            middle = (low + high + 1) // 2
            if self._fits(middle, usable):
                low = middle
            else:
                high = middle - 1
        return low

    def at(self, max_model_len: int, *, in_flight_tokens: int | None = None) -> KvCacheLayout:
        """The same layout for another length, and another number of tokens in flight if given."""
        in_flight = self.in_flight_tokens if in_flight_tokens is None else in_flight_tokens
        return replace(self, max_model_len=max_model_len, in_flight_tokens=in_flight)

    @property
    def _reserved_bytes(self) -> int:
        return self.pool_bytes_per_block if self.reserves_null_block else 0

    def _blocks(self, max_model_len: int) -> int:
        return sum(
            group.blocks_per_request(max_model_len, self.in_flight_tokens) for group in self.groups
        )

    def _num_blocks(self, available_bytes: int, override: int | None) -> int:
        if override is not None:
            return override
        return max(0, available_bytes) // self.pool_bytes_per_block

    def _available(self, available_bytes: int, override: int | None) -> int:
        return available_bytes if override is None else override * self.pool_bytes_per_block

    def _fits(self, max_model_len: int, usable_bytes: int) -> bool:
        if not self.groups:
            return True
        needed = self.pool_bytes_per_block * self._blocks(max_model_len)
        return usable_bytes > 0 and needed <= usable_bytes


@dataclass(frozen=True)
class _LayerSpec:
    """One layer's cache as vLLM compares layers: equal specs may share a block table."""

    window: int | None
    block_size: int
    kv_heads: int
    head_size: int
    page_bytes: int


def plan_kv_cache(
    geometry: Geometry,
    *,
    rules: EngineRules,
    attention: AttentionPlan,
    tensor_parallel_size: int,
    max_model_len: int,
    max_num_batched_tokens: int,
    async_scheduling: bool,
    hybrid_kv_cache_manager: bool = True,
) -> KvCacheLayout:
    """The KV cache of each GPU for one model and one set of settings.

    `async_scheduling` doubles the tokens in flight (VllmConfig.max_in_flight_tokens in
    config/vllm.py). `hybrid_kv_cache_manager` False is `--disable-hybrid-kv-cache-manager`.
    Raises GemmaServeError (`kv_cache_unsupported`) where this vLLM refuses to lay the cache out.
    """
    owners = [
        layer.attention
        for layer in geometry.layers
        if not layer.attention.shares_kv and not _keeps_no_kv(geometry)
    ]
    promotes = not hybrid_kv_cache_manager and any(layer.window is None for layer in owners)
    specs = [
        _layer_spec(layer, rules, attention, tensor_parallel_size, promoted=promotes)
        for layer in owners
    ]
    if promotes and not _share_a_table(specs):
        raise GemmaServeError(
            f"vLLM {rules.version} can't turn the hybrid KV cache manager off here: "
            "the model's sliding and full layers differ in block size",
            code="kv_cache_unsupported",
            hint="leave `--engine-arg disable-hybrid-kv-cache-manager` out",
        )
    return KvCacheLayout(
        groups=_groups(specs, rules, attention),
        max_model_len=max_model_len,
        in_flight_tokens=max_num_batched_tokens * (2 if async_scheduling else 1),
        reserves_null_block=rules.fit_check_reserves_null_block,
    )


def _keeps_no_kv(geometry: Geometry) -> bool:
    return geometry.is_pooling and geometry.model_type in _ENCODER_ONLY


def _layer_spec(
    layer: Attention,
    rules: EngineRules,
    plan: AttentionPlan,
    tensor_parallel_size: int,
    *,
    promoted: bool,
) -> _LayerSpec:
    """One layer's spec on one GPU. KV heads are copied where there are fewer than GPUs.

    `promoted`: without the hybrid manager a sliding layer keeps everything, like a full one.
    Source: v1/core/kv_cache_utils.py, unify_hybrid_kv_cache_specs.
    """
    kv_heads = max(1, layer.kv_heads // tensor_parallel_size)
    sliding = layer.window is not None
    block_size = plan.block_size
    if sliding and not (promoted and not rules.promotion_keeps_sliding_block):
        block_size = plan.sliding_block_size(layer.head_size)
    cell = kv_cell_bytes(
        plan.kv_cache_dtype,
        plan.dtype,
        layer.head_size,
        rules=rules,
        sliding=sliding and not promoted,
    )
    return _LayerSpec(
        window=None if promoted else layer.window,
        block_size=block_size,
        kv_heads=kv_heads,
        head_size=layer.head_size,
        page_bytes=block_size * kv_heads * cell,
    )


def _groups(
    specs: Sequence[_LayerSpec], rules: EngineRules, plan: AttentionPlan
) -> tuple[KvCacheGroup, ...]:
    """Source: v1/core/kv_cache_utils.py, get_kv_cache_groups."""
    if not specs:
        return ()
    if _share_a_table(specs):
        return (_group(specs),)
    specs = _with_equal_pages(specs, rules, plan)
    kinds: dict[_LayerSpec, list[_LayerSpec]] = {}
    for spec in specs:
        kinds.setdefault(spec, []).append(spec)
    sizes = [len(layers) for layers in kinds.values()]
    # vLLM pads to the larger kind where that wastes little.
    size = max(sizes) if max(sizes) < min(sizes) * 1.5 else min(sizes)
    return tuple(
        _group(layers[index :: _ceil_div(len(layers), size)])
        for layers in kinds.values()
        for index in range(_ceil_div(len(layers), size))
    )


def _share_a_table(specs: Iterable[_LayerSpec]) -> bool:
    """Whether all layers need the same blocks: one block size, and one window or none at all."""
    return len({(spec.block_size, spec.window) for spec in specs}) == 1


def _group(specs: Sequence[_LayerSpec]) -> KvCacheGroup:
    return KvCacheGroup(
        kind="full" if specs[0].window is None else "sliding",
        block_size=specs[0].block_size,
        window=specs[0].window,
        page_bytes=tuple(spec.page_bytes for spec in specs),
    )


def _with_equal_pages(
    specs: Sequence[_LayerSpec], rules: EngineRules, plan: AttentionPlan
) -> list[_LayerSpec]:
    """Longer blocks for the layers with smaller pages; pages that don't divide are padded.

    Source: v1/core/kv_cache_utils.py, unify_kv_cache_spec_page_size.
    """
    largest = max(spec.page_bytes for spec in specs)
    unified = []
    for spec in specs:
        ratio, remainder = divmod(largest, spec.page_bytes)
        if remainder and plan.device == "cpu" and not rules.cpu_pads_unaligned_pages:
            raise GemmaServeError(
                f"vLLM {rules.version} can't bring the KV pages of this model's layers to one "
                "size on the CPU",
                code="kv_cache_unsupported",
                hint="use vLLM 0.29 or later",
            )
        unified.append(
            replace(spec, page_bytes=largest)
            if remainder
            else replace(spec, block_size=spec.block_size * ratio, page_bytes=largest)
        )
    return unified


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
