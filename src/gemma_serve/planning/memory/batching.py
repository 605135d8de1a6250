"""How many tokens and requests vLLM runs at once: its defaults, clamps and refusals.

Sources: engine/arg_utils.py (get_batch_defaults,
_set_default_max_num_seqs_and_batched_tokens_args), config/scheduler.py (verify_max_model_len),
config/vllm.py (async scheduling), v1/core/encoder_cache_manager.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemma_serve.errors import Problem
from gemma_serve.planning.memory.engine_rules import BatchTier, EngineRules
from gemma_serve.planning.model.geometry import Geometry


@dataclass(frozen=True)
class Device:
    """What vLLM's defaults depend on. `capability` is None on the CPU build.

    `memory_bytes` is the GPU's whole memory, as the driver reports it.
    """

    memory_bytes: int = 0
    name: str = ""
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Batching:
    """What one step of the engine may hold.

    `raised_for` is the modality for which the default batch was raised, since none of its items
    may be cut; "" if it wasn't. `problems` are what vLLM refuses to start with.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    async_scheduling: bool
    chunked_prefill: bool
    raised_for: str = ""
    problems: tuple[Problem, ...] = ()

    @property
    def in_flight_tokens(self) -> int:
        """Tokens of all the batches that may run at once (VllmConfig.max_in_flight_tokens)."""
        return self.max_num_batched_tokens * (2 if self.async_scheduling else 1)


def default_batching(
    geometry: Geometry,
    *,
    rules: EngineRules,
    device: Device,
    tensor_parallel_size: int,
    max_model_len: int,
    max_num_batched_tokens: int | None = None,
    max_num_seqs: int | None = None,
    async_scheduling: bool | None = None,
    chunked_prefill: bool | None = None,
    speculative_method: str | None = None,
    throughput_mode: bool = False,
    text_only: bool = False,
) -> Batching:
    """The batch that `vllm serve` will run, from what the user fixed (None: not fixed).

    `throughput_mode` is `--performance-mode throughput`; `text_only` is `--language-model-only`.
    """
    chunked = not geometry.is_pooling if chunked_prefill is None else chunked_prefill
    tier, factor = _tier(rules, device), tensor_parallel_size if device.capability is None else 1
    factor *= 2 if throughput_mode else 1
    seqs = max_num_seqs or tier.max_num_seqs * factor
    tokens, raised_for = max_num_batched_tokens or 0, ""
    largest = largest_item(geometry, rules, text_only)
    if max_num_batched_tokens is None:
        tokens = tier.max_num_batched_tokens * factor
        if not chunked:
            tokens = max(tokens, max_model_len)
        if largest is not None and largest[0] > tokens:
            tokens, raised_for = largest
        tokens = min(tokens, seqs * max_model_len)
    if max_num_seqs is None:
        seqs = min(seqs, tokens)
    return Batching(
        max_num_batched_tokens=tokens,
        max_num_seqs=seqs,
        async_scheduling=_async_scheduling(
            geometry, rules, device, async_scheduling, speculative_method
        ),
        chunked_prefill=chunked,
        raised_for=raised_for,
        problems=_problems(tokens, seqs, max_model_len, chunked, largest),
    )


def _tier(rules: EngineRules, device: Device) -> BatchTier:
    if device.capability is None:
        return rules.cpu_batch_tier
    return next(
        tier
        for tier in rules.batch_tiers
        if device.memory_bytes >= tier.memory_bytes
        and not any(name in device.name.lower() for name in tier.except_names)
        and device.capability not in tier.except_capabilities
    )


def largest_item(geometry: Geometry, rules: EngineRules, text_only: bool) -> tuple[int, str] | None:
    """The most tokens that one item takes, and its modality, where items can't be cut.

    They can't where images are seen both ways; None where they can, or there are none.
    """
    if not geometry.attends_both_ways_to_images or (text_only and rules.text_only_clears_mm_prefix):
        return None
    return max(((tower.tokens_per_item, tower.modality) for tower in geometry.towers), default=None)


def _async_scheduling(
    geometry: Geometry,
    rules: EngineRules,
    device: Device,
    wanted: bool | None,
    speculative_method: str | None,
) -> bool:
    """Source: config/vllm.py; the CPU platform switches it off whatever was asked for."""
    if device.capability is None:
        return False
    if wanted is not None:
        return wanted
    if geometry.is_pooling:
        return False
    return speculative_method not in rules.drafters_without_async


def _problems(
    tokens: int, seqs: int, max_model_len: int, chunked: bool, largest: tuple[int, str] | None
) -> tuple[Problem, ...]:
    problems = []
    if not chunked and tokens < max_model_len:
        problems.append(
            Problem(
                "plan.batch_too_small",
                f"without chunked prefill a batch of {tokens} tokens can't hold a request of "
                f"{max_model_len}",
                f"say `--max-num-batched-tokens {max_model_len}` or `--max-model-len {tokens}`",
            )
        )
    if tokens < seqs:
        problems.append(
            Problem(
                "plan.batch_too_small",
                f"a batch of {tokens} tokens can't hold one token of each of {seqs} requests",
                f"say `--max-num-batched-tokens {seqs}` or `--max-num-seqs {tokens}`",
            )
        )
    if largest is not None and tokens < largest[0]:
        problems.append(
            Problem(
                "mm-batch-too-small",
                f"one {largest[1]} takes up to {largest[0]} tokens and can't be cut, but a batch "
                f"holds {tokens}",
                f"say `--max-num-batched-tokens {largest[0]}`, or serve text alone with "
                "`--language-model-only`",
            )
        )
    return tuple(problems)
