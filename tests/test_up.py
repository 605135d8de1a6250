"""`up` from its first line to its last, with an engine that misbehaves when told to."""

import json
import os
import re
import signal
import socket
from pathlib import Path

import junitparser
import psutil
import pytest

from fake_engine import serving
from gemma_serve.adapters.host import free_port
from gemma_serve.adapters.package_data import load_failures
from gemma_serve.adapters.state import all_deployments, deployment_folder
from gemma_serve.cli import main
from gemma_serve.engine.processes import lives
from running import Program, end_deployments, eventually, fake_python

PHASES = ["config", "engine", "weights", "kv cache", "server"]


@pytest.fixture
def environ(tmp_path):
    return {"GEMMA_SERVE_STATE_DIR": str(tmp_path / "state")}


@pytest.fixture
def up(tmp_path, environ):
    """Start `up` with a fake engine that has the given faults; all ends with the test."""
    programs = []
    python = fake_python(tmp_path)

    def start(*args, port=None, env=None, **faults):
        port = free_port("127.0.0.1") if port is None else port
        program = Program(
            "up", "--model", "demo", "--engine-python", str(python), "--port", str(port), *args,
            environ={**environ, "FAKE_ENGINE": json.dumps(faults), **(env or {})},
        )  # fmt: skip
        programs.append(program)
        return program

    yield start
    end_deployments(environ)
    for program in programs:
        program.__exit__()


def text(lines):
    return "".join(lines)


def how(environ, name="demo"):
    """The state of a deployment, and the code of the cause."""
    record = deployment_folder(name, environ).load()
    assert record is not None
    return record.state, record.problem and record.problem.code


@pytest.fixture
def ask(environ, monkeypatch, capsys):
    """Ask about deployments: the exit code, and the last line as JSON."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    def run(*args):
        code = main([*args, "--json"])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_once_with_the_smoke_test_serves_tests_and_leaves_nothing(up, environ, tmp_path):
    junit, page = tmp_path / "out.xml", tmp_path / "out.html"
    junit.write_text("of an earlier run")
    reports = ("--junit", str(junit), "--html", str(page))
    program = up("--smoke-test", "--once", "--max-num-seqs", "4", *reports)
    assert program.exit_code() == 0
    out, err = text(program.out), text(program.err)
    assert "ready after" in out
    assert "curl http://127.0.0.1:" in out
    assert "The capital of France is Paris." in out
    assert "the endpoint keeps its promises: 22 passed, 5 skipped" in out
    assert "together           4 of 4 at once" in out  # as many as the engine takes
    assert junitparser.JUnitXml.fromfile(str(junit)).tests == 27
    assert "The endpoint keeps its promises" in page.read_text()
    assert "nothing of the engine is left" in err
    assert how(environ) == ("stopped", None)


def test_json_lines_tell_what_happens_and_end_with_the_envelope(up):
    program = up("--smoke-test", "--once", "--json", "--concurrency", "2")
    assert program.exit_code() == 0
    assert program.err == []
    *events, last = program.json_lines
    names = [event["event"] for event in events]
    assert names[:2] == ["engine_started", "phase_began"]
    assert names[-3:] == ["smoke_test", "stopping", "engine_stopped"]
    assert set(events[-1]) == {
        "event", "time", "duration_s", "killed", "left", "steps", "port_is_free", "gpu_bytes_held",
    }  # fmt: skip
    assert (events[-1]["left"], events[-1]["port_is_free"]) == ([], True)
    assert [step["step"] for step in events[-1]["steps"]] == ["terminate", "clean"]
    phases = [event["phase"] for event in events if event["event"] == "phase_began"]
    assert phases == [
        "imports", "configuration", "engine core", "weights", "KV cache", "API server",
        "first token",
    ]  # fmt: skip
    assert names.count("ready") == 1
    assert names.count("smoke_check") == 27
    assert {key: last[key] for key in ("schema", "command", "ok", "problems")} == {
        "schema": 1,
        "command": "up",
        "ok": True,
        "problems": [],
    }
    assert set(last["data"]) == {
        "name", "url", "served_model_name", "ready_s", "phases", "log", "smoke_test",
    }  # fmt: skip
    assert last["data"]["name"] == "demo"
    assert [phase["phase"] for phase in last["data"]["phases"]] == phases
    checks = {check["id"]: check for check in last["data"]["smoke_test"]["checks"]}
    assert {check["status"] for check in checks.values()} == {"passed", "skipped"}
    assert checks["together"]["figures"]["concurrency"] == 2


def test_a_failed_smoke_test_is_exit_1(up):
    program = up("--smoke-test", "--once", answer="<pad>")
    assert program.exit_code() == 1
    assert "the endpoint breaks its promises" in text(program.out)


def test_a_start_that_fails_is_in_the_junit_report_too(up, tmp_path):
    junit = tmp_path / "out.xml"
    program = up("--smoke-test", "--once", "--junit", str(junit), die_in_phase="weights")
    assert program.exit_code() == 3
    (suite,) = junitparser.JUnitXml.fromfile(str(junit))
    ((error,),) = (case.result for case in suite)
    assert (suite.errors, error.type) == (1, "engine.died")
    assert f"error: {error.message}" in text(program.err)


def test_reports_are_of_the_smoke_test(up, tmp_path):
    program = up("--once", "--junit", str(tmp_path / "out.xml"))
    assert program.exit_code() == 2
    assert "hint: add --smoke-test" in text(program.err)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_after_ready_stops_everything(up, environ, signum, code):
    program = up(grandchild="same-session")
    program.wait_for("ready after", "out")
    eventually(lambda: len(program.engine_processes()) == 3, "a guard, a leader and its child")
    assert how(environ) == ("ready", None)
    program.send(signum)
    assert program.exit_code() == code
    assert how(environ) == ("stopped", None)


@pytest.mark.parametrize("phase", ["imports", "configuration", "weights", "API server"])
def test_a_signal_in_any_phase_stops_everything(up, environ, phase):
    program = up(start_delay_s=3, grandchild="same-session")
    program.wait_for(f" s  {phase}")
    program.send(signal.SIGINT)
    assert program.exit_code() == 130
    assert how(environ) == ("stopped", None)


def test_a_second_signal_does_not_wait_for_an_engine_that_ignores_the_first(up):
    program = up("--drain-timeout", "300", ignore_sigterm=True)
    program.wait_for("ready after", "out")
    program.send(signal.SIGINT)
    program.wait_for("stopping the engine")
    program.send(signal.SIGINT)
    assert program.exit_code() == 130
    assert "SIGKILL for what did not go by itself" in text(program.err)


def test_a_grandchild_in_a_session_of_its_own_ends_too(up):
    program = up(grandchild="new-session")
    program.wait_for("ready after", "out")
    leader = psutil.Process(program.engine_pid)
    eventually(lambda: leader.children(recursive=True), "the grandchild")
    (grandchild,) = leader.children(recursive=True)
    assert os.getsid(grandchild.pid) != os.getsid(program.engine_pid)
    program.send(signal.SIGTERM)
    assert program.exit_code() == 143
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("phase", PHASES)
def test_an_engine_that_dies_while_starting_is_exit_3_and_says_when(up, environ, phase):
    program = up(die_in_phase=phase, exit_code=1)
    assert program.exit_code() == 3
    assert how(environ) == ("failed", "engine.died")
    err = text(program.err)
    assert "error: the engine died during" in err
    assert ": the engine ended with exit code 1, and no error is in its log\n" in err
    assert "hint: its whole log: " in err
    assert "Traceback" not in err


NO_ROOM = "ValueError: No available memory for the cache blocks."
WRAPPER = "RuntimeError: Engine core initialization failed. See root cause above."
NO_ROOM_SAID = load_failures()["kv-none"].explain({}).cause


def test_the_cause_is_the_diagnosis_and_not_the_wrapper(up, environ):
    program = up(die_in_phase="server", exit_code=1, log_file_lines=[NO_ROOM, WRAPPER])
    assert program.exit_code() == 3
    assert how(environ) == ("failed", "kv-none")
    err = text(program.err)
    assert f"error: the engine died during API server: {NO_ROOM_SAID}\n" in err
    assert re.search(rf"the engine's log, line \d+: {re.escape(NO_ROOM)}\n", err)
    assert WRAPPER not in err


@pytest.mark.parametrize("when", ["start", "ready"])
def test_a_killed_engine_is_exit_3_and_says_by_what(up, environ, when):
    program = up(start_delay_s=4 if when == "start" else 0)
    if when == "start":
        program.wait_for(" s  weights")
    else:
        program.wait_for("ready after", "out")
    os.kill(program.engine_pid, signal.SIGKILL)
    assert program.exit_code() == 3
    assert "a process of the engine was ended by SIGKILL" in text(program.err)
    assert how(environ) == ("failed", "engine-killed")


def test_an_engine_that_is_healthy_but_generates_nothing_is_not_ready(up):
    program = up(health_only=True)
    assert program.exit_code() == 3
    assert "the engine started but generates nothing" in text(program.err)
    assert "ready after" not in text(program.out)


def test_a_taken_port_is_exit_1_and_starts_nothing(up, environ):
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = up(port=server.getsockname()[1])
        assert program.exit_code() == 1
    assert "is taken by" in text(program.err)
    assert program.engine_pid is None
    assert not Path(environ["GEMMA_SERVE_STATE_DIR"]).exists()


def test_a_missing_engine_and_a_missing_model_are_told_together(environ, tmp_path):
    with Program(
        "up", "--model", str(tmp_path / "none"), "--engine-python", "/none", "--port", "0",
        environ=environ,
    ) as program:  # fmt: skip
        assert program.exit_code() == 1
        err = text(program.err)
    assert err.count("error: ") == 2
    assert "cannot run /none as the engine's Python" in err
    assert "none does not exist" in err


def test_open_to_others_wants_a_key_or_a_word(up):
    program = up("--host", "0.0.0.0")
    assert program.exit_code() == 2
    assert "lets other machines in, and no API key is set" in text(program.err)
    assert program.engine_pid is None
    program = up("--host", "0.0.0.0", "--allow-unauthenticated", "--once")
    assert program.exit_code() == 0


def test_the_key_goes_to_the_engine_by_environment_and_nowhere_else(up, environ, ask):
    key = "s3cret-key-of-this-test"
    program = up(env={"GEMMA_SERVE_API_KEY": key})
    program.wait_for("ready after", "out")
    leader = psutil.Process(program.engine_pid)
    assert leader.environ()["VLLM_API_KEY"] == key
    assert "GEMMA_SERVE_API_KEY" not in leader.environ()
    assert not any(key in part for part in leader.cmdline())
    command = ("smoke-test", "--only", "authenticated,chat")
    with Program(*command, environ={**environ, "GEMMA_SERVE_API_KEY": key}) as smoke:
        assert smoke.exit_code() == 0
        assert key not in text(smoke.out + smoke.err)
    code, answer = ask("smoke-test")
    assert (code, "401" in json.dumps(answer)) == (1, True)
    program.send(signal.SIGTERM)
    assert program.exit_code() == 143
    assert key not in text(program.out + program.err)
    assert '"Authorization: Bearer $GEMMA_SERVE_API_KEY"' in text(program.out)
    state = Path(environ["GEMMA_SERVE_STATE_DIR"])
    assert not any(key in f.read_text() for f in state.rglob("*") if f.is_file())


def test_a_signal_under_json_still_ends_with_the_envelope(up):
    program = up("--json")
    program.wait_for('"event": "ready"', "out")
    program.send(signal.SIGTERM)
    assert program.exit_code() == 143
    assert program.json_lines[-1] == {
        "schema": 1,
        "command": "up",
        "ok": False,
        "data": {},
        "problems": [{"code": "stopped", "message": "stopped by SIGTERM", "hint": ""}],
    }


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_an_engine_is_stopped_though_nobody_reads_any_more(up, environ, form):
    program = up(*form, grandchild="same-session")
    program.wait_for("ready", "out")
    program.close_streams()
    program.send(signal.SIGINT)
    assert program.popen.wait(60) in (1, 130)
    assert program.engine_processes() == []
    assert how(environ) == ("stopped", None)


def test_two_on_one_port_the_second_is_refused_and_the_first_is_left_alone(up, environ, tmp_path):
    port = free_port("127.0.0.1")
    held = tmp_path / "held"
    held.touch()
    first = up(port=port, hold_in_phase="imports", hold_file=str(held))
    first.wait_for("engine's pid")
    second = up("--name", "other", port=port)
    assert second.exit_code() == 1
    assert f"another `gemma-serve up` is using port {port}" in text(second.err)
    held.unlink()
    first.wait_for("ready after", "out")
    assert [(d.name, d.url) for d in all_deployments(environ)] == [
        ("demo", f"http://127.0.0.1:{port}")
    ]
    first.send(signal.SIGTERM)
    assert first.exit_code() == 143


def test_somebody_elses_answer_on_the_port_is_not_ours(up):
    port = free_port("127.0.0.1")
    program = up(port=port, start_delay_s=4)
    program.wait_for(" s  imports")
    with serving(None, "--port", str(port), "--served-model-name", "demo"):
        assert program.exit_code() == 3
    assert "ready after" not in text(program.out)


def test_smoke_test_while_it_starts_says_so(up, ask):
    program = up(start_delay_s=20)
    program.wait_for("engine's pid")
    code, answer = ask("smoke-test")
    assert code == 1
    assert "is still starting" in answer["problems"][0]["message"]
    program.send(signal.SIGINT)
    assert program.exit_code() == 130


def test_what_nohup_lets_us_ignore_is_ignored(up, environ):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        program = up()
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    program.wait_for("ready after", "out")
    program.send(signal.SIGHUP)
    program.send(signal.SIGTERM)
    assert program.exit_code() == 143


def test_smoke_test_finds_what_up_started(up, ask):
    program = up("--served-model-name", "demo")
    program.wait_for("ready after", "out")
    code, answer = ask("smoke-test", "--only", "models")
    assert code == 0
    assert answer["data"]["model"] == "demo"


def test_port_0_takes_a_free_one(up):
    program = up("--once", port=0)
    assert program.exit_code() == 0
    assert "http://127.0.0.1:0" not in text(program.out)


def test_a_second_of_the_name_is_pointed_to_restart(up, environ):
    first = up()
    first.wait_for("ready after", "out")
    second = up(port=0)
    assert second.exit_code() == 1
    assert "error: demo is already there, and is ready" in text(second.err)
    assert "`gemma-serve restart demo`" in text(second.err)
    beside = up("beside", "--once", port=0)
    assert beside.exit_code() == 0
    assert {d.name: d.state for d in all_deployments(environ)} == {
        "beside": "stopped", "demo": "ready",
    }  # fmt: skip
    first.send(signal.SIGTERM)
    assert first.exit_code() == 143


def test_a_detached_one_runs_on_and_is_asked_restarted_and_stopped(up, environ, ask, capsys):
    program = up("--detach", "--smoke-test", "--concurrency", "1")
    assert program.exit_code(detached=True) == 0
    assert "ready after" in text(program.out)
    assert "the endpoint keeps its promises: 20 passed, 7 skipped" in text(program.out)
    assert "demo runs in the background" in text(program.err)
    record = deployment_folder("demo", environ).load()
    assert (record.state, record.detached, record.restart) == ("ready", True, "on-failure")
    code, answer = ask("status")
    status = answer["data"]
    assert (code, status["name"], status["state"], status["running"]) == (0, "demo", "ready", True)
    assert (status["pid"], status["supervisor_pid"]) == (
        record.leader.pid, record.supervisor.pid,
    )  # fmt: skip
    code, answer = ask("list")
    assert [(d["name"], d["state"]) for d in answer["data"]["deployments"]] == [("demo", "ready")]
    capsys.readouterr()
    assert main(["logs", "-n", "1000"]) == 0
    assert "[fake] ready" in capsys.readouterr().out

    with Program("restart", environ={**environ, "FAKE_ENGINE": "{}"}) as restart:
        assert restart.exit_code(detached=True) == 0
    again = deployment_folder("demo", environ).load()
    assert (again.state, again.url) == ("ready", record.url)
    assert not lives(record.supervisor)
    assert not lives(record.leader)

    code, answer = ask("stop", "demo")
    done = answer["data"]
    assert (code, answer["problems"]) == (0, [])
    assert (done["forced"], done["ended_pids"], done["left_pids"]) == (False, [], [])
    assert (done["port_is_free"], [s["step"] for s in done["steps"]]) == (
        True,
        ["terminate", "clean"],
    )
    assert not any(map(lives, (again.supervisor, again.guard, again.leader)))
    assert how(environ) == ("stopped", None)
    code, answer = ask("status")
    assert (code, answer["data"]["state"], answer["data"]["running"]) == (1, "stopped", False)
    code, answer = ask("stop")
    assert (code, [p["code"] for p in answer["problems"]]) == (1, ["deployment.not_running"])


def test_a_detached_one_that_dies_while_starting_is_exit_3_and_status_says_why(up, ask):
    program = up("--detach", die_in_phase="server", exit_code=1, log_file_lines=[NO_ROOM])
    assert program.exit_code() == 3
    said = f"the engine died during API server: {NO_ROOM_SAID}"
    assert f"error: {said}\n" in text(program.err)
    code, answer = ask("status")
    assert (code, answer["data"]["state"], answer["data"]["running"]) == (1, "failed", False)
    assert (answer["data"]["cause"]["code"], answer["data"]["cause"]["message"]) == (
        "kv-none", said,
    )  # fmt: skip
    found = answer["data"]["diagnosis"]
    assert (found["verdict"], found["id"]) == ("known", "kv-none")
    assert [place["text"] for place in found["evidence"]] == [NO_ROOM]
    code, told = ask("diagnose", "--name", "demo")
    assert (code, told["data"]) == (1, found)


def test_a_signal_while_a_detached_one_starts_stops_it(up, environ):
    program = up("--detach", start_delay_s=20)
    program.wait_for("engine's pid")
    program.send(signal.SIGINT)
    assert program.exit_code() == 130
    assert how(environ) == ("stopped", None)


def test_detached_and_once_contradict_each_other(ask):
    code, answer = ask("up", "--detach", "--once")
    said = "--once stops when it is ready, and --detach lets it run on"
    assert (code, [problem["message"] for problem in answer["problems"]]) == (2, [said])


def test_a_key_reaches_a_detached_engine_and_no_file(up, environ, ask):
    key = "s3cret-key-of-this-test"
    program = up("--detach", env={"GEMMA_SERVE_API_KEY": key})
    assert program.exit_code(detached=True) == 0
    record = deployment_folder("demo", environ).load()
    leader = psutil.Process(record.leader.pid)
    assert leader.environ()["VLLM_API_KEY"] == key
    argv = [*leader.cmdline(), *psutil.Process(record.supervisor.pid).cmdline()]
    assert not any(key in part for part in argv)
    code, answer = ask("restart")
    assert (code, [problem["code"] for problem in answer["problems"]]) == (1, ["config.no_key"])
    assert how(environ) == ("ready", None)
    assert ask("stop")[0] == 0
    assert key not in text(program.out + program.err)
    state = Path(environ["GEMMA_SERVE_STATE_DIR"])
    files = [path for path in state.rglob("*") if path.is_file()]
    assert files
    assert not any(key in path.read_text() for path in files)


def test_a_cache_that_a_start_died_over_is_set_aside_by_the_next(up, environ, tmp_path):
    caches = tmp_path / "caches"
    flags = ("--cache-dir", str(caches), "--once")
    dies = up(*flags, compile=True, die_in_phase="compile", exit_code=1)
    assert dies.exit_code() == 3
    assert "the engine died during compilation" in text(dies.err)
    (kept,) = [caches / key / "vllm" / "torch_compile_cache" for key in cache_keys(environ)]
    kept.mkdir(parents=True)
    (kept / "half-written").write_text("")
    again = up(*flags, compile=True)
    assert again.exit_code() == 0
    assert "its cache was set aside" in text(again.err)
    assert not kept.exists()
    assert (kept.with_name("torch_compile_cache.set-aside") / "half-written").exists()
    # That one came through its compilation, so the next start trusts what there is.
    kept.mkdir()
    third = up(*flags, compile=True)
    assert third.exit_code() == 0
    assert "set aside" not in text(third.err)
    assert kept.exists()


def cache_keys(environ):
    """The names of the cache folders of the engine that was run last."""
    run = json.loads(deployment_folder("demo", environ).run.read_text())
    return {Path(run["environment"]["VLLM_CACHE_ROOT"]).parent.name}
