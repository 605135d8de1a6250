"""Which GPUs and which checkpoints vLLM takes a quantization method for."""

import pytest

from gemma_serve.adapters.package_data import load_engine_rules
from gemma_serve.planning.memory.engine_rules import rules_for
from gemma_serve.planning.memory.quantization_rules import (
    quantization_conflict,
    quantization_refusal,
    stored_method,
)

TABLE = load_engine_rules()
VERSIONS = [rules.version for rules in TABLE]


def refusal(method, capability, version="0.32", *, experts=True, loading=True):
    rules = rules_for(version, TABLE)[0]
    return quantization_refusal(
        method, capability, rules, has_experts=experts, while_loading=loading
    )


@pytest.mark.parametrize(
    ("method", "least"),
    [
        ("fp8_per_tensor", (7, 5)),
        ("fp8_per_block", (7, 5)),
        ("fp8_per_channel", (8, 9)),
        ("mxfp8", (7, 5)),
        ("mxfp4", (8, 0)),
        ("int8_per_channel_weight_only", (7, 5)),
        ("experts_int8", (8, 0)),
        ("fp_quant", (10, 0)),
        ("awq", (7, 5)),
        ("gptq", (6, 0)),
        ("compressed-tensors", (7, 0)),
    ],
)
def test_a_method_runs_from_its_least_compute_capability_on(method, least):
    major, minor = least
    older = (major, minor - 1) if minor else (major - 1, 9)
    assert refusal(method, least) is None
    assert f"wants compute capability {major}.{minor}" in refusal(method, older)


def test_the_sentence_names_the_release_the_need_and_the_gpu():
    assert refusal("fp8_per_channel", (8, 0)) == (
        "in vLLM 0.32 `fp8_per_channel` wants compute capability 8.9, "
        "and the GPU has compute capability 8.0"
    )


@pytest.mark.parametrize("method", ["fp8", "fp8_per_tensor", "modelopt"])
def test_two_releases_take_a_kernel_that_cards_before_ada_do_not_have(method):
    on_a100 = [version for version in VERSIONS if refusal(method, (8, 0), version)]
    known = {"fp8": [], "fp8_per_tensor": [], "modelopt": ["0.26"]}[method]
    assert on_a100 == [*known, "0.29", "0.30"]
    assert not any(refusal(method, (8, 9), version) for version in VERSIONS)


def test_nvfp4_while_loading_is_for_data_centre_blackwell_only():
    allowed = [
        capability
        for capability in ((8, 0), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0))
        if refusal("nvfp4_per_token", capability) is None
    ]
    assert allowed == [(10, 0), (10, 3)]


@pytest.mark.parametrize("method", ["nvfp4_per_token", "int8_per_channel_weight_only"])
@pytest.mark.parametrize("capability", [(10, 0), None])
def test_a_method_for_experts_does_nothing_for_a_model_without(method, capability):
    sentence = f"`{method}` quantizes experts only, and the model has none"
    assert refusal(method, capability, experts=False) == sentence


def test_the_cpu_quantizes_dense_models_by_channel_and_nothing_else_while_loading():
    runs = {
        version: [
            method
            for method in rules_for(version, TABLE)[0].online_quantization_methods
            if refusal(method, None, version, experts=False) is None
        ]
        for version in ("0.27", "0.28", "0.32")
    }
    by_channel = ["fp8_per_channel"]
    assert runs == {"0.27": [], "0.28": by_channel, "0.32": by_channel}
    assert refusal("fp8_per_channel", None, experts=True) is not None
    assert refusal("mxfp8", None) == (
        "vLLM's CPU build does not quantize weights with `mxfp8` while loading"
    )


def test_nothing_is_said_of_stored_weights_on_the_cpu_or_of_a_method_without_a_known_need():
    assert refusal("awq", None, loading=False) is None
    assert refusal("a-new-one", (7, 5)) is None


def test_every_method_that_vllm_has_for_dense_models_has_its_need():
    for rules in TABLE:
        named = {*rules.online_quantization_methods, *rules.checkpoint_quantization_methods}
        unnamed = named - set(rules.quantization_capabilities)
        assert unnamed == {"nvfp4_per_token"}


@pytest.mark.parametrize(
    ("wanted", "stored"),
    [
        ("gptq", "gptq"),
        ("gptq_marlin", "gptq"),
        ("auto_gptq", "gptq"),
        ("moe_wna16", "gptq"),
        ("awq_marlin", "awq"),
        ("moe_wna16", "awq"),
        ("modelopt_fp4", "modelopt"),
        ("inc", "auto-round"),
        ("humming", "compressed-tensors"),
        ("fp8_per_tensor", None),
    ],
)
@pytest.mark.parametrize("version", ["0.26", "0.33"])
def test_a_name_that_vllm_takes_for_the_stored_one_is_no_conflict(wanted, stored, version):
    assert quantization_conflict(wanted, stored, rules_for(version, TABLE)[0]) is None


@pytest.mark.parametrize(
    ("wanted", "stored"),
    [
        ("fp8_per_tensor", "fp8"),
        ("fp8", "compressed-tensors"),
        ("gptq", "gptq_marlin"),
        ("awq", "gptq"),
        ("moe_wna16", "compressed-tensors"),
        ("mxfp4", "modelopt"),
    ],
)
def test_another_method_than_the_stored_one_is_a_conflict(wanted, stored):
    assert quantization_conflict(wanted, stored, TABLE[-1]) == (
        f"the checkpoint comes quantized with `{stored}`, so it can't be loaded as `{wanted}`"
    )


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (None, None),
        ({}, None),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_per_block"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "modelopt"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt_fp4"),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "MXFP8"}}, "modelopt_mxfp8"),
        ({"quant_method": "modelopt", "quant_algo": "mixed_precision"}, "modelopt_mixed"),
    ],
)
def test_the_method_of_a_checkpoint_follows_from_its_configuration(config, method):
    assert stored_method(config) == method
