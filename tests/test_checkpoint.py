"""What a folder says of its model: config.json and the headers of the weight files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_samples import GEMMA, codes, facts_of, weights_file, write_model, write_weights
from gemma_serve.adapters.checkpoint import read_checkpoint
from gemma_serve.planning.model.facts import FactsReading, ModelFacts
from gemma_serve.planning.model.model_config import read_geometry
from gemma_serve.planning.model.weights import HeaderTensor

QUANTIZED = {"quant_method": "compressed-tensors", "format": "float-quantized"}


def test_a_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    write_weights(folder / "consolidated.safetensors", size=1000)
    assert read_checkpoint(folder) == FactsReading(
        ModelFacts(
            model=str(folder),
            source="folder",
            architecture="GemmaForCausalLM",
            model_type="gemma",
            dtype="bfloat16",
            geometry=read_geometry(GEMMA),
            tensors=(HeaderTensor("model", "BF16", (500,), 1000),),
            weights_bytes=1000,
        )
    )


def test_a_multimodal_config_and_a_dtype_told_by_the_weights_alone(tmp_path: Path) -> None:
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {"max_position_embeddings": 131072},
        "quantization_config": QUANTIZED,
    }
    folder = write_model(tmp_path / "m", config)
    write_weights(folder / "model.safetensors", size=64, dtype="F32")
    facts = facts_of(read_checkpoint(folder, model="mine"))
    assert facts == ModelFacts(
        model="mine",
        source="folder",
        architecture="Gemma3ForConditionalGeneration",
        model_type="gemma3",
        dtype="float32",
        quantization_config=QUANTIZED,
        geometry=read_geometry(config),
        tensors=(HeaderTensor("model", "F32", (16,), 64),),
        weights_bytes=64,
    )
    assert (facts.quantization, facts.has_fp8_kv_cache) == ("compressed-tensors", False)
    assert facts.geometry is not None
    assert facts.geometry.max_model_len == 131072


def test_the_dtype_of_most_of_the_weights_counts(tmp_path: Path) -> None:
    config = {key: value for key, value in GEMMA.items() if key != "torch_dtype"}
    folder = write_model(tmp_path / "m", config)
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_weights(folder / "a.safetensors", size=8, dtype="F32")
    write_weights(folder / "b.safetensors", size=100, dtype="F16")
    assert facts_of(read_checkpoint(folder)).dtype == "float16"


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_that_the_config_names_goes_before_that_of_the_weights(
    tmp_path: Path, key: str
) -> None:
    bare = {k: v for k, v in GEMMA.items() if k != "torch_dtype"}
    folder = write_model(tmp_path / "m", {**bare, key: "float32"})
    assert facts_of(read_checkpoint(folder)).dtype == "float32"


def test_shards_are_those_that_the_index_names(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_weights(folder / "model-1.safetensors", size=10)
    reading = read_checkpoint(folder)
    assert codes(reading) == ["weights-missing"]
    assert reading.problems[0].blocking
    assert "1 of the 2 weight files" in reading.problems[0].message
    assert "model-2.safetensors" in reading.problems[0].message
    facts = facts_of(reading)
    assert (facts.weights_bytes, facts.tensors) == (None, ())
    assert facts.geometry == read_geometry(GEMMA)
    write_weights(folder / "model-2.safetensors", size=32)
    whole = read_checkpoint(folder)
    assert whole.problems == ()
    assert facts_of(whole).weights_bytes == 42
    assert facts_of(whole).tensors == (
        HeaderTensor("model-1", "BF16", (5,), 10),
        HeaderTensor("model-2", "BF16", (16,), 32),
    )


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_an_index_that_names_no_files(tmp_path: Path, index: dict[str, Any]) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    [problem] = read_checkpoint(folder).problems
    assert (problem.code, problem.blocking) == ("weights-missing", True)
    assert "names no weight files" in problem.message


def test_damaged_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    write_weights(folder / "model.safetensors", size=1000, cut=1)
    [cut] = read_checkpoint(folder).problems
    assert (cut.code, "is cut short" in cut.message) == ("weights-truncated", True)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1000\n"
    (folder / "model.safetensors").write_text(pointer)
    broken = read_checkpoint(folder)
    [lfs] = broken.problems
    assert (lfs.code, "git lfs pull" in lfs.hint) == ("weights-truncated", True)
    assert (facts_of(broken).weights_bytes, facts_of(broken).tensors) == (None, ())
    (folder / "model.safetensors").unlink()
    assert codes(read_checkpoint(folder)) == ["weights-missing"]
    (folder / "pytorch_model.bin").write_bytes(bytes(7))
    pickled = read_checkpoint(folder)
    assert pickled.problems == ()
    assert (facts_of(pickled).weights_bytes, facts_of(pickled).tensors) == (7, ())


@given(content=st.binary(max_size=64))
def test_any_bytes_at_all_are_read_without_an_exception(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = write_model(tmp_path_factory.mktemp("m", numbered=True))
    (folder / "model.safetensors").write_bytes(content)
    assert codes(read_checkpoint(folder)) in (["weights-truncated"], [])


@pytest.mark.parametrize(
    "header",
    [
        {"w": 1},
        {"w": {}},
        {"w": {"dtype": "BF16", "data_offsets": [0]}},
        {"w": {"dtype": 1}},
        {"w": {"dtype": "BF16", "data_offsets": [0, 4]}},
        {"w": {"dtype": "BF16", "shape": 2, "data_offsets": [0, 4]}},
        {"w": {"dtype": "BF16", "shape": [2], "data_offsets": [4, 0]}},
        {"w": {"dtype": "BF16", "shape": [2], "data_offsets": ["0", "4"]}},
        {"w": {"dtype": "BF16", "shape": ["two"], "data_offsets": [0, 4]}},
    ],
)
def test_a_header_of_another_shape_is_no_header(tmp_path: Path, header: dict[str, Any]) -> None:
    folder = write_model(tmp_path / "m")
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    assert codes(read_checkpoint(folder)) == ["weights-truncated"]


def test_only_the_headers_are_read(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    file = folder / "model.safetensors"
    with file.open("wb") as stream:
        head = weights_file({"w": 2**40}, cut=2**40)
        stream.write(head)
        # A terabyte of which nothing is on the disk.
        stream.truncate(len(head) + 2**40)
    facts = facts_of(read_checkpoint(folder))
    assert facts.tensors == (HeaderTensor("w", "BF16", (2**39,), 2**40),)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert codes(read_checkpoint(tmp_path / "none")) == ["repo-not-found"]
    assert codes(read_checkpoint(tmp_path)) == ["model.no_config"]
    (tmp_path / "config.json").write_text("{")
    reading = read_checkpoint(tmp_path)
    [problem] = reading.problems
    assert "can't be read as JSON" in problem.message
    assert (reading.facts, problem.blocking) == (None, True)
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert codes(read_checkpoint(tmp_path)) == ["model.no_config"]
    assert codes(read_checkpoint(tmp_path / "config.json")) == ["repo-not-found"]


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("llama", "`llama` is no Gemma"),
        ("gemma9", "`gemma9` is a newer kind"),
        ("recurrent_gemma", "`recurrent_gemma` is a relative of Gemma"),
    ],
)
def test_another_kind_of_model_is_a_warning_and_its_size_is_known_all_the_same(
    tmp_path: Path, model_type: str, message: str
) -> None:
    config = {"architectures": ["SomeForCausalLM"], "model_type": model_type}
    reading = read_checkpoint(write_model(tmp_path / "m", config), model="other")
    [problem] = reading.problems
    assert (problem.code, problem.blocking) == ("model.unknown_architecture", False)
    assert message in problem.message
    assert reading.facts == ModelFacts(
        model="other",
        source="folder",
        architecture="SomeForCausalLM",
        model_type=model_type,
        dtype="bfloat16",
        tensors=(HeaderTensor("model", "BF16", (500,), 1000),),
        weights_bytes=1000,
    )
    assert reading.facts.parameters == 500


@pytest.mark.parametrize(
    "config",
    [
        {},
        {**GEMMA, "num_hidden_layers": "two"},
        {**GEMMA, "head_dim": -1},
        {**GEMMA, "vocab_size": 2**60},
        {"model_type": "gemma3", "text_config": []},
        {"architectures": [3], "model_type": 4, "quantization_config": 5, "torch_dtype": 6},
    ],
)
def test_a_config_that_makes_no_sense_is_a_warning(tmp_path: Path, config: dict[str, Any]) -> None:
    reading = read_checkpoint(write_model(tmp_path / "m", config))
    [problem] = reading.problems
    assert problem.code in ("model.bad_config", "model.unknown_architecture")
    assert not problem.blocking
    assert facts_of(reading).geometry is None
    assert facts_of(reading).weights_bytes == 1000


def test_an_fp8_kv_cache_that_the_checkpoint_asks_for(tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "float"}
    config = {**GEMMA, "quantization_config": {**QUANTIZED, "kv_cache_scheme": scheme}}
    assert facts_of(read_checkpoint(write_model(tmp_path / "m", config))).has_fp8_kv_cache
