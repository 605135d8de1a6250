"""config.json to geometry: what is written, what is left out, and what makes no sense."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_configs import FULL, PUBLIC, SLIDING
from gemma_serve.planning.model.config_reader import ModelConfigError
from gemma_serve.planning.model.geometry import Attention, Experts, Geometry, Layer, Rope
from gemma_serve.planning.model.model_config import read_geometry
from gemma_serve.planning.model.weights import weights_bytes


def code(config):
    with pytest.raises(ModelConfigError) as caught:
        read_geometry(config)
    (problem,) = caught.value.problems
    assert problem.message
    assert problem.hint
    return problem.code


def bad(config):
    return code(config) == "model.bad_config"


def text(model_type, **values):
    return read_geometry({"model_type": model_type, **values})


def test_gemma_7b_whole():
    layer = Layer(Attention(query_heads=16, kv_heads=16, head_size=256), intermediate_size=24576)
    key = (256, 256, 8192, ("rope_theta", 10000.0), ("rope_type", "default"))

    assert read_geometry(PUBLIC["gemma-7b"]) == Geometry(
        model_type="gemma",
        text_model_type="gemma",
        architecture="GemmaForCausalLM",
        hidden_size=3072,
        vocab_size=256000,
        layers=(layer,) * 28,
        ropes=(Rope(key, positions=8192, rotary_size=256),),
        max_model_len=8192,
    )


def test_gemma_3_leaves_most_of_its_language_model_to_the_defaults():
    geometry = read_geometry(PUBLIC["gemma-3-4b"])

    sliding = Layer(Attention(8, 4, 256, window=1024), 10240)
    full = Layer(Attention(8, 4, 256), 10240)
    assert geometry.layers == (*(((sliding,) * 5 + (full,)) * 5), *(sliding,) * 4)
    assert geometry.vocab_size == 262_208
    # Scaled by 8, the table of the full layers is that much longer, though the context is not.
    assert [(rope.positions, rope.rotary_size) for rope in geometry.ropes] == [
        (131_072, 256),
        (8 * 131_072, 256),
    ]
    assert geometry.max_model_len == 131_072
    assert geometry.attends_both_ways_to_images
    assert [(tower.modality, tower.tokens_per_item) for tower in geometry.towers] == [
        ("image", 256)
    ]


def test_gemma_4_has_heads_of_two_sizes_and_shares_caches():
    layers = read_geometry(PUBLIC["gemma-4-E2B"]).layers

    assert layers[0] == Layer(Attention(8, 1, 256, window=512), 6144)
    assert layers[14] == Layer(Attention(8, 1, 512), 6144)
    assert layers[15] == Layer(Attention(8, 1, 256, window=512, shares_kv=True), 12288)
    assert layers[34] == Layer(Attention(8, 1, 512, shares_kv=True), 12288)


def test_gemma_4_with_experts_and_keys_for_values():
    layers = read_geometry(PUBLIC["gemma-4-26B-A4B"]).layers

    experts = Experts(count=128, top_k=8, intermediate_size=704)
    assert layers[0] == Layer(Attention(16, 8, 256, window=1024), 2112, experts)
    assert layers[5] == Layer(Attention(16, 2, 512, key_is_value=True), 2112, experts)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("gemma-3n-E4B", [("image", 256), ("audio", 188)]),
        ("gemma-4-E4B", [("image", 280), ("video", 2496), ("audio", 750)]),
        ("gemma-4-31B", [("image", 280), ("video", 2496)]),
        ("gemma-4-12B", [("image", 280), ("video", 2496), ("audio", 750)]),
        ("paligemma2-10b-448", [("image", 1024)]),
        ("gemma-3-1b", []),
    ],
)
def test_the_most_that_an_item_takes(name, tokens):
    towers = read_geometry(PUBLIC[name]).towers

    assert [(tower.modality, tower.tokens_per_item) for tower in towers] == tokens


def test_weights_of_the_towers():
    towers = read_geometry(PUBLIC["gemma-4-E4B"]).towers
    embedders = 2560 * 768, 2560 * 1536

    assert [tower.parameters for tower in towers] == [
        167_364_608 + embedders[0],
        0,
        304_824_608 + embedders[1],
    ]


def test_an_embedding_model_looks_both_ways_through_half_windows():
    geometry = read_geometry(PUBLIC["embeddinggemma-300m"])

    assert geometry.is_pooling
    assert {layer.attention.window for layer in geometry.layers} == {512 // 2 + 1, None}


@pytest.mark.parametrize(
    ("name", "attention", "logits"),
    [
        ("gemma-2b", False, False),
        ("gemma-2-2b", True, True),
        ("gemma-3-1b", False, False),
        ("gemma-3n-E2B", False, True),
        ("gemma-4-31B", False, True),
        ("paligemma2-10b-448", True, True),
        ("vaultgemma-1b", False, False),
    ],
)
def test_soft_caps(name, attention, logits):
    geometry = read_geometry(PUBLIC[name])

    assert (geometry.softcaps_attention, geometry.softcaps_logits) == (attention, logits)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "gemma3n_text", "gemma4_text"])
def test_keys_of_old_and_new_transformers_mean_the_same(model_type):
    old = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "torch_dtype": "bfloat16"}
    new = {
        "gemma2": {"rope_theta": 5e5, "rope_type": "default"},
        "gemma4_text": {
            SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
            FULL: {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1_000_000.0,
            },
        },
    }
    usual = {
        SLIDING: {"rope_type": "default", "rope_theta": 2e4},
        FULL: {"rope_type": "default", "rope_theta": 5e5},
    }

    by_new = text(model_type, rope_parameters=new.get(model_type, usual), dtype="bfloat16")
    by_old = text(model_type, **old)

    assert [rope.rotary_size for rope in by_new.ropes] == [r.rotary_size for r in by_old.ropes]
    assert [rope.positions for rope in by_new.ropes] == [r.positions for r in by_old.ropes]
    assert by_new.layers == by_old.layers


def test_layers_of_one_rope_share_its_table():
    same = {"rope_type": "default", "rope_theta": 1e4}

    assert len(text("gemma3_text", rope_parameters={FULL: same, SLIDING: same}).ropes) == 1
    assert len(text("gemma3_text").ropes) == 2


def test_a_scaled_rope_lengthens_the_context_except_for_gemma_3():
    linear = {"rope_type": "linear", "factor": 2.0}

    assert text("gemma2", rope_scaling=linear).max_model_len == 16_384
    assert text("gemma2", rope_scaling=linear).ropes[0].positions == 16_384
    assert text("gemma3_text", rope_scaling=linear).max_model_len == 131_072


def test_sliding_window_pattern_is_gemma_3s():
    windows = [
        layer.attention.window is None
        for layer in text("gemma3_text", num_hidden_layers=4, sliding_window_pattern=2).layers
    ]

    assert windows == [False, True, False, True]
    assert text("gemma2", sliding_window_pattern=3) == text("gemma2")


def test_gemma_4_always_ends_with_a_full_layer():
    geometry = text("gemma4_text", num_hidden_layers=3, layer_types=[SLIDING] * 3)

    assert [layer.attention.window for layer in geometry.layers] == [512, 512, None]
    assert geometry.layers[-1].attention.head_size == 512


def test_heads_by_layer_replace_the_heads_of_full_layers():
    by_layer = {"1": {"head_dim": 64}, "2": {"num_key_value_heads": 2}}

    layers = text("gemma4_text", num_hidden_layers=3, per_layer_config=by_layer).layers

    heads = [(layer.attention.head_size, layer.attention.kv_heads) for layer in layers]
    assert heads == [(256, 4), (64, 4), (256, 2)]


@pytest.mark.parametrize(
    ("config", "ties"),
    [
        ({"model_type": "gemma3_text", "tie_word_embeddings": False}, False),
        ({"model_type": "gemma2", "tie_word_embeddings": False}, True),
        ({"model_type": "gemma3", "text_config": {"tie_word_embeddings": False}}, True),
        ({"model_type": "gemma3", "tie_word_embeddings": False}, False),
    ],
)
def test_the_outer_config_decides_about_tied_embeddings(config, ties):
    assert read_geometry(config).tied_embeddings is ties


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "`llama` is no Gemma"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "`Qwen2ForCausalLM` is no Gemma"),
        ({"model_type": "gemma5"}, "a newer kind"),
        ({"model_type": "t5gemma"}, "a relative of Gemma"),
        ({}, "neither `model_type` nor `architectures`"),
    ],
)
def test_what_is_no_gemma_is_said_plainly(config, says):
    with pytest.raises(ModelConfigError, match=says) as caught:
        read_geometry(config)

    assert caught.value.problems[0].code == "model.unknown_architecture"


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "2304"},
        {"hidden_size": -1},
        {"hidden_size": 10**30},
        {"hidden_size": 2305},
        {"hidden_size": None},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 2.0},
        {"num_attention_heads": True},
        {"head_dim": []},
        {"layer_types": ["full_attention"]},
        {"layer_types": "full_attention"},
        {"layer_types": ["chunked_attention"] * 26},
        {"sliding_window_pattern": 0},
        {"sliding_window": -5},
        {"rope_scaling": "linear"},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "linear", "factor": float("nan")}},
        {"rope_scaling": {"rope_type": "new", "factor": 2}},
        {"rope_scaling": {"rope_type": ["linear"]}},
        {"rope_theta": "many"},
        {"tie_word_embeddings": "yes"},
        {"final_logit_softcapping": {}},
    ],
)
def test_values_that_make_no_sense_are_named(values):
    assert bad({"model_type": "gemma3_text", **values})


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gemma4_text", "num_kv_shared_layers": 30},
        {"model_type": "gemma4_text", "num_kv_shared_layers": 29},
        {"model_type": "gemma4_text", "num_experts": 8},
        {"model_type": "gemma4_text", "per_layer_config": {"99": {"head_dim": 64}}},
        {"model_type": "gemma4_text", "per_layer_config": {"0": {"hidden_size": 64}}},
        {"model_type": "gemma4_text", "per_layer_config": [1]},
        {"model_type": "gemma3n_text", "intermediate_size": [1, 2]},
        {"model_type": "gemma3", "text_config": 3},
        {"model_type": "gemma3", "text_config": {"model_type": "llama"}},
        {"model_type": "gemma3", "vision_config": {"patch_size": 0}},
        {"model_type": "gemma3", "vision_config": {"image_size": 4, "patch_size": 14}},
        {"model_type": "gemma3n", "vision_config": {"architecture": "resnet50"}},
        {"model_type": "gemma3n", "audio_config": {"sscp_conv_kernel_size": [3, 3]}},
        {"model_type": "gemma4", "vision_config": {"hidden_size": {}}},
        {"model_type": "gemma4", "audio_config": [], "vision_config": {}},
    ],
)
def test_values_that_do_not_fit_together_are_named(config):
    assert bad(config)


KEYS = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "global_head_dim",
    "vocab_size",
    "max_position_embeddings",
    "model_max_length",
    "sliding_window",
    "sliding_window_pattern",
    "layer_types",
    "per_layer_config",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "num_kv_shared_layers",
    "num_experts",
    "top_k_experts",
    "moe_intermediate_size",
    "hidden_size_per_layer_input",
    "vocab_size_per_layer_input",
    "use_bidirectional_attention",
    "attention_k_eq_v",
    "num_global_key_value_heads",
    "use_double_wide_mlp",
    "tie_word_embeddings",
    "attention_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "altup_num_inputs",
    "laurel_rank",
    "architectures",
    "image_size",
    "patch_size",
    "mm_tokens_per_image",
    "rope_type",
    "type",
    "factor",
    FULL,
    SLIDING,
    "0",
]
TYPES = ["gemma", "gemma2", "vaultgemma", "gemma3_text", "gemma3n_text", "gemma4_text"]
WRAPPERS = ["gemma3", "gemma3n", "gemma4", "gemma4_unified", "paligemma"]
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 64)
    | st.floats()
    | st.sampled_from(["", "linear", "default", "yarn", "all", "vision", FULL, SLIDING])
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)
    ),
    max_leaves=6,
)
PARTS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6)


@settings(max_examples=400, deadline=None)
@given(
    model_type=st.sampled_from(TYPES + WRAPPERS),
    outer=PARTS,
    parts=st.dictionaries(
        st.sampled_from(["text_config", "vision_config", "audio_config"]), PARTS | VALUES
    ),
)
def test_any_json_gives_a_geometry_or_an_error_of_ours(model_type, outer, parts):
    try:
        geometry = read_geometry({**outer, **parts, "model_type": model_type})
    except ModelConfigError:
        return

    weights = weights_bytes(geometry, dtype="bfloat16", max_num_batched_tokens=1)
    assert weights is not None
    assert weights.total_bytes > 0
    assert geometry.max_model_len > 0


@given(model_type=VALUES, architectures=VALUES)
def test_any_kind_of_model_type_is_an_error_or_a_gemma(model_type, architectures):
    try:
        read_geometry({"model_type": model_type, "architectures": architectures})
    except ModelConfigError:
        return
