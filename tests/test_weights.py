"""Bytes of weights: vLLM's own totals, its own modules, and the two ways to a figure."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_configs import FULL, PUBLIC, SLIDING
from gemma_serve.planning.model.geometry import Parameter
from gemma_serve.planning.model.model_config import read_geometry
from gemma_serve.planning.model.weights import (
    HeaderTensor,
    ModelWeights,
    model_weights,
    weights_bytes,
    weights_from_headers,
)

# As vLLM 0.32 builds the language model in bfloat16 on one GPU: parameters and buffers.
TEXT_TOTALS = {
    "gemma-2b": 5_016_539_426,
    "gemma-7b": 17_079_556_546,
    "gemma-2-2b": 5_232_878_498,
    "gemma-2-9b": 18_487_606_946,
    "gemma-2-27b": 54_456_354_530,
    "gemma-3-270m": 569_751_074,
    "gemma-3-1b": 2_033_326_754,
    "gemma-3-4b": 8_364_506_658,
    "gemma-3-12b": 24_136_048_898,
    "gemma-3-27b": 54_320_683_490,
    "gemma-3n-E2B": 8_904_043_236,
    "gemma-3n-E4B": 13_704_169_566,
    "gemma-4-E2B": 9_458_465_918,
    "gemma-4-E4B": 15_127_354_108,
    "gemma-4-26B-A4B": 50_897_773_146,
    "gemma-4-31B": 62_017_545_786,
    "paligemma-3b-224": 5_021_520_162,
    "vaultgemma-1b": 2_077_483_682,
    "embeddinggemma-300m": 607_823_746,
}

# All tensors, also those that are neither parameters nor buffers, with 8192 batched tokens:
# name, release of vLLM, tensor_parallel_size, language_model_only, bytes.
ALL_TENSORS = [
    ("gemma-3-4b", (0, 32), 1, False, 9_204_172_034),
    ("gemma-3-4b", (0, 32), 1, True, 8_364_506_658),
    ("gemma-3-12b", (0, 32), 1, False, 24_978_663_394),
    ("gemma-3-12b", (0, 32), 1, True, 24_136_048_898),
    ("gemma-3-27b", (0, 32), 1, False, 55_166_836_930),
    ("gemma-3-27b", (0, 32), 1, True, 54_320_683_490),
    ("gemma-3n-E2B", (0, 32), 1, False, 10_996_494_308),
    ("gemma-3n-E2B", (0, 32), 1, True, 9_029_882_596),
    ("gemma-3n-E4B", (0, 32), 1, False, 15_817_592_158),
    ("gemma-3n-E4B", (0, 32), 1, True, 13_850_980_446),
    ("gemma-4-E2B", (0, 32), 1, False, 10_556_739_734),
    ("gemma-4-E2B", (0, 32), 1, True, 9_605_275_774),
    ("gemma-4-E4B", (0, 32), 1, False, 16_259_711_764),
    ("gemma-4-E4B", (0, 32), 1, True, 15_303_529_212),
    ("gemma-4-12B", (0, 32), 1, False, 24_353_609_314),
    ("gemma-4-12B", (0, 32), 1, True, 24_353_609_314),
    ("gemma-4-26B-A4B", (0, 32), 1, False, 52_043_551_306),
    ("gemma-4-26B-A4B", (0, 32), 1, True, 50_897_960_026),
    ("gemma-4-31B", (0, 32), 1, False, 63_169_071_146),
    ("gemma-4-31B", (0, 32), 1, True, 62_017_581_626),
    ("paligemma-3b-224", (0, 32), 1, False, 5_851_129_602),
    ("paligemma-3b-224", (0, 32), 1, True, 5_021_520_162),
    ("paligemma2-10b-448", (0, 32), 1, False, 19_331_250_306),
    ("paligemma2-10b-448", (0, 32), 1, True, 18_496_323_234),
    ("gemma-7b", (0, 32), 2, False, 8_542_050_754),
    ("gemma-7b", (0, 32), 16, False, 1_071_733_186),
    ("gemma-2-27b", (0, 32), 8, False, 6_810_371_810),
    ("gemma-3-1b", (0, 32), 4, False, 556_702_370),
    ("gemma-3-4b", (0, 32), 8, False, 1_739_180_222),
    ("gemma-3-27b", (0, 32), 4, False, 14_037_929_242),
    ("gemma-3-27b", (0, 32), 16, True, 3_680_698_850),
    ("gemma-3n-E2B", (0, 32), 4, False, 4_401_311_716),
    ("gemma-4-E2B", (0, 32), 8, False, 2_530_185_366),
    ("gemma-4-E4B", (0, 32), 2, True, 7_896_126_204),
    ("gemma-4-12B", (0, 32), 8, True, 3_498_163_234),
    ("gemma-4-26B-A4B", (0, 32), 4, False, 14_203_900_490),
    ("gemma-4-26B-A4B", (0, 32), 16, False, 4_787_241_546),
    ("gemma-4-31B", (0, 32), 8, False, 9_313_421_354),
    ("paligemma2-10b-448", (0, 32), 2, False, 9_674_511_890),
    ("vaultgemma-1b", (0, 32), 4, False, 519_463_586),
    ("gemma-2b", (0, 26), 1, False, 5_016_539_642),
    ("gemma-3-4b", (0, 26), 1, False, 9_204_172_442),
    ("gemma-4-E2B", (0, 26), 1, False, 10_594_513_466),
    ("gemma-4-E4B", (0, 26), 1, False, 16_369_834_252),
    ("gemma-4-31B", (0, 26), 1, False, 63_169_071_866),
    ("paligemma-3b-224", (0, 26), 1, False, 5_851_129_818),
]

# Norms without weights and staging areas, which `TEXT_TOTALS` leaves out.
PLAIN_TENSORS = {
    "gemma-3n-E2B": 125_839_360,
    "gemma-3n-E4B": 146_810_880,
    "gemma-4-E2B": 146_809_856,
    "gemma-4-E4B": 176_175_104,
    "gemma-4-26B-A4B": 186_880,
    "gemma-4-31B": 35_840,
}


def total(config, **settings):
    settings = {"dtype": "bfloat16", "max_num_batched_tokens": 8192, **settings}
    return weights_bytes(read_geometry(config), **settings).total_bytes


@pytest.mark.parametrize("name", TEXT_TOTALS)
def test_language_models_take_what_vllm_says(name):
    text_only = total(PUBLIC[name], language_model_only=True)

    assert text_only - PLAIN_TENSORS.get(name, 0) == TEXT_TOTALS[name]


@pytest.mark.parametrize(("name", "release", "ranks", "text_only", "expected"), ALL_TENSORS)
def test_every_tensor_counts(name, release, ranks, text_only, expected):
    found = total(
        PUBLIC[name],
        release=release,
        tensor_parallel_size=ranks,
        language_model_only=text_only,
    )

    assert found == expected


def test_the_parts_of_a_model():
    weights = weights_bytes(
        read_geometry(PUBLIC["gemma-4-E4B"]), dtype="bfloat16", max_num_batched_tokens=4096
    )

    assert weights == ModelWeights(
        text_bytes=7_946_704_896,
        embeddings_bytes=2 * 262_144 * (2560 + 42 * 256),
        rope_bytes=2 * 131_072 * (256 + 512),
        towers_bytes=956_174_912,
        buffers_bytes=22_740,
        staging_bytes=2 * 4096 * 42 * 256,
        rounding_bytes=24_890_092,
    )
    assert weights.total_bytes == 16_171_631_380


def test_float32_doubles_all_but_what_has_a_dtype_of_its_own():
    geometry = read_geometry(PUBLIC["gemma-3-1b"])
    attention_scales = 26 * 4 * 4

    half = weights_bytes(geometry, dtype="bfloat16").total_bytes
    whole = weights_bytes(geometry, dtype="float32").total_bytes

    assert whole - attention_scales == 2 * (half - attention_scales)


# Only the matrices of the layers shrink: embeddings, norms and tables stay as they are.
LINEAR_2_27B = 46 * (4608 * (64 * 128) + 4608 * 4096 + 3 * 4608 * 36864)


@pytest.mark.parametrize(
    ("quantization", "scales"),
    [
        ("fp8_per_tensor", 46 * 4 * 4),
        ("fp8", 46 * 4 * 4),
        ("fp8_per_channel", 46 * 4 * (64 * 128 + 4608 + 2 * 36864 + 4608)),
        ("fp8_per_block", LINEAR_2_27B // 128**2 * 4),
        ("mxfp8", LINEAR_2_27B // 32),
    ],
)
def test_online_quantization_halves_linear_layers(quantization, scales):
    plain = total(PUBLIC["gemma-2-27b"])

    found = total(PUBLIC["gemma-2-27b"], quantization=quantization)

    assert found == plain - LINEAR_2_27B + scales


def test_quantization_for_experts_leaves_dense_layers_alone():
    config = PUBLIC["gemma-4-26B-A4B"]
    experts = 30 * 128 * 3 * 2816 * 704
    channels = 30 * 128 * (2 * 704 + 2816)

    found = total(config, quantization="int8_per_channel_weight_only")

    assert found == total(config) - experts + 4 * channels


def test_gemma_4s_large_vision_tower_is_not_quantized():
    small = total(PUBLIC["gemma-4-E2B"]) - total(PUBLIC["gemma-4-E2B"], language_model_only=True)
    large = total(PUBLIC["gemma-4-31B"]) - total(PUBLIC["gemma-4-31B"], language_model_only=True)

    def towers(name):
        settings = {"quantization": "fp8_per_tensor"}
        text_only = total(PUBLIC[name], language_model_only=True, **settings)
        return total(PUBLIC[name], **settings) - text_only

    assert towers("gemma-4-31B") == large
    assert towers("gemma-4-E2B") < 0.6 * small


W4A16 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": 32,
                "symmetric": True,
            },
        }
    },
    "ignore": ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"],
}


def test_packed_integers_take_half_a_byte_and_scales():
    config = PUBLIC["gemma-3-4b"]
    linear = 34 * (2560 * 4096 + 2048 * 2560 + 3 * 2560 * 10240)
    of_each_matrix = 34 * 4 * 16

    found = total(config, quantization_config=W4A16)

    assert found == total(config) - 2 * linear + linear // 2 + 2 * linear // 32 + of_each_matrix


def test_a_list_of_exceptions_names_the_towers_that_stay_as_they_are():
    config = PUBLIC["gemma-4-12B"]
    embedder = 3840 * 3 * 48**2
    quarters = embedder * 2 - (embedder // 2 + 2 * embedder // 32 + 16)
    other_towers = W4A16 | {"ignore": ["re:.*vision_tower.*", "re:.*embed_vision.*"]}
    all_towers = W4A16 | {"ignore": ["re:.*vision.*", "re:.*embed_audio.*"]}

    found = total(config, quantization_config=other_towers)

    assert total(config, quantization_config=all_towers) - found == quarters


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {},
        W4A16 | {"ignore": ["model.layers.0.mlp.down_proj"]},
        W4A16 | {"config_groups": {}},
        W4A16 | {"config_groups": {"a": 1}},
        W4A16 | {"format": "nvfp4-pack-quantized"},
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
    ],
)
def test_what_cannot_be_told_for_sure_is_left_to_the_headers(quantization):
    geometry = read_geometry(PUBLIC["gemma-3-4b"])

    assert weights_bytes(geometry, dtype="bfloat16", quantization_config=quantization) is None


def test_an_unknown_online_quantization_is_not_guessed():
    geometry = read_geometry(PUBLIC["gemma-3-4b"])

    assert weights_bytes(geometry, dtype="bfloat16", quantization="bitsandbytes") is None


def header(name, dtype, *shape):
    width = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "I32": 4, "I64": 8, "BOOL": 1}[dtype]
    tensor = HeaderTensor(name, dtype, shape, 0)
    return replace(tensor, size_bytes=tensor.elements * width)


def test_a_model_that_nobody_knows_is_counted_from_its_headers():
    tensors = [header("a.weight", "F32", 10, 10), header("a.bias", "BF16", 10)]
    tensors.append(header("b.qweight", "I32", 5))

    found = weights_from_headers(tensors, None, dtype="bfloat16", tensor_parallel_size=2)

    assert found == ModelWeights(text_bytes=(200 + 20 + 20) // 2, approximate=True)


def test_float_8_checkpoints_keep_their_bytes_and_scales():
    geometry = read_geometry(tiny("gemma3_text"))
    layer = "model.layers.0.mlp"
    tensors = [
        header(f"{layer}.down_proj.weight", "F8_E4M3", 64, 96),
        header(f"{layer}.down_proj.weight_scale", "BF16", 64, 1),
        header(f"{layer}.up_proj.weight", "F8_E4M3", 96, 64),
        header(f"{layer}.up_proj.weight_scale", "BF16", 96, 1),
        header("lm_head.weight", "BF16", 512, 64),
    ]

    found = weights_from_headers(tensors, geometry, dtype="bfloat16", tensor_parallel_size=2)

    assert found.text_bytes == (64 * 48 + 64 * 4) + (48 * 64 + 48 * 4)
    assert found.embeddings_bytes == 0


def test_headers_decide_for_quantized_checkpoints_and_the_geometry_for_others():
    geometry = read_geometry(tiny("gemma3_text"))
    tensors = [header("model.norm.weight", "BF16", 64)]
    plain = weights_bytes(geometry, dtype="bfloat16")

    quantized = model_weights(geometry, tensors, dtype="bfloat16", quantization_config=W4A16)

    assert quantized == weights_from_headers(tensors, geometry, dtype="bfloat16")
    assert model_weights(geometry, tensors, dtype="bfloat16") == plain
    assert model_weights(None, (), dtype="bfloat16") is None


@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    unit=st.sampled_from([1, 16, 128]),
    columns=st.integers(1, 300),
    split=st.sampled_from(["none", "rows", "columns", "vocabulary"]),
    ranks=st.sampled_from([1, 2, 4, 8]),
)
def test_ranks_together_hold_everything_and_none_more_than_all(rows, unit, columns, split, ranks):
    unit = 1 if split == "vocabulary" else unit
    parameter = Parameter("x", "mlp", tuple(rows), columns, unit=unit, split=split)
    padded = 63 * columns if split == "vocabulary" else 0

    everything, share = parameter.rank_elements(1), parameter.rank_elements(ranks)

    assert sum(rows) * unit * columns <= everything <= sum(rows) * unit * columns + padded
    assert everything <= share * ranks
    assert share <= everything


def tiny(text_type, **more):
    """A language model small enough to be built in no time."""
    architectures = {
        "gemma": "GemmaForCausalLM",
        "gemma2": "Gemma2ForCausalLM",
        "vaultgemma": "VaultGemmaForCausalLM",
        "gemma3_text": "Gemma3ForCausalLM",
        "gemma3n_text": "Gemma3nForCausalLM",
        "gemma4_text": "Gemma4ForCausalLM",
    }
    return {
        "architectures": [architectures.get(text_type, "")],
        "model_type": text_type,
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "sliding_window": 32,
        **more,
    }


def wrapped(architecture, model_type, text, **more):
    return {"architectures": [architecture], "model_type": model_type, "text_config": text, **more}


TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "model_type": "siglip_vision_model",
}
TINY_GEMMA_4_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "position_embedding_size": 40,
}
TINY_GEMMA_4_AUDIO = {
    "model_type": "gemma4_audio",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [16, 8],
    "output_proj_dims": 24,
}
LINEAR = {"factor": 4.0, "rope_type": "linear"}

TINY = {
    "gemma": tiny("gemma", num_key_value_heads=1, head_dim=32),
    "gemma2": tiny("gemma2", attention_bias=True, rope_scaling=LINEAR),
    "vaultgemma": tiny("vaultgemma", num_key_value_heads=4),
    "gemma3 of old keys": tiny(
        "gemma3_text", rope_scaling=LINEAR, rope_theta=5e5, rope_local_base_freq=2e4
    ),
    "gemma3 of new keys": tiny(
        "gemma3_text",
        tie_word_embeddings=False,
        layer_types=[SLIDING, FULL] * 3,
        rope_parameters={
            FULL: {"rope_type": "default", "rope_theta": 1e4},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "embedding": tiny(
        "gemma3_text", architectures=["Gemma3TextModel"], use_bidirectional_attention=True
    ),
    "gemma3n": tiny(
        "gemma3n_text",
        num_hidden_layers=10,
        num_kv_shared_layers=4,
        intermediate_size=[96] * 5 + [128] * 5,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=490,
        laurel_rank=8,
        altup_num_inputs=3,
    ),
    "gemma4 with shared layers": tiny(
        "gemma4_text",
        num_kv_shared_layers=2,
        layer_types=[SLIDING, FULL] * 3,
        global_head_dim=32,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=490,
        use_double_wide_mlp=True,
    ),
    "gemma4 with experts": tiny(
        "gemma4_text",
        num_hidden_layers=4,
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        global_head_dim=32,
        enable_moe_block=True,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=32,
    ),
    "gemma4 of new keys": tiny(
        "gemma4_text",
        hidden_size_per_layer_input=0,
        per_layer_config={"5": {"head_dim": 64, "num_key_value_heads": 1}},
    ),
    "gemma3 with images": wrapped(
        "Gemma3ForConditionalGeneration",
        "gemma3",
        tiny("gemma3_text"),
        vision_config=TINY_VISION,
    ),
    "gemma4 with images and sound": wrapped(
        "Gemma4ForConditionalGeneration",
        "gemma4",
        tiny("gemma4_text", hidden_size_per_layer_input=8, global_head_dim=32),
        vision_config=TINY_GEMMA_4_VISION | {"use_clipped_linears": True, "standardize": True},
        audio_config=TINY_GEMMA_4_AUDIO,
    ),
    "gemma4_unified": wrapped(
        "Gemma4UnifiedForConditionalGeneration",
        "gemma4_unified",
        tiny("gemma4_unified_text", attention_k_eq_v=True, num_global_key_value_heads=1),
        vision_config={
            "model_type": "gemma4_unified_vision",
            "mm_embed_dim": 48,
            "output_proj_dims": 48,
            "mm_posemb_size": 20,
            "patch_size": 4,
        },
        audio_config={"model_type": "gemma4_unified_audio", "audio_embed_dim": 40},
    ),
    "paligemma": wrapped(
        "PaliGemmaForConditionalGeneration",
        "paligemma",
        tiny("gemma2"),
        vision_config=TINY_VISION,
        projection_dim=64,
    ),
}

BATCHED = 4096

# Each model on one GPU; some also on two or four, or without its towers.
CASES = [
    *({"name": name, "config": config, "checkpoint": True} for name, config in TINY.items()),
    *(
        {"name": name, "config": TINY[name], "tensor_parallel_size": ranks, **more}
        for name, ranks, more in (
            ("gemma", 4, {}),
            ("gemma2", 2, {}),
            ("gemma3 of new keys", 4, {"dtype": "float32"}),
            ("gemma3n", 2, {}),
            ("gemma4 with shared layers", 4, {}),
            ("gemma4 with experts", 2, {}),
            ("gemma3 with images", 2, {}),
            ("gemma3 with images", 1, {"language_model_only": True}),
            ("gemma4 with images and sound", 2, {}),
            ("gemma4 with images and sound", 1, {"language_model_only": True}),
            ("gemma4_unified", 2, {"language_model_only": True}),
        )
    ),
]


@pytest.fixture(scope="module")
def measured():
    """What vLLM allocates in each of the cases, in their order."""
    cases = [{**case, "max_num_batched_tokens": BATCHED} for case in CASES]
    script = Path(__file__).parent / "vllm_parameters.py"
    done = subprocess.run(
        [sys.executable, script], input=json.dumps(cases), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.engine
def test_every_architecture_takes_what_vllm_allocates(measured, engine_release):
    found = [
        weights_bytes(
            read_geometry(case["config"]),
            dtype=case.get("dtype", "bfloat16"),
            tensor_parallel_size=case.get("tensor_parallel_size", 1),
            language_model_only=case.get("language_model_only", False),
            max_num_batched_tokens=BATCHED,
            release=engine_release,
        ).total_bytes
        for case in CASES
    ]

    assert found == [case["parameters"] + case["buffers"] + case["plain"] for case in measured]


@pytest.mark.engine
@pytest.mark.parametrize("ranks", [1, 2])
def test_headers_and_geometry_lead_to_the_same_bytes(measured, ranks, engine_release):
    for case in measured[: len(TINY)]:
        geometry = read_geometry(TINY[case["name"]])
        tensors = [header(name, dtype, *shape) for name, dtype, shape in case["tensors"]]
        settings = {
            "dtype": "bfloat16",
            "tensor_parallel_size": ranks,
            "max_num_batched_tokens": BATCHED,
            "release": engine_release,
        }

        by_headers = weights_from_headers(tensors, geometry, **settings)

        assert by_headers == weights_bytes(geometry, **settings), case["name"]


@pytest.fixture(scope="module")
def engine_release():
    """The vLLM that is installed, as (0, 32)."""
    asked = "import vllm, sys; sys.stdout.write(vllm.__version__)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    major, minor = done.stdout.split(".")[:2]
    return int(major), int(minor)
