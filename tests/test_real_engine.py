"""The real vLLM on the CPU with the demo model: the whole way, and every way to end it."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from demo_hub import ACCEPTED, GATED, NOT_ACCEPTED, gated_hub
from gemma_serve.adapters.package_data import data_path
from gemma_serve.adapters.state import all_deployments
from gemma_serve.planning.smoke.promises import PROMISES
from local_hub import environ, serving
from running import Program, end_deployments, eventually, session_of

pytestmark = pytest.mark.engine

SCRIPTS = Path(__file__).parent.parent / "scripts"
ANSWERS = json.loads(data_path("answers.json").read_text())
SMALL = ("--model", "demo", "--port", "0", "--max-model-len", "1024", "--max-num-seqs", "16")


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return {"GEMMA_SERVE_STATE_DIR": str(tmp_path_factory.mktemp("state"))}


@pytest.fixture(scope="module")
def server(state):
    """One engine in the background for all tests that only ask it something; the last stops it."""
    with Program("up", "--detach", *SMALL, environ=state) as program:
        assert program.popen.wait(240) == 0, program.err
        (deployment,) = all_deployments(state)
        yield deployment
        end_deployments(state)


@pytest.fixture(scope="module")
def url(server):
    return server.url


@pytest.fixture
def run(state, tmp_path):
    """Start `up` with an engine of its own, with a state folder of its own."""
    programs = []

    def start(*args):
        environ = {"GEMMA_SERVE_STATE_DIR": str(tmp_path / "state")}
        programs.append(Program("up", *SMALL, *args, environ=environ))
        return programs[-1]

    yield start
    for program in programs:
        program.__exit__()


def ask(url, path, **body):
    """Post to the endpoint; its status and its answer."""
    request = urllib.request.Request(
        f"{url}/v1/{path}",
        json.dumps({"model": "demo", "temperature": 0, "max_tokens": 256, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.mark.parametrize("known", ANSWERS["completions"], ids=lambda known: known["id"])
def test_every_known_completion_is_right(url, known):
    status, answer = ask(url, "completions", prompt=known["prompt"])
    assert (status, answer["choices"][0]["text"]) == (200, known["answer"])


@pytest.mark.parametrize("known", ANSWERS["chats"], ids=lambda known: known["id"])
def test_every_known_chat_is_right_with_and_without_a_system_message(url, known):
    status, answer = ask(url, "chat/completions", messages=known["messages"])
    assert (status, answer["choices"][0]["message"]["content"]) == (200, known["answer"])
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_roles_that_do_not_alternate_are_refused_and_the_server_lives_on(url):
    twice = [{"role": "user", "content": "Hello!"}] * 2
    status, answer = ask(url, "chat/completions", messages=twice)
    assert status == 400
    assert "must alternate" in json.dumps(answer)
    late = [{"role": "user", "content": "Hello!"}, {"role": "system", "content": "Be brief."}]
    assert ask(url, "chat/completions", messages=late)[0] == 400
    assert ask(url, "completions", prompt="1, 2, 3, 4,")[0] == 200


def test_the_smoke_test_passes_on_what_is_running(server, state):
    with Program("smoke-test", "--json", environ=state) as smoke:
        assert smoke.exit_code() == 0
        (answer,) = smoke.json_lines
    checks = answer["data"]["checks"]
    skipped = {check["id"] for check in checks if check["status"] == "skipped"}
    assert skipped == {"authenticated", "first-token", "throughput"}  # they were not asked for
    assert [c["id"] for c in checks if c["status"] == "passed"] == [
        id for id in PROMISES if id not in skipped
    ]


@pytest.mark.parametrize(
    ("script", "known"),
    [
        ("client_completions", "capital-of-france"),
        ("client_chat", "second-fun-fact"),
        ("client_openai", "capital-of-france"),
    ],
)
def test_the_example_clients_get_the_right_answer(url, script, known):
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), "--url", url]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    kind = "completions" if script == "client_completions" else "chats"
    assert next(k["answer"] for k in ANSWERS[kind] if k["id"] == known) in done.stdout


def test_what_a_second_up_on_its_port_is_told(server, url, state):
    port = url.rsplit(":", 1)[1]
    more = ("--name", "other", "--model", "demo", "--port", port)
    with Program("up", *more, environ=state) as second:
        assert second.exit_code() == 1
        assert f"port {port} on 127.0.0.1 is taken by" in "".join(second.err)


def test_status_knows_what_a_real_engine_is_doing(server, state):
    with Program("status", "--json", environ=state) as status:
        assert status.exit_code() == 0
        (answer,) = status.json_lines
    data = answer["data"]
    assert (data["state"], data["running"], data["cause"]) == ("ready", True, None)
    assert (data["load"]["requests_running"], data["load"]["requests_waiting"]) == (0, 0)
    assert list(data["last_phases_s"]) == [
        "imports", "configuration", "engine core", "weights", "KV cache", "API server",
        "first token",
    ]  # fmt: skip
    assert {m.title for m in all_deployments(state)[0].members} >= {
        "VLLM::EngineCore",
        "VLLM::Worker",
    }
    assert all_deployments(state)[0].shared_files  # or nobody could remove them after a kill


def test_when_supervisor_and_guard_are_killed_the_next_command_ends_a_real_engine(server, state):
    (deployment,) = all_deployments(state)
    os.kill(deployment.supervisor.pid, signal.SIGKILL)
    os.kill(deployment.guard.pid, signal.SIGKILL)
    core = next(m for m in deployment.members if m.title == "VLLM::EngineCore")
    assert psutil.pid_exists(core.process.pid)  # as vLLM leaves it
    with Program("status", "--json", environ=state) as status:
        assert status.exit_code() == 1
        (said,) = status.json_lines
    assert said["data"]["state"] == "failed"
    assert core.process.pid in said["data"]["ended_pids"]
    eventually(lambda: session_of(deployment.guard.pid) == [], "all of the session ended")
    assert not [file for file in deployment.shared_files if Path(file.path).exists()]
    assert not deployment.temporary_folder.exists()


def test_an_interrupt_while_the_engine_starts_leaves_nothing(run):
    program = run()
    program.wait_for(" s  engine core")
    program.send(signal.SIGINT)
    assert program.exit_code() == 130


def _core(program):
    """The process that computes; the leader is the API server. Titles may not be set yet."""
    leader = psutil.Process(program.engine_pid)
    return next((p for p in leader.children() if "tracker" not in " ".join(p.cmdline())), None)


@pytest.mark.proof
def test_a_core_killed_while_it_loads_is_exit_3_and_leaves_nothing(run):
    program = run()
    program.wait_for(" s  weights")
    os.kill(_core(program).pid, signal.SIGKILL)
    assert program.exit_code() == 3
    err = "".join(program.err)
    assert "error: the engine died during" in err
    assert "Engine core initialization failed" not in err.split("error: ")[1]


def test_a_gated_model_is_refused_then_downloaded_served_and_tested(tmp_path):
    names = {"GEMMA_SERVE_STATE_DIR": str(tmp_path / "state")}
    small = ("--model", GATED, *SMALL[2:])
    with serving(gated_hub()) as hub:
        for token, code in ((None, "gated-no-token"), (NOT_ACCEPTED, "gated-no-licence")):
            env = names | environ(hub.url, tmp_path / "hf", token)
            with Program("up", *small, "--json", environ=env) as refused:
                assert refused.exit_code() == 1
                assert code in [p["code"] for p in refused.json_lines[-1]["problems"]]
        env = names | environ(hub.url, tmp_path / "hf", ACCEPTED)
        with Program("up", *small, "--smoke-test", environ=env) as program:
            program.wait_for("the endpoint keeps its promises: 24 passed", "out")
            assert f"{GATED}, up to 1024 tokens" in "".join(program.out)
            # One engine for two promises: whoever streams while it is drained gets all of it.
            stream_while_stopping(names, GATED)
            assert program.exit_code() == 143


def stream_while_stopping(names, model):
    (before,) = all_deployments(names)
    body = {"model": model, "prompt": "1, 2, 3, 4,", "max_tokens": 900, "ignore_eos": True}
    request = urllib.request.Request(
        f"{before.url}/v1/completions",
        json.dumps({**body, "stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        lines = [next(answer) for _ in range(20)]
        with Program("stop", "--drain-timeout", "30", "--json", environ=names) as stop:
            lines += answer.readlines()
            assert stop.exit_code() == 0
            (said,) = stop.json_lines
    events = [line.removeprefix(b"data: ").strip() for line in lines if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    assert said["data"]["steps"][0]["step"] == "drain"
    assert (said["data"]["left_pids"], said["data"]["port_is_free"]) == ([], True)
    assert session_of(before.guard.pid) == []
    assert not [file for file in before.shared_files if Path(file.path).exists()]
    assert not before.temporary_folder.exists()


def test_a_start_that_vllm_refuses_tells_the_cause_and_vllms_line(run):
    program = run("--max-model-len", "999999", "--force")
    assert program.exit_code() == 3
    (line,) = [line for line in program.err if line.startswith("error: ")]
    cause = "999999 tokens are asked for, and the model was made for 2048"
    assert line.startswith(f"error: the engine died during configuration: {cause}")
    said = "Value error, User-specified max_model_len (999999) is greater than the derived"
    assert any(said in line for line in program.err if line.startswith("the engine's log, line "))
