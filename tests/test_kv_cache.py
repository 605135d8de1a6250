"""The KV cache's layout: vLLM's own answers, worked numbers, and a slow reading of the formulas."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_serve.adapters.package_data import load_engine_rules
from gemma_serve.errors import GemmaServeError
from gemma_serve.planning.memory.attention_backend import choose_attention
from gemma_serve.planning.memory.engine_rules import rules_for
from gemma_serve.planning.memory.kv_cache import KvCacheCapacity, plan_kv_cache
from gemma_serve.planning.memory.tensor_parallel import illegal_tensor_parallel_reason
from gemma_serve.planning.model.geometry import Attention
from kv_cases import case_of, planned
from kv_models import MODELS, make_geometry
from make_kv_golden import shortened

GIB = 2**30
TABLE = load_engine_rules()
ROWS = json.loads((Path(__file__).parent / "data" / "kv_golden.json").read_text())["rows"]
VERSIONS = ("0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")


def rules_of(version):
    return rules_for(version, TABLE)[0]


def layout_of(
    geometry,
    *,
    capability=(9, 0),
    version="0.32.0",
    kv_cache_dtype="auto",
    tensor_parallel_size=1,
    max_model_len=8192,
    max_num_batched_tokens=8192,
    async_scheduling=True,
    hybrid=True,
):
    rules = rules_of(version)
    attention = choose_attention(
        geometry,
        rules=rules,
        capability=capability,
        dtype="bfloat16",
        kv_cache_dtype=kv_cache_dtype,
    )
    assert attention.unsupported is None
    return plan_kv_cache(
        geometry,
        rules=rules,
        attention=attention,
        tensor_parallel_size=tensor_parallel_size,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        async_scheduling=async_scheduling,
        hybrid_kv_cache_manager=hybrid,
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_the_plan_equals_what_the_functions_of_each_vllm_answered(version):
    rules, known = rules_for(version, TABLE)
    assert known
    differences = []
    for row in ROWS:
        case = case_of(row["case"])
        (expected,) = (e["result"] for e in row["answers"] if version in e["versions"])
        answer = shortened(planned(case, MODELS[case.model], rules))
        if answer != expected:
            differences.append((row["case"], answer, expected))
    assert differences == []


def test_the_golden_file_holds_every_model_at_every_legal_parallelism_and_both_kv_dtypes():
    held = {
        (case.model, case.tensor_parallel_size, case.kv_cache_dtype)
        for case in (case_of(row["case"]) for row in ROWS)
    }
    wanted = {
        (model, size, kv_cache_dtype)
        for model, geometry in MODELS.items()
        for size in (1, 2, 4, 8)
        if illegal_tensor_parallel_reason(geometry, size) is None
        for kv_cache_dtype in ("auto", "fp8")
    }
    assert wanted <= held


# Printed by vLLM 0.32 for 10 GiB and a length of 8192: bytes of a block in the pool, bytes of a
# further token, bytes of a request and tokens with 16,384 and with 4,096 tokens in flight.
WORKED = {
    "gemma-2b": (294_912, 18_432, 150_994_944, 582_528, 150_994_944, 582_528),
    "gemma-7b": (7_340_032, 458_752, 3_758_096_384, 23_392, 3_758_096_384, 23_392),
    "gemma-2-2b": (851_968, 53_248, 873_267_200, 100_725, 873_267_200, 100_725),
    "gemma-2-9b": (2_752_512, 172_032, 2_821_324_800, 31_169, 2_821_324_800, 31_169),
    "gemma-2-27b": (3_014_656, 188_416, 3_090_022_400, 28_460, 3_090_022_400, 28_460),
    "gemma-3-270m": (49_152, 3_072, 151_240_704, 581_594, 96_190_464, 914_444),
    "gemma-3-1b": (65_536, 4_096, 235_274_240, 373_865, 147_193_856, 597_585),
    "gemma-3-4b": (327_680, 20_480, 1_176_371_200, 74_773, 798_883_840, 110_104),
    "gemma-3-12b": (1_048_576, 65_536, 3_226_468_352, 27_262, 2_219_835_392, 39_624),
    "gemma-3-27b": (1_310_720, 81_920, 4_705_484_800, 18_693, 3_195_535_360, 27_526),
    "gemma-3n-E2B": (131_072, 8_192, 336_068_608, 261_735, 218_628_096, 402_331),
    "gemma-3n-E4B": (131_072, 8_192, 336_068_608, 261_735, 218_628_096, 402_331),
    "gemma-4-E2B": (98_304, 6_144, 151_388_160, 581_025, 107_347_968, 819_395),
    "gemma-4-E4B": (262_144, 16_384, 471_072_768, 186_724, 324_272_128, 271_256),
    "gemma-4-12B": (1_048_576, 16_384, 2_823_815_168, 31_149, 1_817_182_208, 48_405),
    "gemma-4-26B-A4B": (655_360, 20_480, 1_848_770_560, 47_578, 1_219_624_960, 72_121),
    "gemma-4-31B": (2_621_440, 81_920, 7_395_082_240, 11_894, 4_878_499_840, 18_030),
}


@pytest.mark.parametrize("model", WORKED)
def test_the_worked_numbers(model):
    block, token, *by_batch = WORKED[model]
    for batch, (request, tokens) in zip((8192, 2048), (by_batch[:2], by_batch[2:]), strict=True):
        layout = layout_of(MODELS[model], max_num_batched_tokens=batch)
        found = (
            layout.pool_bytes_per_block,
            layout.bytes_per_token,
            layout.bytes_per_sequence,
            layout.with_memory(10 * GIB).tokens,
        )
        assert found == (block, token, request, tokens)


@pytest.mark.parametrize(
    ("model", "kv_bytes", "length", "expected"),
    [
        ("gemma-3-1b", 4 * GIB, 4096, (8192, 212_369, "51.85")),
        ("gemma-3-270m", 1 * GIB, 2048, (2730, 55_356, "27.03")),
    ],
)
def test_the_worked_numbers_of_the_cpu_build(model, kv_bytes, length, expected):
    layout = layout_of(
        MODELS[model],
        capability=None,
        max_model_len=length,
        max_num_batched_tokens=2048,
        async_scheduling=False,
    )
    capacity = layout.with_memory(kv_bytes)
    found = (capacity.num_blocks, capacity.tokens, f"{capacity.max_concurrency:.2f}")
    assert (layout.block_size, *found) == (128, *expected)


def test_tensor_parallelism_splits_kv_heads_and_copies_what_it_can_not_split():
    geometry = MODELS["gemma-4-31B"]
    sizes = {
        size: layout_of(
            geometry, tensor_parallel_size=size, max_num_batched_tokens=2048
        ).bytes_per_sequence
        for size in (1, 2, 8)
    }
    assert sizes == {1: 4_878_499_840, 2: 2_439_249_920, 8: 693_698_560}
    (full,) = (
        group
        for group in layout_of(geometry, tensor_parallel_size=8).groups
        if group.kind == "full"
    )
    assert full.block_size == 16  # 4 global heads on 8 GPUs: copied, so their page has doubled


def test_without_the_hybrid_manager_every_layer_keeps_the_whole_request():
    layout = layout_of(MODELS["gemma-3-27b"], hybrid=False)
    assert [(group.kind, group.layers) for group in layout.groups] == [("full", 62)]
    assert layout.bytes_per_sequence == int(3.875 * GIB)


def test_an_older_vllm_can_not_turn_the_hybrid_manager_off_on_the_cpu():
    with pytest.raises(GemmaServeError, match="can't turn the hybrid KV cache manager off"):
        layout_of(MODELS["gemma-3-1b"], capability=None, version="0.26.0", hybrid=False)


def test_an_older_vllm_can_not_pad_pages_on_the_cpu():
    layers = [Attention(6, 3, 128, window=64)] * 2 + [Attention(6, 2, 256)]
    geometry = make_geometry(layers, model_type="gemma4", max_model_len=8192)
    with pytest.raises(GemmaServeError, match="can't bring the KV pages"):
        layout_of(geometry, capability=None, version="0.28.0")
    padded = layout_of(geometry, capability=None, version="0.29.0")
    assert {group.page_bytes for group in padded.groups} == {(128 * 2 * 256 * 4,)}


def test_an_embedding_model_that_sees_everything_keeps_no_kv_cache():
    geometry = make_geometry(
        [Attention(3, 1, 256, window=512)] * 24,
        model_type="gemma3_text",
        architecture="Gemma3TextModel",
        max_model_len=2048,
        pooling=True,
    )
    layout = layout_of(geometry, max_model_len=2048)
    assert layout.groups == ()
    assert (layout.bytes_per_sequence, layout.block_size, layout.smallest_memory) == (0, 0, 0)
    assert layout.with_memory(0) == KvCacheCapacity(1, 0, 0.0, True)
    assert layout.longest_model_len(0) == 2048


@pytest.mark.parametrize(("version", "held_back"), [("0.28.0", 0), ("0.29.0", 1)])
def test_the_fit_check_holds_the_null_block_back_since_0_29(version, held_back):
    layout = layout_of(MODELS["gemma-7b"], version=version)
    needed = layout.bytes_per_sequence + held_back * layout.pool_bytes_per_block
    assert layout.smallest_memory == needed
    assert layout.with_memory(needed).fits
    assert not layout.with_memory(needed - 1).fits
    assert layout.longest_model_len(needed - 1) == 8192 - 16


def test_an_override_of_the_blocks_replaces_the_memory_everywhere():
    layout = layout_of(MODELS["gemma-3-4b"])
    capacity = layout.with_memory(0, num_gpu_blocks_override=5000)
    assert capacity == layout.with_memory(5000 * layout.pool_bytes_per_block)
    assert capacity.num_blocks == 5000
    assert layout.longest_model_len(0, num_gpu_blocks_override=5000) == 8192


def test_no_memory_holds_nothing():
    layout = layout_of(MODELS["gemma-3-4b"])
    for available in (0, -GIB):
        assert layout.with_memory(available) == KvCacheCapacity(0, 0, 0.0, False)
        assert layout.longest_model_len(available) == 0


@pytest.mark.parametrize(
    ("model", "size", "reason"),
    [
        ("gemma-3-1b", 4, None),
        ("gemma-3-1b", 8, "The model's 4 attention heads can't be split over 8."),
        ("gemma-4-12B", 16, None),
        ("gemma-7b", 3, "The model's 16 attention heads can't be split over 3."),
        ("gemma-7b", 0, "The tensor parallel size must be at least 1."),
    ],
)
def test_legal_tensor_parallel_sizes(model, size, reason):
    assert illegal_tensor_parallel_reason(MODELS[model], size) == reason


def test_kv_heads_that_can_be_neither_split_nor_copied_are_refused():
    geometry = make_geometry([Attention(12, 4, 64)], model_type="gemma", max_model_len=8192)
    reason = illegal_tensor_parallel_reason(geometry, 6)
    assert reason == "The model's 4 KV heads can be neither split nor copied over 6."


@st.composite
def hybrid_models(draw):
    """Layers of two kinds in a pattern, as Gemmas have them, with sizes of our own."""
    period = draw(st.integers(1, 7))
    count = draw(st.integers(1, 40))
    heads, ratio = draw(st.sampled_from((1, 2, 4))), draw(st.sampled_from((1, 2, 4)))
    window = draw(st.integers(1, 600))
    shared = draw(st.integers(0, count - 1))
    whole_is_larger = draw(st.booleans())
    sizes = (64, 64 * ratio) if whole_is_larger else (64 * ratio, 64)
    layers = [
        Attention(
            8,
            heads,
            sizes[0] if (index + 1) % period else sizes[1],
            window=window if (index + 1) % period else None,
            shares_kv=index >= count - shared,
        )
        for index in range(count)
    ]
    return make_geometry(layers, model_type="gemma3", max_model_len=3000)


def read_slowly(geometry, length, in_flight, block_size):
    """(blocks of a request, bytes of a block), straight from what vLLM's documentation says."""
    owners = [layer.attention for layer in geometry.layers if not layer.attention.shares_kv]
    kinds = Counter((layer.window, layer.kv_heads, layer.head_size) for layer in owners)
    if len({window for window, *_ in kinds}) == 1:
        # One table for all layers: a block holds a page of each.
        (window,) = {window for window, *_ in kinds}
        pages = sum(block_size * kv * head * 4 * n for (_, kv, head), n in kinds.items())
        return blocks_of(window, block_size, length, in_flight), pages
    largest = max(block_size * kv * head * 4 for _, kv, head in kinds)
    least, most = min(kinds.values()), max(kinds.values())
    size = most if most < 1.5 * least else least
    blocks = 0
    for (window, kv, head), count in kinds.items():
        longer = largest // (kv * head * 4)  # tokens that fill the largest page
        for _ in range(0, count, size):
            blocks += blocks_of(window, longer, length, in_flight)
    return blocks, largest * size


def blocks_of(window, block_size, length, in_flight):
    if window is None:
        return len({position // block_size for position in range(length)})
    return len(range(0, min(window - 1 + in_flight, length), block_size)) + 1


@given(
    geometry=hybrid_models(),
    length=st.integers(1, 3000),
    batch=st.integers(1, 2000),
    asynchronous=st.booleans(),
    available=st.integers(0, 2**27),
)
def test_any_model_is_laid_out_as_a_slow_reading_says(
    geometry, length, batch, asynchronous, available
):
    layout = layout_of(
        geometry,
        max_model_len=length,
        max_num_batched_tokens=batch,
        async_scheduling=asynchronous,
    )
    blocks, block_bytes = read_slowly(geometry, length, batch * (1 + asynchronous), 16)
    assert (layout.blocks_per_request, layout.pool_bytes_per_block) == (blocks, block_bytes)
    concurrency = available // block_bytes / blocks
    assert layout.with_memory(available) == KvCacheCapacity(
        num_blocks=available // block_bytes,
        tokens=int(concurrency * length),
        max_concurrency=concurrency,
        fits=blocks * block_bytes <= available - block_bytes,
    )


@given(geometry=hybrid_models(), available=st.integers(0, 2**26), batch=st.integers(1, 700))
def test_the_longest_length_fits_and_the_next_does_not(geometry, available, batch):
    layout = layout_of(geometry, max_model_len=3000, max_num_batched_tokens=batch)
    longest = layout.longest_model_len(available)
    assert all(layout.at(n).with_memory(available).fits for n in {1, longest} if longest)
    if longest < 3000:
        assert not layout.at(longest + 1).with_memory(available).fits


@given(geometry=hybrid_models(), available=st.integers(1, 2**27))
def test_what_fits_serves_at_least_one_request_and_half_the_bytes_serve_twice_as_many(
    geometry, available
):
    layout = layout_of(geometry)
    halved = layout_of(geometry, kv_cache_dtype="fp8")
    assert halved.bytes_per_sequence * 2 == layout.bytes_per_sequence
    if layout.with_memory(available).fits:
        assert layout.with_memory(available).max_concurrency >= 1
        assert halved.with_memory(available).num_blocks in (
            2 * layout.with_memory(available).num_blocks,
            2 * layout.with_memory(available).num_blocks + 1,
        )
