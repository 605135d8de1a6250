"""Engines that nobody looks after: named by whoever looks, and ended only if they are ours."""

import os
import signal
import subprocess
import sys

import pytest

from gemma_serve.cli import main
from running import Program, fake_python

# A process that is called like vLLM's engine, whose server ends at once and leaves it.
ENGINE = """
import os, pathlib, signal, time
pathlib.Path("/proc/self/comm").write_text("VLLM::Engine")
print(os.getpid(), flush=True)
time.sleep(60)
"""
SERVER = f"""
import subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", {ENGINE!r}], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
)
print(int(child.stdout.readline()), flush=True)
"""


@pytest.fixture
def orphan():
    """The pid of somebody else's orphan."""
    command = [sys.executable, "-c", SERVER]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=30, start_new_session=True
    )
    pid = int(done.stdout)
    yield pid
    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def environ(tmp_path, monkeypatch):
    state = str(tmp_path / "state")
    monkeypatch.setenv("GEMMA_SERVE_STATE_DIR", state)
    return {"GEMMA_SERVE_STATE_DIR": state}


def test_an_orphan_of_others_is_named_with_what_it_holds_and_left_alone(orphan, environ, capsys):
    assert main(["stop", "--orphans"]) == 0
    said = capsys.readouterr()
    assert "no orphan of ours was found" in said.out
    assert f"VLLM::Engine (pid {orphan}) of " in said.err
    assert "of main memory" in said.err
    os.kill(orphan, 0)  # it lives


def test_up_and_status_name_it_too(orphan, environ, tmp_path, capsys):
    flags = ("--model", "demo", "--engine-python", str(fake_python(tmp_path)), "--port", "0")
    with Program("up", *flags, "--once", environ=environ) as up:
        assert up.exit_code() == 0
        assert f"(pid {orphan})" in "".join(up.err)
    assert main(["status"]) == 1
    assert f"(pid {orphan})" in capsys.readouterr().err
