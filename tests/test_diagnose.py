"""`gemma-serve diagnose`: a file, a stream or a deployment in, a verdict and an exit code out."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma_serve.adapters.state import Deployment, DeploymentFolder, deployment_folder
from gemma_serve.cli import main
from gemma_serve.engine.diagnosis.diagnosis import Also, Diagnosis, Ending
from gemma_serve.engine.diagnosis.text import Place
from gemma_serve.engine.processes import boot_id
from gemma_serve.planning.failures import Change
from gemma_serve.usecases.diagnose import (
    diagnose_deployment,
    diagnose_file,
    keep_diagnosis,
    kept_diagnosis,
)

LOGS = Path(__file__).parent / "data" / "logs"
FAILING = LOGS / "failures" / "kv-too-small.text.vllm-0.4.2.log"
HEALTHY = LOGS / "cpu-vllm0.32-default.log"
FIX = (
    "serve at most 3664 tokens: `--max-model-len 3664`; for more, raise `--gpu-memory-utilization`"
    " if the memory is free, or use more GPUs"
)
CAUSE = "one request may have 8192 tokens, and the KV cache holds 3664"
COMMAND = "gemma-serve up --model google/gemma-7b-it --max-model-len 3664"
TITLE = "the KV cache is too small for one request of this length"
LINE = FAILING.read_text().split("\n")[21]


@pytest.fixture(autouse=True)
def environ(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("GEMMA_SERVE_STATE_DIR", str(tmp_path / "state"))
    return {"GEMMA_SERVE_STATE_DIR": str(tmp_path / "state")}


def deployment(environ, state="failed", *, started_at=1764000000.0, log=FAILING):
    folder = deployment_folder("demo", environ)
    folder.begin()
    record = Deployment(
        name="demo",
        folder=folder.path,
        state=state,
        changed_at=started_at,
        url="http://127.0.0.1:8000",
        served_model_name="demo",
        model="google/gemma-7b-it",
        boot_id=boot_id(),
        started_at=started_at,
    )
    folder.save(record)
    folder.log.write_bytes(log.read_bytes())
    return folder


def test_a_failure_in_a_file_is_said_with_its_fix_and_its_line(capsys):
    assert main(["diagnose", str(FAILING)]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == (
        f"kv-too-small: {TITLE}\n"
        f"  cause    {CAUSE}\n"
        f"  fix      {FIX}\n"
        f"  command  {COMMAND}\n"
        f"  line 22: {LINE}\n",
        "",
    )


def test_json_has_these_keys_and_no_others(capsys):
    assert main(["diagnose", str(FAILING), "--json"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == {
        "schema": 1,
        "command": "diagnose",
        "ok": False,
        "data": {
            "verdict": "known",
            "id": "kv-too-small",
            "title": TITLE,
            "cause": CAUSE,
            "fix": FIX,
            "command": COMMAND,
            "evidence": [{"line": 22, "text": LINE}],
            "also": [],
        },
        "problems": [{"code": "kv-too-small", "message": f"{TITLE}: {CAUSE}", "hint": FIX}],
    }


def test_a_healthy_log_is_exit_0(capsys):
    assert main(["diagnose", str(HEALTHY)]) == 0
    assert capsys.readouterr().out == "healthy: no failure: it was ready\n"
    assert main(["diagnose", str(HEALTHY), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "schema": 1,
        "command": "diagnose",
        "ok": True,
        "data": {
            "verdict": "healthy",
            "id": None,
            "title": "no failure: it was ready",
            "cause": "",
            "fix": "",
            "command": "",
            "evidence": [],
            "also": [],
        },
        "problems": [],
    }


def test_a_failure_that_nobody_knows_is_a_problem_all_the_same(tmp_path, capsys):
    log = tmp_path / "engine.log"
    log.write_text("Traceback (most recent call last):\nLookupError: the gears\n")
    assert main(["diagnose", str(log), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["data"]["verdict"], answer["data"]["id"]) == ("unknown", None)
    assert answer["problems"] == [
        {
            "code": "unknown",
            "message": "a failure that gemma-serve does not know: LookupError: the gears",
            "hint": "line 2 of the log and those above it say more",
        }
    ]


def test_a_dash_is_standard_input():
    command = [sys.executable, "-m", "gemma_serve", "diagnose", "-", "--json"]
    with FAILING.open("rb") as log:
        done = subprocess.run(command, stdin=log, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout)["data"]["id"] == "kv-too-small"


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"", "the log is empty"), (b"\xff\xfe\0\x89PNG\n" * 1000, "no vLLM wrote this log")],
)
def test_what_is_no_log_is_said_without_a_traceback(data, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(["diagnose", "-"]) == 1
    assert capsys.readouterr() == (
        f"unknown: {said}\n"
        "  fix      give the engine's whole log, with both of its streams: `2>&1`\n",
        "",
    )


def test_a_standard_input_that_is_closed_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["diagnose", "-"]) == 2
    assert capsys.readouterr().err.startswith("error: standard input is closed\nhint: pipe a log ")


@pytest.mark.parametrize("kind", ["missing", "folder", "unreadable"])
def test_a_log_that_cannot_be_read_is_one_sentence_and_exit_2(kind, tmp_path, monkeypatch, capsys):
    path = tmp_path / "engine.log"
    said = "No such file or directory"
    if kind == "folder":
        path.mkdir()
        said = "Is a directory"
    elif kind == "unreadable":
        # As any user but root finds it.
        path.touch()
        said = "Permission denied"
        error = PermissionError(13, said, str(path))
        monkeypatch.setattr(Path, "open", lambda *_args, **_kwargs: (_ for _ in ()).throw(error))
    assert main(["diagnose", str(path)]) == 2
    assert capsys.readouterr() == (
        "",
        f"error: cannot read the log {path}: {said}\n"
        "hint: name a file, `-` for standard input, or a deployment with `--name`\n",
    )


def test_a_log_and_a_deployment_at_once_are_wrong_usage(capsys):
    assert main(["diagnose", str(FAILING), "--name", "demo"]) == 2
    out, err = capsys.readouterr()
    assert (out, "were both named" in err, "leave one of the two out" in err) == ("", True, True)


@pytest.mark.parametrize(
    ("argv", "said"),
    [([], "no deployment is known"), (["--name", "other"], "other")],
)
def test_without_a_deployment_there_is_nothing_to_diagnose(argv, said, capsys):
    assert main(["diagnose", *argv]) == 1
    out, err = capsys.readouterr()
    assert (out, said in err, "hint: " in err) == ("", True, True)


def test_the_last_deployments_log_is_the_default(environ, capsys):
    deployment(environ)
    assert main(["diagnose"]) == 1
    assert capsys.readouterr().out.startswith(f"kv-too-small: {TITLE}\n")
    assert main(["diagnose", "--name", "demo"]) == 1


def test_a_deployment_without_a_log_says_so(environ, capsys):
    folder = deployment(environ)
    folder.log.unlink()
    assert main(["diagnose", "--name", "demo"]) == 1
    assert f"demo has no log at {folder.log}" in capsys.readouterr().err


def test_how_a_deployment_ended_is_known_from_its_last_start(environ):
    folder = deployment(environ, log=HEALTHY)
    assert diagnose_deployment("demo", environ).diagnosis.verdict == "healthy"
    keep_diagnosis(folder, Diagnosis("healthy", None, "x"), Ending(signum=9))
    report = diagnose_deployment("demo", environ)
    assert (report.source, report.diagnosis.id) == (str(folder.log), "engine-killed")


def test_what_was_rotated_away_since_the_start_belongs_to_the_log(environ):
    folder = deployment(environ, started_at=time.time() - 60)
    lines = FAILING.read_text().splitlines(keepends=True)
    older = folder.log.with_name(folder.log.name + ".1")
    older.write_text("".join(lines[:22]))
    folder.log.write_text("".join(lines[22:]))
    assert diagnose_deployment("demo", environ).diagnosis.id == "kv-too-small"
    # What is older than this start is another's.
    os.utime(older, (1.0, 1.0))
    assert diagnose_deployment("demo", environ).diagnosis.id is None


def test_a_log_that_grows_is_read_to_where_it_ended(tmp_path, monkeypatch):
    """As fast as it is read, it is written: reading to its end would never end."""
    log = tmp_path / "engine.log"
    log.write_bytes(FAILING.read_bytes() + b"\n")
    size, more, real = log.stat().st_size, HEALTHY.read_bytes(), Path.open

    class Growing(io.FileIO):
        def read(self, wanted=-1):
            with real(log, "ab") as writer:
                writer.write(more)
            return super().read(wanted)

    monkeypatch.setattr(
        Path,
        "open",
        lambda path, *how, **more: Growing(path) if path == log else real(path, *how, **more),
    )
    assert diagnose_file(log).diagnosis.id == "kv-too-small"
    assert log.stat().st_size > size


def test_a_diagnosis_is_kept_whole(tmp_path):
    folder = DeploymentFolder(tmp_path)
    assert kept_diagnosis(folder) is None
    found = Diagnosis(
        "known",
        "kv-too-small",
        TITLE,
        CAUSE,
        FIX,
        COMMAND,
        Change({"max_model_len": "3664"}, {"A": "1"}),
        "shorten-context",
        (Place(22, LINE),),
        (Also("kv-none", "no memory", 3),),
    )
    keep_diagnosis(folder, found, Ending(code=1))
    assert kept_diagnosis(folder) == found
    folder.diagnosis.write_text('{"diagnosis": {"verdict": "known"}}')
    assert kept_diagnosis(folder) is None
