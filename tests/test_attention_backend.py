"""Which attention backend vLLM takes, and in which blocks the KV cache is kept.

That every answer is vLLM's own is held by the golden file of test_kv_cache.py; here are the rules
that people ask about.
"""

import pytest

from gemma_serve.adapters.package_data import load_engine_rules
from gemma_serve.planning.memory.attention_backend import (
    choose_attention,
    kv_cell_bytes,
    start_refusal,
)
from gemma_serve.planning.memory.engine_rules import rules_for
from kv_models import MODELS

TABLE = load_engine_rules()


def attention(model, capability, version="0.32.0", dtype="bfloat16", **settings):
    return choose_attention(
        MODELS[model],
        rules=rules_for(version, TABLE)[0],
        capability=capability,
        dtype=dtype,
        **settings,
    )


@pytest.mark.parametrize(
    ("model", "capability", "settings", "backends", "block_size"),
    [
        ("gemma-7b", (9, 0), {}, ("FLASH_ATTN",), 16),
        ("gemma-7b", (10, 0), {}, ("FLASHINFER",), 16),
        ("gemma-7b", (7, 5), {"dtype": "float16"}, ("TRITON_ATTN",), 16),
        ("gemma-7b", (8, 0), {"kv_cache_dtype": "fp8"}, ("FLASHINFER",), 16),
        ("gemma-3-1b", (9, 0), {"dtype": "float32"}, ("TRITON_ATTN",), 16),
        ("gemma-3-4b", (9, 0), {}, ("TRITON_FLASH_ATTN",), 16),
        ("gemma-3-4b", (10, 0), {}, ("TRITON_FLASHINFER",), 64),
        ("gemma-3-4b", (10, 0), {"text_only": True}, ("FLASHINFER",), 16),
        ("gemma-3-27b", (10, 0), {}, ("FLASH_ATTN",), 16),
        ("gemma-3-1b", (10, 0), {"attention_backend": "FLASH_ATTN"}, ("FLASH_ATTN",), 128),
        ("gemma-2-2b", (10, 0), {"attention_backend": "FLASH_ATTN"}, ("FLASH_ATTN",), 16),
        ("gemma-4-E4B", (9, 0), {"kv_cache_dtype": "fp8"}, ("FLASH_ATTN",), 64),
        ("gemma-4-E4B", (8, 9), {}, ("TRITON_ATTN",), 16),
        ("gemma-4-31B", (9, 0), {"kv_cache_dtype": "fp8"}, ("TRITON_FLASH_ATTN",), 64),
        ("gemma-3-1b", None, {}, ("CPU_ATTN",), 128),
        ("gemma-3-1b", None, {"block_size": 32}, ("CPU_ATTN",), 32),
    ],
)
def test_the_backend_and_the_block_size(model, capability, settings, backends, block_size):
    plan = attention(model, capability, **settings)
    assert (plan.backends, plan.block_size, plan.unsupported) == (backends, block_size, None)


def test_the_reason_for_a_block_size_is_given():
    assert attention("gemma-7b", (9, 0)).reason == "FLASH_ATTN use vLLM's default"
    reason = attention("gemma-4-E4B", (9, 0), kv_cache_dtype="fp8").reason
    assert reason == "FLASH_ATTN need blocks of 64"
    assert attention("gemma-7b", (9, 0), block_size=32).reason == "--block-size"


@pytest.mark.parametrize("version", ["0.26.0", "0.30.0"])
def test_before_0_31_fp8_kv_of_gemma_4_goes_to_flashinfer_on_hopper(version):
    plan = attention("gemma-4-E4B", (9, 0), version, kv_cache_dtype="fp8")
    assert (plan.backends, plan.block_size) == (("FLASHINFER",), 16)


def test_a_sliding_layer_follows_the_cache_block_since_0_30():
    blocks = {
        version: attention("gemma-3-1b", None, version).sliding_block_size(256)
        for version in ("0.28.0", "0.29.0", "0.30.0")
    }
    assert blocks == {"0.28.0": 16, "0.29.0": 32, "0.30.0": 128}


def test_a_checkpoint_with_a_kv_scheme_turns_auto_into_fp8_and_nothing_else():
    def dtype(given):
        return attention(
            "gemma-7b", (9, 0), kv_cache_dtype=given, checkpoint_kv_is_fp8=True
        ).kv_cache_dtype

    assert (dtype("auto"), dtype("bfloat16")) == ("fp8", "bfloat16")


@pytest.mark.parametrize(
    ("capability", "settings", "sentence"),
    [
        ((9, 0), {"kv_cache_dtype": "octave_k3v4"}, "vLLM 0.32 has no KV cache dtype octave_k3v4"),
        ((9, 0), {"kv_cache_dtype": "turboquant_4bit_nc"}, "the planner does not know the size"),
        ((8, 0), {"attention_backend": "FLASH_ATTN"}, "no attention backend of vLLM serves"),
        ((9, 0), {"block_size": 24}, "no attention backend of vLLM serves"),
        ((9, 0), {"attention_backend": "XFORMERS"}, "not an attention backend that the planner"),
        (None, {"block_size": 48}, "on the CPU --block-size must be a multiple of 32"),
        (None, {"kv_cache_dtype": "nvfp4"}, "vLLM's CPU backend has no KV cache dtype nvfp4"),
    ],
)
def test_what_can_not_be_served_is_a_sentence(capability, settings, sentence):
    plan = attention("gemma-3-4b", capability, **settings)
    assert plan.unsupported is not None
    assert sentence in plan.unsupported


def refused_at_start(model, capability, **settings):
    return start_refusal(attention(model, capability, **settings), capability)


@pytest.mark.parametrize("version", ["0.26.0", "0.33.0"])
@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e5m2", "fp8_per_token_head"])
def test_triton_takes_an_fp8_cache_from_ada_on(version, kv_cache_dtype):
    def refused(capability):
        settings = {"version": version, "kv_cache_dtype": kv_cache_dtype}
        return refused_at_start("gemma-4-E4B", capability, **settings)

    allowed = [gpu for gpu in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0)) if not refused(gpu)]
    assert allowed == [(8, 9), (9, 0)]
    assert refused((8, 6)) == (
        "vLLM's Triton attention takes an fp8 KV cache from 8.9 on, "
        "and the GPU has compute capability 8.6"
    )


def test_other_backends_and_other_caches_start_before_ada():
    assert refused_at_start("gemma-7b", (8, 0), kv_cache_dtype="fp8") is None
    for kv_cache_dtype in ("auto", "float16", "int8_per_token_head", "int4_per_token_head"):
        settings = {"dtype": "float16", "kv_cache_dtype": kv_cache_dtype}
        assert refused_at_start("gemma-7b", (7, 5), **settings) is None
    assert refused_at_start("gemma-7b", None, kv_cache_dtype="fp8") is None


def test_a_bfloat16_cache_does_not_start_before_ampere():
    settings = {"dtype": "float16", "kv_cache_dtype": "bfloat16"}
    assert refused_at_start("gemma-7b", (7, 5), **settings) == (
        "a bfloat16 KV cache wants compute capability 8.0, and the GPU has compute capability 7.5"
    )
    assert refused_at_start("gemma-4-E4B", (8, 0), **settings) is None


@pytest.mark.parametrize(
    ("kv_cache_dtype", "dtype", "expected"),
    [
        ("auto", "bfloat16", 1024),
        ("auto", "float32", 2048),
        ("fp8", "bfloat16", 512),
        ("fp8_e5m2", "float16", 512),
        ("int8_per_token_head", "bfloat16", 520),
        ("int4_per_token_head", "bfloat16", 264),
        ("nvfp4", "bfloat16", 288),
    ],
)
def test_the_bytes_of_a_token_in_one_head_of_256(kv_cache_dtype, dtype, expected):
    rules = rules_for("0.32", TABLE)[0]
    assert kv_cell_bytes(kv_cache_dtype, dtype, 256, rules=rules) == expected


def test_before_0_28_sliding_layers_were_given_whole_int4_pages():
    def cell(version):
        rules = rules_for(version, TABLE)[0]
        return kv_cell_bytes("int4_per_token_head", "bfloat16", 256, rules=rules, sliding=True)

    assert (cell("0.27.1"), cell("0.28.0")) == (520, 264)
