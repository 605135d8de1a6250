"""Settings for which vLLM's KV cache and the planner's are compared, and the planner's answer."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

from gemma_serve.errors import GemmaServeError
from gemma_serve.planning.memory.attention_backend import choose_attention, start_refusal
from gemma_serve.planning.memory.engine_rules import EngineRules
from gemma_serve.planning.memory.kv_cache import plan_kv_cache
from gemma_serve.planning.memory.tensor_parallel import illegal_tensor_parallel_reason
from gemma_serve.planning.model.geometry import Geometry
from kv_models import MODELS

GIB = 2**30
GPUS = ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0))
KV_DTYPES = ("auto", "fp8", "fp8_e5m2", "bfloat16", "nvfp4")
KV_DTYPES += ("int4_per_token_head", "int8_per_token_head", "fp8_per_token_head")
BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION")
LENGTHS = (512, 1000, 2048, 4097, 8192, 12345, 16384, 32768, 65536, 100003, 131072, 262144)
BATCHES = (256, 512, 2048, 2500, 4096, 8192, 16384)


@dataclass(frozen=True)
class Case:
    """One model on one device with one set of settings."""

    model: str
    capability: tuple[int, int] | None = (9, 0)
    dtype: str = "bfloat16"
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1
    max_model_len: int = 8192
    max_num_batched_tokens: int = 8192
    async_scheduling: bool = True
    available_bytes: int = 10 * GIB
    block_size: int | None = None
    attention_backend: str | None = None
    hybrid_kv_cache_manager: bool = True
    num_gpu_blocks_override: int | None = None


def case_of(values: dict[str, Any]) -> Case:
    """A case as it was written down: only what differs from the defaults."""
    if values.get("capability") is not None:
        values = {**values, "capability": tuple(values["capability"])}
    return Case(**values)


def written(case: Case) -> dict[str, Any]:
    """What of a case differs from the defaults."""
    defaults = asdict(Case(case.model))
    return {
        name: value
        for name, value in asdict(case).items()
        if name == "model" or value != defaults[name]
    }


def question(case: Case, geometry: Geometry) -> dict[str, Any]:
    """The case as `vllm_kv_child.py` takes it."""
    return {
        **asdict(case),
        "layers": [
            {
                "kv_heads": layer.attention.kv_heads,
                "head_size": layer.attention.head_size,
                "window": layer.attention.window,
                "shares_kv": layer.attention.shares_kv,
            }
            for layer in geometry.layers
        ],
        "query_heads": geometry.query_heads,
        "model_type": geometry.model_type,
        "softcaps": geometry.softcaps_attention,
        "mm_prefix": geometry.attends_both_ways_to_images,
    }


def planned(case: Case, geometry: Geometry, rules: EngineRules) -> dict[str, Any]:
    """The planner's answer, with the keys of `vllm_kv_child.py`."""
    attention = choose_attention(
        geometry,
        rules=rules,
        capability=case.capability,
        dtype=case.dtype,
        kv_cache_dtype=case.kv_cache_dtype,
        block_size=case.block_size,
        attention_backend=case.attention_backend,
    )
    if attention.unsupported or start_refusal(attention, case.capability):
        return {"refused": True}
    try:
        layout = plan_kv_cache(
            geometry,
            rules=rules,
            attention=attention,
            tensor_parallel_size=case.tensor_parallel_size,
            max_model_len=case.max_model_len,
            max_num_batched_tokens=case.max_num_batched_tokens,
            async_scheduling=case.async_scheduling,
            hybrid_kv_cache_manager=case.hybrid_kv_cache_manager,
        )
    except GemmaServeError:
        return {"refused": True}
    override = case.num_gpu_blocks_override
    capacity = layout.with_memory(case.available_bytes, num_gpu_blocks_override=override)
    answer: dict[str, Any] = {
        "backends": list(attention.backends),
        "cache_block_size": attention.block_size,
        "fits": capacity.fits,
    }
    if not capacity.fits:
        longest = layout.longest_model_len(case.available_bytes, num_gpu_blocks_override=override)
        return {**answer, "longest_model_len": longest}
    return {
        **answer,
        "groups": sorted([group.block_size, group.layers] for group in layout.groups),
        "num_blocks": capacity.num_blocks,
        "tokens": capacity.tokens,
        "max_concurrency": capacity.max_concurrency,
    }


def grid() -> list[Case]:
    """Every model at every legal tensor parallelism, with bf16 and fp8 KV, on an H100."""
    return [
        Case(
            model,
            kv_cache_dtype=kv_cache_dtype,
            tensor_parallel_size=size,
            max_model_len=length,
            max_num_batched_tokens=batch,
        )
        for model in MODELS
        for size, length, batch in (
            (1, 8192, 8192),
            (2, 8192, 2048),
            (4, 4096, 512),
            (8, 8000, 2048),
        )
        if illegal_tensor_parallel_reason(MODELS[model], size) is None
        for kv_cache_dtype in ("auto", "fp8")
    ]


def drawn(count: int, seed: int) -> list[Case]:
    """Cases at random, on all kinds of GPU and on the CPU."""
    rng = random.Random(seed)
    return [_draw(rng) for _ in range(count)]


def _draw(rng: random.Random) -> Case:
    model = rng.choice(list(MODELS))
    sizes = [
        size for size in (1, 2, 4, 8) if not illegal_tensor_parallel_reason(MODELS[model], size)
    ]
    capability = rng.choice(GPUS) if rng.random() < 0.8 else None
    block_sizes = (16, 32, 64, 128, 256) if capability else (32, 64, 128, 256)
    return Case(
        model=model,
        capability=capability,
        dtype=rng.choice(("bfloat16", "bfloat16", "bfloat16", "float16", "float32")),
        kv_cache_dtype=_draw_kv_dtype(rng, capability),
        tensor_parallel_size=rng.choice(sizes),
        max_model_len=rng.choice(LENGTHS),
        max_num_batched_tokens=rng.choice(BATCHES),
        async_scheduling=capability is not None and rng.random() < 0.8,
        available_bytes=int(GIB * 2 ** rng.uniform(-4, 7)),
        block_size=rng.choice(block_sizes) if rng.random() < 0.25 else None,
        attention_backend=rng.choice(BACKENDS) if capability and rng.random() < 0.2 else None,
        hybrid_kv_cache_manager=rng.random() < 0.85,
        num_gpu_blocks_override=rng.randrange(1, 50_000) if rng.random() < 0.05 else None,
    )


def _draw_kv_dtype(rng: random.Random, capability: tuple[int, int] | None) -> str:
    if capability is None:
        return rng.choice(("auto", "fp8"))
    return rng.choice(("auto", "auto", "fp8", *KV_DTYPES))
