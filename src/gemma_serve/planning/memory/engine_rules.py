"""What differs between vLLM's releases, as values to plan with.

The table itself is data (`data/engine_rules.yaml`); this is its shape and the choice of the rules
for one version. Releases of one minor version are taken as equal: vLLM changes no default in them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

GIB = 2**30

_NEEDS = "quantization_capabilities"
_RELEASE = re.compile(r"v?(\d+)\.(\d+)(?!\d)")


@dataclass(frozen=True)
class BatchTier:
    """The defaults that `vllm serve` takes on a device with at least this much memory.

    Passed over where the device's name contains one of `except_names` (in lower case) or its
    compute capability is one of `except_capabilities`. Source: engine/arg_utils.py,
    get_batch_defaults.
    """

    memory_bytes: int
    max_num_batched_tokens: int
    max_num_seqs: int
    except_names: tuple[str, ...] = ()
    except_capabilities: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class FlashAttentionRules:
    """Which FlashAttention kernels a release uses, where that decides about blocks.

    Source: v1/attention/backends/fa_utils.py (get_flash_attn_version,
    flash_attn_supports_kv_cache_dtype) and flash_attn.py.
    """

    blackwell_fa4_head_256: Literal["no", "yes", "in blocks of 128"]
    fp8_kv_on_blackwell: bool
    fp8_kv_on_hopper_head_512: bool
    hopper_fp8_head_512_block_size: int | None


@dataclass(frozen=True)
class EngineRules:
    """The rules of one minor version of vLLM; `release` is that version, like (0, 32).

    `fit_check_reserves_null_block`: whether the start-up check holds one block back.
    `sliding_block_follows_cache_block`: whether a sliding-window layer takes the largest block
    that the cache's block size holds; else the smallest that its backend has.
    `cpu_pads_unaligned_pages`: whether the CPU backend can pad the pages of layers that no whole
    number of blocks brings to one size. `promotion_keeps_sliding_block`: whether, without the
    hybrid KV cache manager, sliding layers keep a block size of their own.
    `drafters_without_async`: the speculative methods that turn async scheduling off.
    `first_layer_decides_block_size`: whether one backend alone sets the cache's block size;
    `blocks_by_layer`: whether a backend's block depends on the layer's head size, not the model's.
    `triton_flash_attn_versions`: the FlashAttention versions that may stand beside Triton for
    models that look at images in both directions; empty where vLLM has no such backend.
    `quantization_capabilities`: the least compute capability of a method, where there is one;
    `blackwell_quantization_methods` run on 10.x only, `expert_quantization_methods` quantize
    nothing but experts, `cpu_online_quantization_methods` quantize while loading on the CPU.
    `quantization_overrides`: which methods may be asked for where a checkpoint stores another.
    """

    release: tuple[int, int]
    default_gpu_memory_utilization: float
    fit_check_reserves_null_block: bool
    sliding_block_follows_cache_block: bool
    cpu_pads_unaligned_pages: bool
    promotion_keeps_sliding_block: bool
    int4_sliding_pages_are_full: bool
    cpu_kernel_block_size: int
    kv_cache_dtypes: tuple[str, ...]
    checkpoint_quantization_methods: tuple[str, ...]
    online_quantization_methods: tuple[str, ...]
    cpu_online_quantization_methods: tuple[str, ...]
    expert_quantization_methods: tuple[str, ...]
    blackwell_quantization_methods: tuple[str, ...]
    quantization_capabilities: Mapping[str, tuple[int, int]]
    quantization_overrides: Mapping[str, tuple[str, ...]]
    batch_tiers: tuple[BatchTier, ...]
    cpu_batch_tier: BatchTier
    drafters_without_async: tuple[str, ...]
    flash_attention: FlashAttentionRules
    first_layer_decides_block_size: bool
    blocks_by_layer: bool
    triton_flash_attn_versions: tuple[int, ...]
    triton_flashinfer_block_size: int | None
    nvfp4_kv_before_blackwell: bool
    text_only_clears_mm_prefix: bool
    architectures: frozenset[str]

    @property
    def version(self) -> str:
        """The release as people write it: "0.32"."""
        return f"{self.release[0]}.{self.release[1]}"


EngineRulesTable = tuple[EngineRules, ...]


def parse_engine_rules(entries: Sequence[Mapping[str, Any]]) -> EngineRulesTable:
    """The rules of every known release, oldest first, from the entries of the data file.

    Each entry says what changed since the one before it; of `quantization_capabilities`, which
    methods did. Raises KeyError or TypeError where the first entry lacks a rule or a later one
    names a rule that doesn't exist.
    """
    table: list[EngineRules] = []
    rules: dict[str, Any] = {}
    for entry in entries:
        change = dict(entry)
        release = _release(change.pop("since"))
        added = change.pop("new_architectures", ())
        needs = {**rules.get(_NEEDS, {}), **_rule(_NEEDS, change.pop(_NEEDS, {}))}
        rules = {**rules, **{name: _rule(name, value) for name, value in change.items()}}
        rules[_NEEDS] = needs
        rules["architectures"] = frozenset(rules["architectures"]) | frozenset(added)
        table.append(EngineRules(release=release or (0, 0), **rules))
    return tuple(table)


def rules_for(version: str | None, table: EngineRulesTable) -> tuple[EngineRules, bool]:
    """The rules for a version of vLLM, and whether they are known to be that version's.

    Pre-releases, development builds and local versions ("0.33.0rc1", "0.32.0+cpu") count as the
    minor version that they lead to. Outside of the known range the nearest known rules are given
    with False, and the newest for a version that is None or can't be read.
    """
    release = _release(version) if version else None
    if release is None:
        return table[-1], False
    older = [rules for rules in table if rules.release <= release]
    nearest = older[-1] if older else table[0]
    return nearest, nearest.release == release


def least_version(architecture: str, table: EngineRulesTable) -> str | None:
    """The first known release of vLLM that serves an architecture; None if none does."""
    return next((rules.version for rules in table if architecture in rules.architectures), None)


def is_older(version: str, than: str) -> bool:
    """Whether a version of vLLM comes before another; False where either can't be read."""
    this, other = _release(version), _release(than)
    return this is not None and other is not None and this < other


def _release(version: str) -> tuple[int, int] | None:
    match = _RELEASE.match(version.strip())
    return (int(match[1]), int(match[2])) if match else None


def _rule(name: str, value: Any) -> Any:
    if name == "batch_tiers":
        return tuple(_batch_tier(tier) for tier in value)
    if name == "cpu_batch_tier":
        return _batch_tier(value)
    if name == "flash_attention":
        return FlashAttentionRules(**value)
    if name == _NEEDS:
        return {method: _release(capability) for method, capability in value.items()}
    if name == "quantization_overrides":
        return {method: tuple(names) for method, names in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _batch_tier(tier: Mapping[str, Any]) -> BatchTier:
    return BatchTier(
        memory_bytes=tier["memory_gib"] * GIB,
        max_num_batched_tokens=tier["max_num_batched_tokens"],
        max_num_seqs=tier["max_num_seqs"],
        except_names=tuple(tier.get("except_names", ())),
        except_capabilities=tuple(
            release for text in tier.get("except_capabilities", ()) if (release := _release(text))
        ),
    )
