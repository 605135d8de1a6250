"""Compiled graphs of a start that did not get through its compilation."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from gemma_serve.adapters.state import deployment_folder
from gemma_serve.engine.processes import identify
from gemma_serve.usecases.compile_caches import note_phase, set_stale_aside
from gemma_serve.usecases.journal import first_record
from gemma_serve.usecases.run import Run, write_run


def a_run(name="demo", port=8000, cache_dir=Path("/nowhere")):
    """A run with its caches below `cache_dir`."""
    return Run(
        name=name, model="demo", served_model_name="demo", has_chat=True, host="127.0.0.1",
        port=port, engine="vllm 0.32.0", gpus=(), argv=("python",),
        environment={"VLLM_CACHE_ROOT": str(cache_dir / "key" / "vllm")}, key_source=None,
        api_key_file=None, settings={}, detached=False, force=False, restart="no",
        drain_timeout=0.0, shutdown_timeout=60.0, probe_interval=5.0, probe_deadline=20.0,
        phase_limits_s={}, cache_dir=cache_dir,
    )  # fmt: skip


@pytest.fixture
def environ(tmp_path):
    return {"GEMMA_SERVE_STATE_DIR": str(tmp_path / "state")}


@pytest.fixture
def run(tmp_path):
    return a_run(cache_dir=tmp_path / "caches")


@pytest.fixture
def folder(environ):
    found = deployment_folder("demo", environ)
    found.begin()
    return found


@pytest.fixture
def graphs(tmp_path):
    """The folder of compiled graphs, with something in it."""
    place = tmp_path / "caches" / "key" / "vllm" / "torch_compile_cache"
    place.mkdir(parents=True)
    (place / "half").write_text("")
    return place


def test_what_a_start_died_over_is_moved_and_told_once(run, folder, graphs, environ):
    note_phase("compilation", run, folder)
    told = set_stale_aside(run, folder, environ)
    moved = graphs.with_name("torch_compile_cache.set-aside")
    assert told is not None
    assert (told.blocking, str(moved) in told.message) == (False, True)
    assert (graphs.exists(), (moved / "half").exists()) == (False, True)
    assert set_stale_aside(run, folder, environ) is None


@pytest.mark.parametrize("phase", ["KV cache", "CUDA graphs", "API server", "first token"])
def test_a_start_that_came_through_it_is_trusted(run, folder, graphs, environ, phase):
    note_phase("compilation", run, folder)
    note_phase(phase, run, folder)
    assert set_stale_aside(run, folder, environ) is None
    assert graphs.exists()


def test_before_it_the_mark_of_an_earlier_start_stays(run, folder, graphs, environ):
    note_phase("compilation", run, folder)
    note_phase("weights", run, folder)
    assert set_stale_aside(run, folder, environ) is not None


@pytest.mark.parametrize("shared", [True, False])
def test_a_cache_that_another_engine_runs_from_stays(
    run, folder, graphs, environ, tmp_path, shared
):
    other = a_run("other", 8001, tmp_path / ("caches" if shared else "elsewhere"))
    beside = deployment_folder("other", environ)
    beside.begin()
    beside.write_json(beside.run, write_run(other))
    record = first_record(other, beside, needs_key=False)
    beside.save(replace(record, supervisor=identify(os.getpid())))
    note_phase("compilation", run, folder)
    told = set_stale_aside(run, folder, environ)
    assert (told is None, graphs.exists()) == (shared, shared)
