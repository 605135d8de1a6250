"""The program's front door: exit codes, the JSON envelope, what `--help` costs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_serve.cli import main
from gemma_serve.cli.app import app
from gemma_serve.errors import GemmaServeError, Problem, Stopped
from gemma_serve.view.output import envelope

SRC = Path(__file__).parent.parent / "src"


@pytest.fixture(autouse=True)
def plain(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("GEMMA_SERVE_STATE_DIR", str(tmp_path))


def test_the_envelope_has_these_keys_and_no_others():
    problem = Problem("a.b", "is wrong", "mend it", blocking=False)
    assert envelope("plan", ok=False, data={"x": 1}, problems=[problem]) == {
        "schema": 1,
        "command": "plan",
        "ok": False,
        "data": {"x": 1},
        "problems": [{"code": "a.b", "message": "is wrong", "hint": "mend it"}],
    }


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (["plan", "--port", "abc"], "`port` is 'abc' (flag --port)", "--port PORT"),
        (["plan", "--prot", "1"], "No such option: --prot", "see `gemma-serve plan --help`"),
        (["plam"], "No such command 'plam'", "see `gemma-serve --help`"),
        (["plan", "--config", "none.yaml"], "cannot read the configuration file", "--config"),
        (["smoke-test", "--url", "ftp://x"], "ftp://x", "http"),
    ],
)
def test_wrong_usage_is_a_sentence_and_a_hint_on_stderr_with_exit_2(argv, message, hint, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert "hint: " in err
    assert hint in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "argv",
    [["plan", "--port", "abc"], ["plan", "--prot", "1"], ["up", "--port", "-1"],
     ["check-gpu", "--tensor-parallel-size", "x"], ["smoke-test", "--url", "ftp://x"]],
)  # fmt: skip
def test_with_json_a_failure_is_the_envelope_too(argv, capsys):
    assert main([*argv, "--json"]) == 2
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert err == ""
    assert (answer["schema"], answer["command"], answer["ok"]) == (1, argv[0], False)
    assert all(set(problem) == {"code", "message", "hint"} for problem in answer["problems"])
    assert answer["problems"]


def test_smoke_test_with_nothing_running_says_so(capsys):
    assert main(["smoke-test"]) == 1
    assert "gemma-serve up" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], [], ["up", "-h"], ["--version"]])
def test_help_and_version_are_no_errors(argv, capsys):
    assert main(argv) == 0
    assert capsys.readouterr().out


def test_help_names_every_command(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("up", "plan", "check-gpu", "smoke-test", "--version"))


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from gemma_serve.cli import main; main(['--help']);"
        "heavy = {'torch', 'vllm', 'huggingface_hub', 'httpx', 'pydantic', 'yaml', 'pynvml'};"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_shells_see_which_signal_stopped_us():
    assert [Stopped(number).shell_code for number in (2, 15, 1)] == [130, 143, 129]


def test_an_error_can_carry_several_problems():
    problems = (Problem("a", "one"), Problem("b", "two"))
    assert GemmaServeError.of(problems).problems == problems


@pytest.mark.parametrize("argv", [["--help"], ["plan", "--json"], ["plan"]])
def test_a_reader_that_has_left_is_no_error_worth_a_word(argv):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "gemma_serve", *argv]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("form", [["--json"], ["--format", "json"], ["-f", "json"]])
def test_every_way_to_ask_for_json_gets_it_for_a_failure(form, capsys):
    assert main(["plan", "--port", "abc", *form]) == 2
    out, err = capsys.readouterr()
    assert (json.loads(out)["ok"], err) == (False, "")


def test_hints_name_commands_that_exist():
    commands = {command.name for command in app.registered_commands}
    for path in SRC.rglob("*.py"):
        named = set(re.findall(r"`gemma-serve ([a-z][a-z-]*)", path.read_text()))
        assert named <= commands, path
