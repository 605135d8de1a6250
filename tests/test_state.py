"""Deployments on disk, and this machine's ports."""

import json
import os
import socket
import stat
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest

from gemma_serve.adapters import host, state
from gemma_serve.adapters.settings import find_api_key, key_file_warnings
from gemma_serve.errors import UsageError


@pytest.fixture
def environ(tmp_path):
    return {"GEMMA_SERVE_STATE_DIR": str(tmp_path)}


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def deployment(environ, child, tmp_path):
    found = state.Deployment(
        name="demo-8000",
        url="http://127.0.0.1:8000",
        served_model_name="demo",
        model="demo",
        pid=child.pid,
        started_at=psutil.Process(child.pid).create_time(),
        log=state.prepare_log("demo-8000", environ),
        api_key_file=tmp_path / "key",
        ready=True,
    )
    state.save_deployment(found)
    return found


def test_what_was_saved_is_found_while_its_process_lives(deployment, environ, child):
    assert state.running_deployments(environ) == [deployment]
    child.kill()
    child.wait()
    assert state.running_deployments(environ) == []


def test_a_pid_that_was_used_again_is_somebody_else(deployment, environ):
    state.save_deployment(replace(deployment, started_at=deployment.started_at - 100))
    assert state.running_deployments(environ) == []


def test_a_removed_deployment_leaves_its_log(deployment, environ):
    state.remove_deployment(deployment)
    state.remove_deployment(deployment)
    assert state.running_deployments(environ) == []
    assert deployment.log.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": 1}'])
def test_a_damaged_record_is_no_deployment(deployment, environ, text):
    (deployment.log.parent / "deployment.json").write_text(text)
    assert state.running_deployments(environ) == []


def test_files_are_for_their_owner_only(deployment):
    record = deployment.log.parent / "deployment.json"
    assert [stat.S_IMODE(p.stat().st_mode) for p in (record, deployment.log)] == [0o600] * 2
    assert set(json.loads(record.read_text())) == {
        "name", "url", "served_model_name", "model", "pid", "started_at", "log", "api_key_file",
        "ready",
    }  # fmt: skip


def test_the_last_log_is_kept_beside_the_new_one(environ):
    log = state.prepare_log("demo-1", environ)
    log.write_text("old")
    assert state.prepare_log("demo-1", environ).read_text() == ""
    assert log.with_name("engine.log.1").read_text() == "old"


def test_a_state_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write the state folder"):
        state.prepare_log("demo-1", {"GEMMA_SERVE_STATE_DIR": str(tmp_path / "file")})


@pytest.mark.parametrize(
    ("served", "name"),
    [("google/gemma-7b-it", "gemma-7b-it-80"), ("My Gemma!", "my-gemma-80"), ("../..", "model-80")],
)
def test_names_of_deployments(served, name):
    assert state.deployment_name(served, 80) == name


def test_a_taken_port_names_its_holder_and_a_way_out():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        problem = host.port_problem("127.0.0.1", port)
    assert problem is not None
    assert (problem.code, problem.blocking) == ("port.in_use", True)
    assert f"port {port} on 127.0.0.1 is taken" in problem.message
    assert f"(pid {os.getpid()})" in problem.message
    assert f"--port {port + 1}" in problem.hint


def test_a_free_port_is_free_and_an_address_of_others_is_told():
    assert host.port_problem("127.0.0.1", host.free_port("127.0.0.1")) is None
    problem = host.port_problem("192.0.2.1", 8000)
    assert problem is not None
    assert problem.code == "port.bad_address"


def test_the_key_comes_from_the_file_then_the_environment(tmp_path):
    path = tmp_path / "key"
    path.write_text("from-file\n")
    environ = {"GEMMA_SERVE_API_KEY": "from-env", "VLLM_API_KEY": "vllm"}
    keys = [
        find_api_key(environ, path),
        find_api_key(environ, None),
        find_api_key({"VLLM_API_KEY": "vllm"}, None),
    ]
    assert [(k.value, k.source) for k in keys if k] == [
        ("from-file", str(path)),
        ("from-env", "$GEMMA_SERVE_API_KEY"),
        ("vllm", "$VLLM_API_KEY"),
    ]
    assert find_api_key({}, None) is None
    assert "from-file" not in repr(keys)


@pytest.mark.parametrize(("text", "found"), [("", "nothing"), ("a b", "2 words")])
def test_a_key_file_must_hold_one_key(tmp_path, text, found):
    path = tmp_path / "key"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"holds {found}, but one key was wanted"):
        find_api_key({}, path)


def test_a_key_file_that_others_can_read_is_a_warning(tmp_path):
    path = tmp_path / "key"
    path.write_text("k")
    path.chmod(0o644)
    (problem,) = key_file_warnings(path)
    assert (problem.blocking, problem.hint) == (False, f"chmod 600 {path}")
    path.chmod(0o600)
    assert key_file_warnings(path) == ()
