"""Deployments on disk, who looks after them, and this machine's ports."""

import os
import socket
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gemma_serve.adapters import host
from gemma_serve.adapters.claims import claim_name, claim_port
from gemma_serve.adapters.settings import find_api_key, key_file_warnings
from gemma_serve.adapters.state import Deployment, all_deployments, deployment_folder
from gemma_serve.engine.processes import boot_id, identify
from gemma_serve.engine.shared_files import make_temporary_folder
from gemma_serve.errors import GemmaServeError, Problem, UsageError
from gemma_serve.planning.config import deployment_name
from gemma_serve.planning.process_id import Member, ProcessId, SharedFile
from gemma_serve.usecases.deployments import claim, find_deployment, settle

# Says that it has its locks, and holds them.
HOLDER = "import time; print('here', flush=True); time.sleep(300)"


@pytest.fixture
def environ(tmp_path):
    return {"GEMMA_SERVE_STATE_DIR": str(tmp_path / "state")}


@pytest.fixture
def child():
    """Start a process that does nothing, in a session of its own; it ends with the test."""
    found = []

    def start(**options):
        command = [sys.executable, "-c", HOLDER]
        found.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, **options)
        )
        found[-1].stdout.readline()
        return found[-1]

    yield start
    for process in found:
        process.kill()
        process.communicate()


def whole(environ, name="demo", **fields):
    """A record in which everything is said; nobody of it lives."""
    folder = deployment_folder(name, environ)
    folder.begin()
    gone = ProcessId(2**22 - 1, 1)
    record = Deployment(
        name=name,
        folder=folder.path,
        state="ready",
        changed_at=1764000002.25,
        url="http://127.0.0.1:8000",
        served_model_name="demo",
        model="demo",
        boot_id=boot_id(),
        started_at=1764000000.5,
        supervisor=gone,
        guard=gone,
        leader=gone,
        members=(Member(gone), Member(ProcessId(2**22 - 2, 2), "VLLM::EngineCore")),
        shared_files=(SharedFile("/dev/shm/psm_of_a_test", 7),),
        temporary_folder=Path("/tmp/gemma-serve-of-a-test"),
        detached=True,
        engine="vllm 0.32.0",
        gpus=("GPU-1", "GPU-2"),
        phase="first token",
        phase_began_at=1764000001.75,
        ready_s=1.5,
        restart="on-failure",
        restarts=2,
        needs_key=True,
        api_key_file=Path("/etc/key"),
        problem=Problem("alive-but-dead", "it has stopped generating", "look at it"),
    )
    record = replace(record, **fields)
    folder.save(record)
    return record


def test_what_was_saved_reads_back_whole(environ):
    bare = Deployment(
        name="bare", folder=deployment_folder("bare", environ).path, state="starting",
        changed_at=1.0, url="", served_model_name="", model="", boot_id="", started_at=1.0,
    )  # fmt: skip
    deployment_folder("bare", environ).begin()
    deployment_folder("bare", environ).save(bare)
    record = whole(environ)
    assert deployment_folder("demo", environ).load() == record
    assert all_deployments(environ) == [bare, record]
    assert deployment_folder("none", environ).load() is None


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"{}", b'{"schema": 1}', b'{"schema": 99, "name": "demo"}', b"\xff"]
)
def test_a_damaged_record_is_told_apart_from_none(environ, text):
    record = whole(environ)
    (record.folder / "deployment.json").write_bytes(text)
    found = deployment_folder("demo", environ).load()
    assert (found.name, found.state, found.supervisor) == ("demo", "unreadable", None)
    settled = settle("demo", environ)
    assert (settled.deployment.state, settled.running, settled.ended) == ("unreadable", False, ())


def test_a_damaged_record_of_one_that_runs_is_not_taken_for_ended(environ):
    record = whole(environ)
    with claim("demo", 8000, environ):
        (record.folder / "deployment.json").write_text("{")
        settled = settle("demo", environ)
    assert (settled.deployment.state, settled.running) == ("unreadable", True)


def test_files_are_for_their_owner_only(environ):
    folder = whole(environ).folder
    with claim("demo", 8000, environ):
        deployment_folder("demo", environ).add_event({"event": "ready"})
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == dict.fromkeys(
        ("deployment.json", "engine.log", "events.jsonl", "lock", "supervisor.log"), 0o600
    )  # fmt: skip
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_last_log_and_events_are_kept_beside_the_new_ones(environ):
    folder = deployment_folder("demo", environ)
    folder.begin()
    folder.log.write_text("old")
    folder.events.write_text("{}\n")
    folder.begin()
    found = {path.name: path.read_text() for path in folder.path.iterdir()}
    assert found == {
        "engine.log": "", "engine.log.1": "old", "events.jsonl": "", "events.jsonl.1": "{}\n",
        "supervisor.log": "",
    }  # fmt: skip


def test_a_state_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    environ = {"GEMMA_SERVE_STATE_DIR": str(tmp_path / "file")}
    with pytest.raises(UsageError, match="cannot write the state folder"):
        deployment_folder("demo", environ).begin()
    with pytest.raises(UsageError, match="cannot write the state folder"):
        claim_name("demo", environ)


def test_a_name_is_had_by_one_until_the_last_who_inherited_it_is_gone(environ, child):
    lock = claim_name("demo", environ)
    assert claim_name("demo", environ) is None
    heir = child(pass_fds=(lock.fd,))
    lock.release()
    assert claim_name("demo", environ) is None
    heir.kill()
    heir.wait()
    with claim_name("demo", environ) as again:
        assert again is not None


def test_a_port_is_had_by_one_until_the_last_who_inherited_it_is_gone(environ, child):
    lock = claim_port(8000, environ)
    claim_port(8001, environ).release()
    heir = child(pass_fds=(lock.fd,))
    lock.release()
    with pytest.raises(GemmaServeError, match="another `gemma-serve up` is using port 8000"):
        claim_port(8000, environ)
    heir.kill()
    heir.wait()
    claim_port(8000, environ).release()


def test_one_that_runs_refuses_another_of_its_name(environ):
    with claim("demo", 8000, environ):
        whole(environ, supervisor=identify(os.getpid()))
        settled = settle("demo", environ)
        assert (settled.running, settled.deployment.state) == (True, "ready")
        with (
            pytest.raises(GemmaServeError, match="demo is already there, and is ready") as refused,
            claim("demo", 8001, environ),
        ):
            pass
    assert "`gemma-serve restart demo`" in refused.value.problems[0].hint


def failed(record, message):
    """What `record` is to become when nobody looks after it any more."""
    return replace(
        record, state="failed", guard=None, leader=None, members=(), shared_files=(),
        problem=Problem("supervisor.killed", message, "start it again: gemma-serve restart demo"),
    )  # fmt: skip


def settled_as(environ, expected):
    settled = settle("demo", environ)
    found = settled.deployment
    assert found == replace(expected, changed_at=found.changed_at)
    assert found.changed_at > expected.changed_at
    assert deployment_folder("demo", environ).load() == found
    assert not settled.running
    return settled.ended


def family_of(process, **changes):
    """The fields of a record whose engine is that one process."""
    this = replace(identify(process.pid), **changes)
    return {"guard": this, "leader": this, "members": (Member(this),)}


def test_what_a_killed_supervisor_and_guard_left_is_ended(environ, child):
    engine = child()
    temporary = make_temporary_folder()
    (temporary / "socket").write_text("")
    record = whole(environ, temporary_folder=temporary, **family_of(engine))
    pid = record.supervisor.pid
    expected = failed(record, f"its supervisor (pid {pid}) was killed while it was ready")
    assert settled_as(environ, expected) == (engine.pid,)
    assert engine.wait(60) < 0
    assert not temporary.exists()
    again = settle("demo", environ)
    assert (again.ended, again.deployment.state) == ((), "failed")


def test_a_pid_that_was_used_again_is_a_stranger_and_left_alone(environ, child):
    stranger = child()
    started = identify(stranger.pid).start_ticks
    record = whole(environ, **family_of(stranger, start_ticks=started - 100))
    pid = record.supervisor.pid
    expected = failed(record, f"its supervisor (pid {pid}) was killed while it was ready")
    assert settled_as(environ, expected) == ()
    assert stranger.poll() is None


def test_after_a_reboot_nobody_is_who_was_written_down(environ, child):
    stranger = child()
    record = whole(environ, state="starting", boot_id="another", **family_of(stranger))
    expected = failed(record, "the machine was restarted while it was starting")
    assert settled_as(environ, expected) == ()
    assert stranger.poll() is None


def test_a_supervisor_whose_pid_was_used_again_does_not_look_after_it(environ, child):
    stranger = child()
    started = identify(stranger.pid).start_ticks
    record = whole(environ, supervisor=ProcessId(stranger.pid, started - 100))
    said = f"its supervisor (pid {stranger.pid}) was killed while it was ready"
    assert settled_as(environ, failed(record, said)) == ()
    assert stranger.poll() is None


def test_a_guard_whose_supervisor_is_gone_is_waited_for(environ, child):
    record = whole(environ)
    lock = claim_name("demo", environ)
    guard = child(pass_fds=(lock.fd,))
    lock.release()
    # What the guard does when it has ended its engine.
    ends = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill {guard.pid}"])
    pid = record.supervisor.pid
    expected = failed(record, f"its supervisor (pid {pid}) was killed while it was ready")
    assert settled_as(environ, expected) == ()
    assert guard.wait(60) < 0
    assert ends.wait(60) == 0


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_one_that_has_ended_stays_as_it_is(environ, state):
    record = whole(environ, state=state)
    settled = settle("demo", environ)
    assert (settled.deployment, settled.running, settled.ended) == (record, False, ())


def test_which_deployment_is_meant(environ):
    with pytest.raises(GemmaServeError, match="no deployment is known on this machine") as none:
        find_deployment(None, environ)
    assert none.value.exit_code == 1
    one = whole(environ, "one", state="stopped")
    assert find_deployment(None, environ).deployment == one
    two = whole(environ, "two", state="stopped")
    assert find_deployment("two", environ).deployment == two
    with pytest.raises(UsageError, match="there are 2 deployments: one, two") as several:
        find_deployment(None, environ)
    assert several.value.problems[0].code == "deployment.several"
    with pytest.raises(GemmaServeError, match="there is no deployment three") as unknown:
        find_deployment("three", environ)
    assert unknown.value.problems[0].hint == "there is one, two"
    whole(environ, "one", supervisor=identify(os.getpid()))
    with claim_name("one", environ):
        # The only one that runs.
        assert find_deployment(None, environ).deployment.name == "one"


@pytest.mark.parametrize(
    ("served", "name"),
    [("google/gemma-7b-it", "gemma-7b-it"), ("My Gemma!", "my-gemma"), ("../..", "model"),
     ("google/gemma-3.1_x/", "gemma-3.1_x")],
)  # fmt: skip
def test_names_of_deployments(served, name):
    assert deployment_name(served) == name


def test_a_taken_port_names_its_holder_and_a_way_out():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        problem = host.port_problem("127.0.0.1", port)
    assert problem is not None
    assert (problem.code, problem.blocking) == ("port-in-use", True)
    assert f"port {port} on 127.0.0.1 is taken" in problem.message
    assert f"(pid {os.getpid()})" in problem.message
    assert f"--port {port + 1}" in problem.hint


def test_a_free_port_is_free_and_an_address_of_others_is_told():
    assert host.port_problem("127.0.0.1", host.free_port("127.0.0.1")) is None
    problem = host.port_problem("192.0.2.1", 8000)
    assert problem is not None
    assert problem.code == "port.not_here"


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
