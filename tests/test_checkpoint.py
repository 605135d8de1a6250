"""How large a model is: from its folder and from the catalogue."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_samples import codes, write_model, write_weights
from gemma_serve.adapters.checkpoint import read_checkpoint
from gemma_serve.adapters.package_data import load_catalogue
from gemma_serve.planning.checkpoint import (
    Checkpoint,
    CheckpointReading,
    engine_dtype,
    loaded_bytes,
    nearest_model,
)
from gemma_serve.planning.gpus import Gpu


def test_a_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    write_weights(folder / "consolidated.safetensors", size=1000)
    assert read_checkpoint(folder) == CheckpointReading(
        Checkpoint(
            model=str(folder),
            source="folder",
            weights_bytes=1000,
            architecture="GemmaForCausalLM",
            model_type="gemma",
            dtype="bfloat16",
            max_position_embeddings=8192,
        )
    )


def test_a_multimodal_config_and_a_dtype_told_by_the_weights_alone(tmp_path: Path) -> None:
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {"max_position_embeddings": 131072},
        "quantization_config": {"quant_method": "compressed-tensors"},
    }
    folder = write_model(tmp_path / "m", config)
    write_weights(folder / "model.safetensors", size=64, dtype="F32")
    assert read_checkpoint(folder, model="mine").checkpoint == Checkpoint(
        model="mine",
        source="folder",
        weights_bytes=64,
        architecture="Gemma3ForConditionalGeneration",
        model_type="gemma3",
        dtype="float32",
        quantization="compressed-tensors",
        max_position_embeddings=131072,
    )


def test_shards_are_those_that_the_index_names(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_weights(folder / "model-1.safetensors", size=10)
    reading = read_checkpoint(folder)
    assert codes(reading) == ["model.weights_missing"]
    assert "1 of the 2 weight files" in reading.problems[0].message
    assert "model-2.safetensors" in reading.problems[0].message
    assert reading.checkpoint is not None
    assert reading.checkpoint.weights_bytes is None
    write_weights(folder / "model-2.safetensors", size=32)
    whole = read_checkpoint(folder)
    assert whole.checkpoint is not None
    assert (whole.checkpoint.weights_bytes, whole.problems) == (42, ())


def test_damaged_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    write_weights(folder / "model.safetensors", size=1000, cut=1)
    [cut] = read_checkpoint(folder).problems
    assert (cut.code, "is cut short" in cut.message) == ("model.weights_broken", True)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1000\n"
    (folder / "model.safetensors").write_text(pointer)
    [lfs] = read_checkpoint(folder).problems
    assert (lfs.code, "git lfs pull" in lfs.hint) == ("model.weights_broken", True)
    (folder / "model.safetensors").unlink()
    assert codes(read_checkpoint(folder)) == ["model.weights_missing"]
    (folder / "pytorch_model.bin").write_bytes(bytes(7))
    pickled = read_checkpoint(folder).checkpoint
    assert pickled is not None
    assert pickled.weights_bytes == 7


@given(content=st.binary(max_size=64))
def test_any_bytes_at_all_are_read_without_an_exception(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = write_model(tmp_path_factory.mktemp("m", numbered=True))
    (folder / "model.safetensors").write_bytes(content)
    assert codes(read_checkpoint(folder)) in (["model.weights_broken"], [])


@pytest.mark.parametrize(
    "header",
    [{"w": 1}, {"w": {}}, {"w": {"dtype": "BF16", "data_offsets": [0]}}, {"w": {"dtype": 1}}],
)
def test_a_header_of_another_shape_is_no_header(tmp_path: Path, header: dict[str, Any]) -> None:
    folder = write_model(tmp_path / "m")
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert codes(read_checkpoint(folder)) == ["model.weights_broken"]


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert codes(read_checkpoint(tmp_path / "none")) == ["model.not_found"]
    assert codes(read_checkpoint(tmp_path)) == ["model.no_config"]
    (tmp_path / "config.json").write_text("{")
    [problem] = read_checkpoint(tmp_path).problems
    assert "can't be read as JSON" in problem.message


def test_another_kind_of_model_is_a_warning(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    [problem] = read_checkpoint(write_model(tmp_path / "m", config)).problems
    assert (problem.code, problem.blocking) == ("model.not_gemma", False)
    assert "is a `llama`" in problem.message


def test_the_dtype_that_vllm_will_take() -> None:
    hopper = Gpu(0, "GPU-0", "0", "NVIDIA H200", 1, 0, 1, compute_capability=(9, 0))
    turing = Gpu(1, "GPU-1", "1", "Tesla T4", 1, 0, 1, compute_capability=(7, 5))
    new, old = [hopper], [hopper, turing]
    gemma = Checkpoint("m", "folder", 100, model_type="gemma", dtype="bfloat16")
    gemma3 = Checkpoint("m", "folder", 100, model_type="gemma3", dtype="bfloat16")
    wide = Checkpoint("m", "folder", 100, model_type="gemma2", dtype="float32")
    half = Checkpoint("m", "folder", 100, model_type="gemma", dtype="float16")
    assert engine_dtype("auto", gemma, new) == "bfloat16"
    assert engine_dtype("auto", None, new) == "bfloat16"
    assert engine_dtype("auto", wide, new) == "bfloat16"
    assert engine_dtype("auto", half, new) == "float16"
    assert engine_dtype("auto", gemma, old) == "float16"
    assert engine_dtype("auto", gemma3, old) == "float32"
    assert engine_dtype("half", gemma, new) == "float16"
    assert loaded_bytes(gemma3, "float32") == 200
    assert loaded_bytes(wide, "bfloat16") == 50
    assert loaded_bytes(Checkpoint("m", "hub", 100, quantization="fp8"), "float32") == 100
    assert loaded_bytes(Checkpoint("m", "hub"), "float32") is None


def test_the_catalogue_is_right() -> None:
    models = {entry.id: entry for entry in load_catalogue()}
    assert len(models) == len(load_catalogue())
    assert all(entry.id.startswith("google/") for entry in models.values())
    seven = models["google/gemma-7b-it"]
    assert seven.checkpoint() == Checkpoint(
        model="google/gemma-7b-it",
        source="catalogue",
        weights_bytes=17_075_361_792,
        model_type="gemma",
        dtype="bfloat16",
        max_position_embeddings=8192,
    )
    assert (seven.system_role, seven.chat) == ("refused", True)
    by_name = {entry.id.endswith("-it") for entry in models.values() if entry.chat}
    assert by_name == {True}
    roles = {(entry.generation, entry.system_role) for entry in models.values()}
    assert ("3", "folded") in roles
    assert ("4", "native") in roles
    one_billion = models["google/gemma-3-1b-it"]
    assert (one_billion.model_type, one_billion.max_position_embeddings) == ("gemma3_text", 32768)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("gemma-7b-it", "google/gemma-7b-it"),
        ("google/gemma-7b-its", "google/gemma-7b-it"),
        ("Google/Gemma-3-4B-IT", "google/gemma-3-4b-it"),
        ("google/gemma-4-e2b", "google/gemma-4-E2B"),
        ("meta-llama/Llama-3.1-8B", None),
    ],
)
def test_the_model_that_was_meant(typed: str, meant: str | None) -> None:
    assert nearest_model(typed, [entry.id for entry in load_catalogue()]) == meant
