"""What is known of a model, and who was asked: a folder, the cache, the catalogue, the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

import local_hub
from checkpoint_samples import GEMMA, codes, facts_of, weights_file, write_model
from gemma_serve.adapters.hub.client import is_offline
from gemma_serve.adapters.hub.facts import read_hub
from gemma_serve.adapters.package_data import load_catalogue
from gemma_serve.planning.model.dtypes import choose_dtype
from gemma_serve.planning.model.facts import FactsReading, ModelFacts
from gemma_serve.planning.model.model_config import read_geometry
from gemma_serve.planning.model.weights import HeaderTensor, ModelWeights, model_weights
from gemma_serve.usecases.model_facts import find_model_facts
from local_hub import FIRST_BYTES, SHA, LocalHub, Refusal, serving

KNOWN = "google/gemma-7b-it"
OTHER = "me/my-gemma"
FILES = {
    "config.json": json.dumps(GEMMA).encode(),
    "model.safetensors": weights_file({"w": 1000}),
}
ENTRIES = {entry.id: entry for entry in load_catalogue()}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    with local_hub.alone(monkeypatch, tmp_path):
        yield


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub that has every model that it is asked for, the same for each name."""
    with serving(LocalHub(FILES)) as served:
        local_hub.use(monkeypatch, served.url)
        yield served


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert is_offline()


def cached_repo(cache: Path, model: str, revision: str = "main") -> Path:
    """A repository in the Hub's cache; gives the folder of its snapshot, with a whole model."""
    repo = cache / f"models--{model.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / revision).write_text(SHA)
    (repo / "snapshots").mkdir()
    return write_model(repo / "snapshots" / SHA)


def test_a_public_gemma_is_known_by_heart_and_nobody_is_asked(hub: LocalHub) -> None:
    entry = ENTRIES[KNOWN]
    assert find_model_facts(KNOWN) == FactsReading(
        ModelFacts(
            model=KNOWN,
            source="catalogue",
            architecture="GemmaForCausalLM",
            model_type="gemma",
            dtype="bfloat16",
            geometry=read_geometry(entry.config),
            entry=entry,
        )
    )
    assert facts_of(find_model_facts(KNOWN)).parameters == 8_537_680_896
    assert hub.asked == []


def test_no_name_of_the_catalogue_needs_the_network(hub: LocalHub) -> None:
    for name, entry in ENTRIES.items():
        reading = find_model_facts(name)
        facts = facts_of(reading)
        assert (facts.source, facts.entry) == ("catalogue", entry)
        assert codes(reading) == [] or not (entry.served and entry.shape), name
    assert hub.asked == []


@pytest.mark.usefixtures("offline")
def test_offline_a_public_gemma_is_known_all_the_same(hub: LocalHub) -> None:
    reading = find_model_facts(KNOWN)
    assert (facts_of(reading).source, reading.problems) == ("catalogue", ())
    assert hub.asked == []


def test_of_a_revision_the_hub_is_asked(hub: LocalHub) -> None:
    facts = facts_of(find_model_facts(KNOWN, "v1.1"))
    assert facts == replace(facts_of(read_hub(KNOWN, "v1.1")), entry=ENTRIES[KNOWN])
    assert (facts.source, facts.geometry) == ("hub", read_geometry(GEMMA))
    assert hub.asked[:3] == [
        f"GET /api/models/{KNOWN}/revision/v1.1?blobs=true",
        f"GET /{KNOWN}/resolve/{SHA}/config.json",
        f"GET /{KNOWN}/resolve/{SHA}/model.safetensors {FIRST_BYTES}",
    ]


def test_of_what_the_catalogue_does_not_list_the_hub_is_asked(hub: LocalHub) -> None:
    reading = find_model_facts(OTHER)
    assert reading == read_hub(OTHER)
    facts = facts_of(reading)
    assert (facts.source, facts.entry, facts.weights_bytes) == ("hub", None, 1000)


def test_without_the_hub_a_revision_is_taken_to_be_as_the_catalogue_says() -> None:
    reading = find_model_facts(KNOWN, "v1.1")
    assert reading.facts == find_model_facts(KNOWN).facts
    [problem] = reading.problems
    assert (problem.code, problem.blocking) == ("hub.unreachable", False)


def test_a_revision_that_the_hub_does_not_have_is_not_guessed_at(hub: LocalHub) -> None:
    hub.refuses = {"api": Refusal(404, "RevisionNotFound")}
    reading = find_model_facts(KNOWN, "v99")
    assert (reading.facts, codes(reading)) == (None, ["hub.revision_not_found"])


def test_a_licence_to_accept_first(hub: LocalHub) -> None:
    hub.refuses = {"config.json": Refusal(403, "GatedRepo")}
    other = find_model_facts(OTHER)
    assert (other.facts, codes(other)) == (None, ["gated-no-token", "model.size_unknown"])
    known = find_model_facts(KNOWN, "v1.1")
    assert (facts_of(known).source, codes(known)) == ("catalogue", ["gated-no-token"])


def test_of_what_nobody_knows_the_size_is_a_problem(hub: LocalHub) -> None:
    llama = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    hub.files = {"config.json": llama.encode(), "pytorch_model.bin": b""}
    reading = find_model_facts("me/llama")
    assert codes(reading) == ["model.unknown_architecture", "model.size_unknown"]
    assert [problem.blocking for problem in reading.problems] == [False, True]
    assert facts_of(reading).model_type == "llama"
    hub.files = {**FILES, "config.json": llama.encode()}
    assert codes(find_model_facts("me/llama")) == ["model.unknown_architecture"]


@pytest.mark.usefixtures("offline")
def test_offline_what_is_not_listed_is_unknown(hub: LocalHub) -> None:
    reading = find_model_facts(OTHER)
    assert (reading.facts, codes(reading)) == (None, ["hub.offline", "model.size_unknown"])
    assert "give its folder with `--model DIR`" in reading.problems[1].hint
    listed = find_model_facts(KNOWN, "v1.1")
    assert (facts_of(listed).source, codes(listed)) == ("catalogue", ["hub.offline"])
    assert hub.asked == []


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("google/gemma-7b-its", KNOWN),
        ("gemma-7b-it", KNOWN),
        ("Google/Gemma-3-4B-IT", "google/gemma-3-4b-it"),
        ("dmo", "demo"),
    ],
)
def test_a_typo_gets_a_suggestion(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, typed: str, meant: str
) -> None:
    hub.refuses = {"api": Refusal(401, "RepoNotFound")}
    [problem] = find_model_facts(typed).problems
    assert (problem.code, problem.blocking) == ("repo-not-found", True)
    assert problem.hint == (
        f"did you mean `--model {meant}`? If not: check the spelling: `gemma-serve models` lists "
        "the public Gemmas; if it is private, run `hf auth login` or set HF_TOKEN"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    [_, unknown] = find_model_facts(typed).problems
    assert unknown.code == "model.size_unknown"
    assert unknown.hint == f"did you mean `--model {meant}`?"


def test_what_is_like_nothing_gets_no_suggestion(hub: LocalHub) -> None:
    hub.refuses = {"api": Refusal(404, "RepoNotFound")}
    [problem] = find_model_facts("meta-llama/Llama-3.1-8B").problems
    assert problem.code == "repo-not-found"
    assert "did you mean" not in problem.hint


@pytest.mark.parametrize("model", [KNOWN, OTHER])
def test_a_cached_model_is_read_where_it_lies_and_nobody_is_asked(
    hub: LocalHub, tmp_path: Path, model: str
) -> None:
    snapshot = cached_repo(tmp_path / "cache", model)
    reading = find_model_facts(model, cache_dir=tmp_path / "cache")
    facts = facts_of(reading)
    assert reading.problems == ()
    assert (facts.model, facts.source, facts.weights_bytes) == (model, "cache", 1000)
    assert facts.geometry == read_geometry(GEMMA)
    assert facts.entry == ENTRIES.get(model)
    assert hub.asked == []
    (snapshot / "model.safetensors").write_bytes(b"half of it")
    unfinished = find_model_facts(model, cache_dir=tmp_path / "cache")
    assert facts_of(unfinished).source == ("catalogue" if model == KNOWN else "hub")
    assert unfinished.problems == ()


@pytest.mark.usefixtures("offline")
def test_a_cached_revision_is_known_offline(tmp_path: Path) -> None:
    cached_repo(tmp_path / "cache", OTHER, "v2")
    reading = find_model_facts(OTHER, "v2", cache_dir=tmp_path / "cache")
    assert (facts_of(reading).source, reading.problems) == ("cache", ())
    assert find_model_facts(OTHER, "v3", cache_dir=tmp_path / "cache").facts is None


def test_a_folder_goes_before_a_name(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "gemma-mine")
    (tmp_path / "google").mkdir()
    write_model(tmp_path / "google" / "gemma-7b-it")
    monkeypatch.chdir(tmp_path)
    for name in ("gemma-mine", KNOWN, "./gemma-mine", str(tmp_path / "gemma-mine")):
        reading = find_model_facts(name)
        facts = facts_of(reading)
        assert (facts.model, facts.source, reading.problems) == (name, "folder", ())
        assert (facts.weights_bytes, facts.entry) == (1000, None)
    missing = find_model_facts("./none")
    assert (missing.facts, codes(missing)) == (None, ["repo-not-found"])
    assert hub.asked == []


def test_the_demo_is_a_folder_of_the_package(hub: LocalHub) -> None:
    reading = find_model_facts("demo")
    facts = facts_of(reading)
    assert (facts.source, facts.model_type, reading.problems) == ("folder", "gemma", ())
    assert facts.geometry is not None
    assert sum(tensor.elements for tensor in facts.tensors) == facts.parameters
    assert hub.asked == []


HOPPER, TURING = (9, 0), (7, 5)


@pytest.mark.parametrize(
    ("wanted", "model_type", "stored", "capability", "dtype"),
    [
        ("auto", "gemma", "bfloat16", HOPPER, "bfloat16"),
        ("auto", "gemma2", "float32", HOPPER, "bfloat16"),
        ("auto", "gemma", "float16", HOPPER, "float16"),
        ("auto", "gemma3", "float16", HOPPER, "bfloat16"),
        ("auto", "gemma3", None, None, "bfloat16"),
        ("auto", "gemma", "bfloat16", TURING, "float16"),
        ("auto", "gemma2", "bfloat16", TURING, "float32"),
        ("auto", "gemma3_text", "float16", TURING, "float32"),
        ("auto", "gemma3n", "bfloat16", TURING, "float32"),
        ("auto", "gemma4", "bfloat16", TURING, "float32"),
        ("auto", "llama", "bfloat16", TURING, "float16"),
        ("half", "gemma", "bfloat16", HOPPER, "float16"),
        ("float", "gemma", "bfloat16", HOPPER, "float32"),
        ("bfloat16", "gemma", "bfloat16", TURING, "bfloat16"),
    ],
)
def test_the_dtype_that_the_engine_will_take(
    wanted: str, model_type: str, stored: str | None, capability: tuple[int, int] | None, dtype: str
) -> None:
    geometry = None if model_type == "llama" else read_geometry(GEMMA)
    facts = ModelFacts("m", "hub", model_type=model_type, dtype=stored, geometry=geometry)
    chosen = choose_dtype(wanted, facts, capability)
    assert chosen.dtype == dtype
    # A reason is given where the card decides, and nowhere else.
    assert bool(chosen.reason) == (capability == TURING and wanted == "auto")
    assert not chosen.reason or "compute capability 7.5 has no bfloat16" in chosen.reason


def test_a_model_that_nobody_knows_is_loaded_in_the_dtype_and_packed_weights_as_they_are() -> None:
    plain = (HeaderTensor("w", "BF16", (50,), 100),)
    wide = (HeaderTensor("w", "F32", (25,), 100),)
    packed = (HeaderTensor("w", "F8_E4M3", (100,), 100),)

    def loaded(tensors: tuple[HeaderTensor, ...], dtype: str, size: int = 1) -> object:
        return model_weights(None, tensors, dtype=dtype, tensor_parallel_size=size)

    assert loaded(plain, "float32") == ModelWeights(200, approximate=True)
    assert loaded(wide, "bfloat16") == ModelWeights(50, approximate=True)
    assert loaded(packed, "float32") == ModelWeights(100, approximate=True)
    assert loaded(plain, "bfloat16", 8) == ModelWeights(13, approximate=True)
    assert loaded((), "float32") is None
