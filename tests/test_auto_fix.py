"""`up --auto-fix`: what is safe and certain is mended, told, and tried once."""

import json
import socket
from pathlib import Path

import pytest

from gemma_serve.adapters.host import free_port
from gemma_serve.adapters.package_data import load_failures
from gemma_serve.adapters.state import Deployment, DeploymentFolder, deployment_folder
from gemma_serve.engine.diagnosis.diagnosis import Diagnosis, Ending
from gemma_serve.errors import EngineFailed, GemmaServeError, Problem
from gemma_serve.planning.failures import Change
from gemma_serve.usecases.auto_fix import Fix, find_fix, start_with_fixes, wait_for_release
from gemma_serve.usecases.diagnose import keep_diagnosis
from gemma_serve.usecases.events import AutoFixed
from running import Program, end_deployments, fake_python

TOO_LONG = Diagnosis(
    "known", "kv-too-small", "the cache is too small",
    change=Change({"max_model_len": "1024"}), remedy="shorten-context",
)  # fmt: skip


@pytest.fixture
def environ(tmp_path):
    return {"GEMMA_SERVE_STATE_DIR": str(tmp_path / "state")}


@pytest.fixture
def up(tmp_path, environ):
    """Start `up --auto-fix` with a fake engine that has the given faults."""
    programs = []

    def start(*args, port=None, **faults):
        program = Program(
            "up", "--model", "demo", "--engine-python", str(fake_python(tmp_path)), "--auto-fix",
            "--port", str(port or free_port("127.0.0.1")), *args,
            environ={**environ, "FAKE_ENGINE": json.dumps(faults)},
        )  # fmt: skip
        programs.append(program)
        return program

    yield start
    end_deployments(environ)
    for program in programs:
        program.__exit__()


def failed(folder: DeploymentFolder, found: Diagnosis | None, **fields) -> DeploymentFolder:
    """A deployment that failed, with what was found about it."""
    folder.begin()
    record = Deployment(
        name=folder.name, folder=folder.path, state="failed", changed_at=1.0, url="http://x",
        served_model_name="demo", model="demo", boot_id="", started_at=1.0, **fields,
    )  # fmt: skip
    folder.save(record)
    folder.write_json(folder.run, {"phase_limits_s": {"weights": 60.0}})
    if found is not None:
        keep_diagnosis(folder, found, Ending())
    return folder


def fix_after(folder, code="engine.died", flags=None):
    error = EngineFailed("it died", code=code)
    return find_fix(error, folder, flags or {}, {"A": "1"}, load_failures())


def test_the_number_of_the_log_becomes_a_flag(environ):
    folder = failed(deployment_folder("demo", environ), TOO_LONG)
    assert fix_after(folder, flags={"max_model_len": "2048", "port": "1"}) == Fix(
        "kv-too-small", "--max-model-len 1024", {"max_model_len": "1024", "port": "1"}, {"A": "1"}
    )


def test_a_variable_of_the_engine_goes_into_its_environment(environ):
    change = Change({}, {"VLLM_ENGINE_READY_TIMEOUT_S": "1200"})
    late = Diagnosis("known", "ready-timeout", "late", change=change, remedy="longer-ready-timeout")
    folder = failed(deployment_folder("demo", environ), late)
    assert fix_after(folder) == Fix(
        "ready-timeout", "VLLM_ENGINE_READY_TIMEOUT_S=1200", {},
        {"A": "1", "VLLM_ENGINE_READY_TIMEOUT_S": "1200"},
    )  # fmt: skip


def test_a_phase_that_took_too_long_gets_twice_the_time(environ):
    folder = failed(deployment_folder("demo", environ), None, phase="weights")
    given = {"phase_timeouts": {"imports": "5"}}
    assert fix_after(folder, "engine.phase_timeout", given) == Fix(
        "engine.phase_timeout", "--phase-timeout weights=120",
        {"phase_timeouts": {"imports": "5", "weights": "120"}}, {"A": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("found", "fields"),
    [
        (TOO_LONG, {"ready_s": 5.0}),  # it was ready before
        (None, {}),
        (Diagnosis("unknown", None, "?"), {}),
        (Diagnosis("known", "weights-oom", "no fix is certain"), {}),
        (Diagnosis("known", "kv-too-small", "no number", remedy="shorten-context"), {}),
    ],
)
def test_what_is_not_certain_is_left_to_the_person(environ, found, fields):
    assert fix_after(failed(deployment_folder("demo", environ), found, **fields)) is None


def test_a_refusal_is_mended_only_if_nothing_else_is_in_the_way():
    busy, other = Problem("gpu-busy", "held"), Problem("driver-too-old", "old")

    def fix(*problems):
        return find_fix(GemmaServeError.of(problems), None, {}, {}, load_failures())

    assert fix(busy) == Fix("gpu-busy", "wait for memory that is being released", {}, {}, True)
    assert fix(busy, other) is None
    assert fix(other) is None
    long = Problem("len-over-derived", "too long", settings={"max_model_len": "2048"})
    assert fix(long) == Fix(
        "len-over-derived", "--max-model-len 2048", {"max_model_len": "2048"}, {}
    )
    # The one after the other, each with a start of its own.
    assert fix(long, busy) == fix(long)
    assert fix(Problem("kv-too-small", "nobody knows how long")) is None


def test_each_fix_is_tried_once_and_three_at_most(environ):
    ids = iter(["kv-too-small", "port-in-use", "compile-cache", "ready-timeout"])
    told, tries = [], []

    def start(flags, environ, begun):
        tries.append(dict(flags))
        begun("demo")
        id_ = next(ids)
        remedy = load_failures()[id_].remedy
        change = Change({"max_model_len": "9"})
        found = Diagnosis("known", id_, "t", change=change, remedy=remedy)
        failed(deployment_folder("demo", environ), found)
        raise EngineFailed(id_, code=id_)

    with pytest.raises(EngineFailed, match="ready-timeout"):
        start_with_fixes(start, {}, environ, on_event=told.append)
    assert [(event.id, event.attempt) for event in told] == [
        ("kv-too-small", 1), ("port-in-use", 2), ("compile-cache", 3),
    ]  # fmt: skip
    assert all(isinstance(event, AutoFixed) for event in told)
    assert [try_.get("max_model_len") for try_ in tries] == [None, "9", "9", "9"]


@pytest.mark.parametrize(
    ("used", "waits"), [([5, 5], 1), ([5, 4, 3, 3], 3), ([5, 6], 1), (range(100, 0, -1), 20)]
)
def test_waiting_ends_when_no_memory_is_given_back_any_more(used, waits):
    readings, slept = iter(used), []
    wait_for_release(lambda: next(readings), slept.append)
    assert len(slept) == waits


def test_a_context_that_is_too_long_is_shortened_and_the_start_succeeds(up):
    program = up("--once", "--max-model-len", "2048", kv_room=1024)
    assert program.exit_code() == 0
    err = "".join(program.err)
    assert "auto-fix 1 for kv-too-small: --max-model-len 1024\n" in err
    assert err.count("engine's pid") == 2
    assert any(line.startswith("ready after") for line in program.out)


def test_a_context_that_is_refused_before_the_start_is_shortened_too(up):
    program = up("--once", "--max-model-len", "99999")
    assert program.exit_code() == 0
    err = "".join(program.err)
    assert "warning: the context is longer than the model was made for: " in err
    assert "auto-fix 1 for len-over-derived: --max-model-len 2048\n" in err
    assert err.count("engine's pid") == 1


def test_a_fix_that_did_not_help_is_not_tried_again(up):
    program = up("--max-model-len", "2048", kv_room=1024, kv_room_said=1500)
    assert program.exit_code() == 3
    err = "".join(program.err)
    assert err.count("auto-fix") == 1
    assert "error: the engine died during KV cache" in err


def test_a_taken_port_gives_way_to_the_next_free_one(up):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        program = up("--once", "--json", port=port)
        assert program.exit_code() == 0
    events = [json.loads(line) for line in program.out]
    (fixed,) = [event for event in events if event.get("event") == "auto_fix"]
    assert (fixed["id"], fixed["attempt"]) == ("port-in-use", 1)
    other = int(fixed["what"].removeprefix("--port "))
    assert other != port
    assert events[-1]["data"]["url"] == f"http://127.0.0.1:{other}"


def test_in_the_background_too(up, environ):
    program = up("--detach", "--max-model-len", "2048", kv_room=1024)
    assert program.exit_code(detached=True) == 0
    run = json.loads(Path(deployment_folder("demo", environ).run).read_text())
    assert run["settings"]["max_model_len"] == 1024
