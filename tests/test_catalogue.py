"""The public Gemmas that the package knows."""

from __future__ import annotations

import re

import pytest

from gemma_serve.adapters.package_data import load_catalogue
from gemma_serve.planning.model.catalogue import CatalogueEntry, nearest_model, read_catalogue

CATALOGUE = load_catalogue()
MODELS = {entry.id: entry for entry in CATALOGUE}


def test_no_model_is_listed_twice() -> None:
    assert len(MODELS) == len(CATALOGUE)


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.id)
def test_every_entry_says_what_it_must(entry: CatalogueEntry) -> None:
    assert re.fullmatch(r"[A-Za-z0-9-]+/[A-Za-z0-9._-]*[Gg]emma[A-Za-z0-9._-]*", entry.id)
    assert entry.license in ("gemma", "apache-2.0", "health-ai-developer-foundations")
    assert entry.variant in ("base", "it")
    assert entry.system_role in ("refused", "folded", "native", "none")
    assert entry.chat or entry.system_role == "none"
    assert entry.dtype in ("bfloat16", "float32")
    assert entry.modalities[0] == "text"
    assert set(entry.modalities) <= {"text", "image", "video", "audio"}
    assert entry.served != bool(entry.reason)
    if entry.served:
        assert entry.min_vllm is not None
        assert re.fullmatch(r"0\.[0-9]+\.[0-9]+", entry.min_vllm)
        assert entry.architecture


@pytest.mark.parametrize(
    "entry", [entry for entry in CATALOGUE if entry.shape], ids=lambda entry: entry.id
)
def test_every_shape_is_a_config_that_hangs_together(entry: CatalogueEntry) -> None:
    config = entry.config
    text = config.get("text_config", config)
    assert config["model_type"].startswith(("gemma", "paligemma", "vaultgemma"))
    assert text["num_hidden_layers"] == len(
        text.get("layer_types", [0] * text["num_hidden_layers"])
    )
    assert text["hidden_size"] % 64 == 0
    assert (config.get("torch_dtype") or config.get("dtype")) == entry.dtype
    assert ("image" in entry.modalities) == ("vision_config" in config)
    assert ("audio" in entry.modalities) == bool(config.get("audio_config"))
    assert entry.parameters is not None


@pytest.mark.parametrize(
    "name",
    [
        *("gemma-2b", "gemma-7b-it", "gemma-1.1-7b-it", "codegemma-1.1-7b-it", "gemma-2-27b-it"),
        *("gemma-2-2b-jpn-it", "shieldgemma-9b", "txgemma-9b-chat", "datagemma-rag-27b-it"),
        *("gemma-3-270m-it", "gemma-3-1b-pt", "gemma-3-27b-it", "gemma-3-27b-it-qat-q4_0-gguf"),
        *("gemma-3n-E2B-it", "gemma-3n-E4B", "medgemma-27b-text-it", "medgemma-1.5-4b-it"),
        *("translategemma-12b-it", "functiongemma-270m-it", "vaultgemma-1b"),
        *("paligemma-3b-mix-448", "paligemma2-28b-pt-896", "embeddinggemma-300m"),
        *("gemma-4-E2B-it", "gemma-4-E4B", "gemma-4-12B-it", "gemma-4-26B-A4B-it"),
        *("gemma-4-31B-it", "gemma-4-31B-it-qat-w4a16-ct", "gemma-4-E4B-it-assistant"),
        *("recurrentgemma-9b-it", "t5gemma-2-4b-4b", "diffusiongemma-26B-A4B-it"),
    ],
)
def test_every_family_is_there(name: str) -> None:
    assert f"google/{name}" in MODELS


@pytest.mark.parametrize(
    ("name", "gated", "system_role", "tool_call_parser", "reasoning_parser", "min_vllm"),
    [
        ("google/gemma-7b-it", True, "refused", None, None, "0.3.2"),
        ("google/gemma-2-9b-it", True, "refused", None, None, "0.5.1"),
        ("google/gemma-3-27b-it", True, "folded", None, None, "0.8.0"),
        ("google/gemma-3-27b-pt", True, "none", None, None, "0.8.0"),
        ("google/functiongemma-270m-it", True, "native", "functiongemma", None, "0.8.0"),
        ("google/gemma-4-31B-it", False, "native", "gemma4", "gemma4", "0.19.0"),
        ("google/gemma-4-31B", False, "none", None, None, "0.19.0"),
        ("google/embeddinggemma-300m", True, "none", None, None, "0.10.2"),
        ("google/vaultgemma-1b", True, "none", None, None, "0.27.1"),
    ],
)
def test_gate_template_and_parsers_are_the_models_own(
    name: str,
    gated: bool,
    system_role: str,
    tool_call_parser: str | None,
    reasoning_parser: str | None,
    min_vllm: str,
) -> None:
    entry = MODELS[name]
    assert (entry.gated, entry.system_role, entry.min_vllm) == (gated, system_role, min_vllm)
    assert (entry.tool_call_parser, entry.reasoning_parser) == (tool_call_parser, reasoning_parser)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("google/gemma-3-27b-it-qat-q4_0-gguf", "vLLM loads no GGUF files"),
        ("google/recurrentgemma-2b", "vLLM has no RecurrentGemma"),
        ("google/t5gemma-2-1b-1b", "vLLM has no T5Gemma"),
        ("google/shieldgemma-2-4b-it", "vLLM has no ShieldGemma 2"),
        (
            "google/gemma-4-E2B-it-assistant",
            "it drafts for the model of its name, which is served with --speculative-config",
        ),
    ],
)
def test_what_vllm_does_not_serve_is_known_with_the_reason(name: str, reason: str) -> None:
    assert (MODELS[name].served, MODELS[name].reason) == (False, reason)


def test_models_of_one_shape_differ_in_what_is_stored_only() -> None:
    plain, quantized = MODELS["google/gemma-4-31B-it"], MODELS["google/gemma-4-31B-it-qat-w4a16-ct"]
    assert plain.quantization_config is None
    assert quantized.config == {
        **plain.config,
        "quantization_config": quantized.quantization_config,
    }
    assert quantized.quantization_config is not None
    assert quantized.quantization_config["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
    }


def test_a_base_model_stored_in_float32_says_so_in_its_config() -> None:
    base, chat = MODELS["google/gemma-2-9b"], MODELS["google/gemma-2-9b-it"]
    assert base.config == {**chat.config, "torch_dtype": "float32"}


def test_the_config_is_what_the_hub_publishes() -> None:
    assert MODELS["google/gemma-3-27b-it"].config == {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "mm_tokens_per_image": 256,
        "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "gemma3_text",
            "head_dim": 128,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_attention_heads": 32,
            "num_hidden_layers": 62,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 168,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ({"id": "google/x", "shape": "no-such"}, KeyError),
        ({"id": "google/x", "quantization": "no-such"}, KeyError),
        ({"id": "google/x", "colour": "red"}, TypeError),
        ({}, TypeError),
    ],
)
def test_a_slip_in_the_file_is_not_overlooked(model: dict, error: type[Exception]) -> None:
    family = {"family": "F", "license": "gemma", "gated": True, "models": [model]}
    data = {"shapes": {}, "parameters": {}, "quantizations": {}, "families": [family]}
    with pytest.raises(error):
        read_catalogue(data)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("google/gemma-3-27-it", "google/gemma-3-27b-it"),
        ("gemma-3-4b-it", "google/gemma-3-4b-it"),
        ("GEMMA-2-9B-IT", "google/gemma-2-9b-it"),
        ("google/gemma4-31B-it", "google/gemma-4-31B-it"),
        ("google/paligemma2-3b-448", "google/paligemma2-3b-pt-448"),
        ("meta-llama/Llama-3.1-8B-Instruct", None),
    ],
)
def test_a_mistyped_name_finds_the_model_that_was_meant(typed: str, meant: str | None) -> None:
    assert nearest_model(typed, MODELS) == meant
