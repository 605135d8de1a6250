"""`gemma-serve check-gpu` on machines that a stand-in for NVML describes.

Run as a program where the whole way counts, and in this process, which is quicker, where only
the answer does.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest

from gemma_serve.adapters import gpu as gpu_adapter
from machines import (
    GIB,
    H200,
    LOST,
    MIB,
    MISMATCH,
    NO_LIBRARY,
    NO_PERMISSION,
    NO_SUCH_FUNCTION,
    NOBODY,
    NOT_LOADED,
    NOT_SUPPORTED,
    T4,
    TESTS,
    UNKNOWN_ERROR,
    Check,
    run_program,
    runner,
)


@pytest.fixture
def check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Check:
    return runner(monkeypatch, capsys, tmp_path)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NO_LIBRARY, "no-gpu-visible"),
        (NOT_LOADED, "no-gpu-visible"),
        (MISMATCH, "gpu.driver_mismatch"),
        (NO_PERMISSION, "gpu.no_permission"),
        (UNKNOWN_ERROR, "gpu.nvml"),
    ],
)
def test_without_a_working_driver(check: Check, error: int, code: str) -> None:
    run = check("--json", errors={"nvmlInit": error})
    assert (run.code, run.codes) == (1, [code])
    assert run.data == {
        "device": "cuda",
        "driver_version": None,
        "cuda_version": None,
        "engine_version": None,
        "gpus": [],
        "fit": None,
        "facts_source": None,
        "model": None,
        "plan": None,
        "alternatives": [],
    }


def test_no_driver_for_people() -> None:
    run = run_program(errors={"nvmlInit": NO_LIBRARY})
    assert run.code == 1
    assert run.out == "No GPU.\n"
    assert run.err == (
        "error: no GPU is visible: no NVIDIA driver is found (libnvidia-ml.so.1 is missing); vLLM "
        "wants one on a GPU\n"
        "hint: install the driver, or start the container with `--gpus all` and NVIDIA's "
        "container toolkit; without a GPU, plan for the CPU with `--device cpu`, or try "
        "`gemma-serve up --model demo`\n"
    )


def test_a_driver_without_a_gpu(check: Check) -> None:
    assert check("--json", gpus=[]).codes == ["no-gpu-visible"]


def test_a_lost_card_does_not_hide_the_others(check: Check) -> None:
    run = check(
        "--json", gpus=[H200, {**T4, "bus": "00000000:01:00.0"}, T4],
        errors={"nvmlDeviceGetHandleByIndex:0": LOST},
    )  # fmt: skip
    assert run.code == 0
    assert run.codes == ["gpu.lost", "bf16-unsupported"]
    assert [gpu["index"] for gpu in run.answer["data"]["gpus"]] == [1, 2]
    alone = check("--json", gpus=[H200], errors={"nvmlDeviceGetUUID:0": UNKNOWN_ERROR})
    assert (alone.code, alone.codes) == (1, ["gpu.broken"])


def test_cards_are_numbered_by_bus_whatever_nvml_says(check: Check) -> None:
    run = check("--json", gpus=[T4, H200])
    assert [gpu["name"] for gpu in run.answer["data"]["gpus"]] == ["NVIDIA H200", "Tesla T4"]
    assert [gpu["index"] for gpu in run.answer["data"]["gpus"]] == [0, 1]


def test_what_a_card_cannot_tell_is_left_out(check: Check) -> None:
    older = check(
        "--json", gpus=[H200], cuda=12080,
        errors={"nvmlDeviceGetMemoryInfo_v2": NO_SUCH_FUNCTION,
                "nvmlDeviceGetComputeRunningProcesses": NO_PERMISSION,
                "nvmlDeviceGetMigMode": NOT_SUPPORTED,
                "nvmlSystemGetDriverVersion": NOT_SUPPORTED},
    )  # fmt: skip
    assert older.code == 0
    [gpu] = older.answer["data"]["gpus"]
    assert (gpu["total_bytes"], gpu["used_bytes"]) == (143_771 * MIB, 616 * MIB)
    assert older.answer["data"]["driver_version"] is None
    assert older.codes == ["driver-too-old"]


def test_a_card_that_shares_main_memory(check: Check) -> None:
    run = check("--json", gpus=[H200], errors={"nvmlDeviceGetMemoryInfo": NOT_SUPPORTED})
    [gpu] = run.answer["data"]["gpus"]
    assert gpu["total_bytes"] == gpu["used_bytes"] + gpu["free_bytes"] > 0


@pytest.fixture
def orphan_engine(tmp_path: Path) -> Iterator[int]:
    """The number of a real process that is called like vLLM's engine and has lost its parent."""
    engine = (
        "import os, pathlib, sys, time; pathlib.Path('/proc/self/comm').write_text('VLLM::Engine')"
        f"; pathlib.Path({str(tmp_path / 'up')!r}).write_text(''); time.sleep(60)"
    )
    server = (
        "import pathlib, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {engine!r}],"
        " stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        f"while not pathlib.Path({str(tmp_path / 'up')!r}).exists(): time.sleep(0.01)\n"
        "print(child.pid)"
    )
    done = subprocess.run(
        [sys.executable, "-c", server],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        start_new_session=True,
    )
    pid = int(done.stdout)
    yield pid
    os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/comm").exists(), reason="needs Linux's /proc")
def test_a_card_held_by_an_engine_that_outlived_its_server(
    check: Check, orphan_engine: int
) -> None:
    busy = {**H200, "used": 126 * GIB, "compute": [[orphan_engine, 125 * GIB]]}
    run = run_program("--json", gpus=[busy])
    assert run.code == 1
    [problem] = run.answer["problems"]
    assert problem["code"] == "gpu-busy"
    assert f"VLLM::Engine (pid {orphan_engine}, 125.00 GiB)" in problem["message"]
    assert f"kill -9 {orphan_engine}" in problem["hint"]
    assert "--gpu-memory-utilization 0.09" in problem["hint"]
    beside = check("--json", "--gpu-memory-utilization", "0.09", gpus=[busy])
    assert (beside.code, beside.codes) == (0, [])


def test_holders_that_a_container_cannot_see(check: Check) -> None:
    gpu = {**H200, "used": 100 * GIB, "compute": [[NOBODY, 10 * GIB], [NOBODY - 1, None]]}
    run = check("--json", gpus=[gpu])
    assert run.answer["data"]["gpus"][0]["processes"] == [
        {"pid": NOBODY - 1, "name": "unknown", "used_bytes": None},
        {"pid": NOBODY, "name": "unknown", "used_bytes": 10 * GIB},
    ]
    [silent] = check("--json", gpus=[{**H200, "used": 100 * GIB}]).answer["problems"]
    assert "processes that can't be seen from here (100.00 GiB)" in silent["message"]
    assert "outside this container" in silent["hint"]


def test_mig_is_refused_and_another_card_is_taken(check: Check) -> None:
    sliced = {**H200, "mig": 1}
    run = check("--json", gpus=[sliced])
    assert (run.code, run.codes) == (1, ["gpu.mig"])
    both = check("--json", gpus=[sliced, {**H200, "uuid": "GPU-2", "bus": "00000000:86:00.0"}])
    assert (both.code, both.codes) == (0, [])
    assert [gpu["chosen"] for gpu in both.answer["data"]["gpus"]] == [False, True]


@pytest.mark.parametrize(
    ("value", "visible", "code", "codes"),
    [
        ("1", [False, True], 0, ["bf16-unsupported"]),
        ("GPU-1111", [True, False], 0, []),
        ("0,5", [True, False], 0, ["gpu.visible_unknown"]),
        ("", [False, False], 1, ["no-gpu-visible"]),
        ("MIG-GPU-1111/1/0", [False, False], 1, ["visible-devices"]),
    ],
)
def test_cards_that_cuda_will_see(
    check: Check, value: str, visible: list[bool], code: int, codes: list[str]
) -> None:
    run = check("--json", environ={"CUDA_VISIBLE_DEVICES": value}, gpus=[H200, T4])
    assert [gpu["visible"] for gpu in run.answer["data"]["gpus"]] == visible
    assert (run.code, run.codes) == (code, codes)


def test_a_wish_that_cannot_be_met_is_wrong_usage(check: Check) -> None:
    run = run_program("--gpus", "1", environ={"CUDA_VISIBLE_DEVICES": "0"}, gpus=[H200, T4])
    assert (run.code, run.out) == (2, "")
    assert "--gpus names `1`, but the GPUs to choose from are 0 (NVIDIA H200)" in run.err
    two = check("--json", "--gpus", "0,1", "--tensor-parallel-size", "1", gpus=[H200, T4])
    assert (two.code, two.codes) == (2, ["gpu.count"])
    same = check("--json", "--gpus", "0,0", gpus=[H200, T4])
    assert (same.code, same.codes) == (2, ["gpu.named_twice"])
    met = check("--json", "--tensor-parallel-size=2", "--gpus=1,0", gpus=[H200, T4])
    assert (met.code, met.codes) == (0, ["gpu.mixed", "bf16-unsupported"])


def test_too_few_of_a_kind(check: Check) -> None:
    run = check("--json", "--tensor-parallel-size", "2", gpus=[H200, T4])
    assert (run.code, run.codes) == (1, ["tp-too-big"])


def test_settings_come_from_the_environment_too(check: Check) -> None:
    run = check("--json", environ={"GEMMA_SERVE_GPUS": "1"}, gpus=[H200, T4])
    assert [gpu["chosen"] for gpu in run.answer["data"]["gpus"]] == [False, True]


def test_the_stand_in_has_nothing_that_the_real_library_lacks() -> None:
    """Guards the adapter's spelling: the real library needs a driver to be run, not to be read."""
    source = Path(str(gpu_adapter.__file__)).read_text(encoding="utf-8")
    names = set(re.findall(r"pynvml\.(\w+)", source))
    assert len(names) > 15
    assert [name for name in names if not hasattr(pynvml, name)] == []
    fake = (TESTS / "fake_nvml" / "pynvml.py").read_text(encoding="utf-8")
    constants = re.findall(r"^(\w+) = (\d\w*)$", fake, re.MULTILINE)
    assert len(constants) > 10
    assert {name: int(value, 0) for name, value in constants} == {
        name: getattr(pynvml, name) for name, _ in constants
    }
