"""`gemma-serve check-gpu` on machines that a stand-in for NVML describes.

Run as a program where the whole way counts, and in this process, which is quicker, where only
the answer does.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest
from huggingface_hub import constants

from gemma_serve.adapters import gpu as gpu_adapter
from gemma_serve.cli import main
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
    Run,
    load_stand_in,
    run_program,
)

Check = Callable[..., Run]


@pytest.fixture
def check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Check:
    """As `run_program`, in this process."""

    def run(*argv: str, environ: dict[str, str] | None = None, **machine: Any) -> Run:
        with monkeypatch.context() as patch:
            for name in [*os.environ]:
                if name.startswith("GEMMA_SERVE_") or name == "CUDA_VISIBLE_DEVICES":
                    patch.delenv(name)
            for name, value in {**(environ or {}), "FAKE_NVML": json.dumps(machine)}.items():
                patch.setenv(name, value)
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
            patch.setitem(sys.modules, "pynvml", load_stand_in())
            code = main(["check-gpu", *argv])
        return Run(code, *capsys.readouterr())

    return run


def test_an_idle_card_in_full() -> None:
    run = run_program("--json", "--model", "google/gemma-7b-it", gpus=[H200])
    total = 143_155 * MIB
    assert run.code == 0
    assert run.answer == {
        "schema": 1,
        "command": "check-gpu",
        "ok": True,
        "data": {
            "driver_version": "580.95.05",
            "cuda_version": "13.0",
            "gpus": [
                {
                    "index": 0,
                    "uuid": "GPU-11111111-2222-3333-4444-555555555555",
                    "pci_bus_id": "00000000:3B:00.0",
                    "name": "NVIDIA H200",
                    "compute_capability": "9.0",
                    "supports_bf16": True,
                    "mig_enabled": False,
                    "total_bytes": total,
                    "used_bytes": 0,
                    "free_bytes": total,
                    "visible": True,
                    "chosen": True,
                    "processes": [],
                }
            ],
            "model": {
                "id": "google/gemma-7b-it",
                "weights_bytes": 17_075_361_792,
                "source": "catalogue",
                "fits": True,
            },
        },
        "problems": [
            {
                "code": "hub.offline",
                "message": "HF_HUB_OFFLINE is set, so the Hub was not asked for the size of the "
                "model",
                "hint": "unset HF_HUB_OFFLINE, or give the model's folder with `--model DIR`",
            }
        ],
    }


def test_for_people() -> None:
    holder = [os.getpid(), 2 * GIB]
    first = {**H200, "used": 2 * GIB, "graphics": [holder]}
    run = run_program("-m", "google/gemma-2-2b-it", gpus=[first, T4])
    assert run.code == 0
    lines = [" ".join(line.split()) for line in run.out.splitlines()]
    assert "0 NVIDIA H200 139.80 GiB 2.00 GiB 137.80 GiB 9.0 yes chosen" in "\n".join(lines)
    assert "1 Tesla T4 14.57 GiB 0.00 GiB 14.57 GiB 7.5 no visible -" in lines
    assert f"(pid {os.getpid()}) 2.00 GiB" in run.out
    assert lines[-4:] == [
        "Driver 580.95.05, which runs CUDA up to 13.0.",
        "Chosen: GPU 0 has the most free memory: 137.8 of 139.8 GiB.",
        "The weights of google/gemma-2-2b-it take 4.87 GiB (by gemma-serve's own catalogue).",
        "vLLM may use 125.82 GiB of GPU 0: they fit and leave 120.95 GiB for all else.",
    ]
    assert run.err.startswith("warning: HF_HUB_OFFLINE is set")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NO_LIBRARY, "gpu.no_driver"),
        (NOT_LOADED, "gpu.driver_not_loaded"),
        (MISMATCH, "gpu.driver_mismatch"),
        (NO_PERMISSION, "gpu.no_permission"),
        (UNKNOWN_ERROR, "gpu.nvml"),
    ],
)
def test_without_a_working_driver(check: Check, error: int, code: str) -> None:
    run = check("--json", errors={"nvmlInit": error})
    assert (run.code, run.codes) == (1, [code])
    assert run.answer["data"] == {
        "driver_version": None,
        "cuda_version": None,
        "gpus": [],
        "model": None,
    }


def test_no_driver_for_people() -> None:
    run = run_program(errors={"nvmlInit": NO_LIBRARY})
    assert run.code == 1
    assert run.out == "No GPU.\n"
    assert run.err == (
        "error: no NVIDIA driver is found (libnvidia-ml.so.1 is missing); vLLM wants one on a "
        "GPU\n"
        "hint: install the driver, or start the container with `--gpus all` and NVIDIA's "
        "container toolkit; without a GPU, try `gemma-serve up --model demo` on the CPU\n"
    )


def test_a_driver_without_a_gpu(check: Check) -> None:
    assert check("--json", gpus=[]).codes == ["gpu.none"]


def test_a_lost_card_does_not_hide_the_others(check: Check) -> None:
    run = check(
        "--json", gpus=[H200, {**T4, "bus": "00000000:01:00.0"}, T4],
        errors={"nvmlDeviceGetHandleByIndex:0": LOST},
    )  # fmt: skip
    assert run.code == 0
    assert run.codes == ["gpu.lost", "gpu.no_bf16"]
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
    assert older.codes == ["gpu.driver_old"]


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
    assert problem["code"] == "gpu.busy"
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


def test_an_old_card_wants_twice_the_memory_for_gemma_3(check: Check) -> None:
    run = check("--json", "-m", "google/gemma-3-4b-it", gpus=[T4])
    assert run.code == 1
    assert run.codes == ["gpu.too_small", "gpu.no_bf16", "hub.offline"]
    assert run.answer["data"]["model"]["weights_bytes"] == 2 * 8_600_158_944
    assert run.answer["data"]["model"]["fits"] is False
    small = check("--json", "-m", "google/gemma-3-1b-it", "--dtype", "float32", gpus=[T4])
    assert (small.code, small.codes) == (0, ["hub.offline"])


@pytest.mark.parametrize(
    ("value", "visible", "code", "codes"),
    [
        ("1", [False, True], 0, ["gpu.no_bf16"]),
        ("GPU-1111", [True, False], 0, []),
        ("0,5", [True, False], 0, ["gpu.visible_unknown"]),
        ("", [False, False], 1, ["gpu.hidden"]),
        ("MIG-GPU-1111/1/0", [False, False], 1, ["gpu.visible_mig"]),
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
    two = check("--json", "--gpus", "0,1", gpus=[H200, T4])
    assert (two.code, two.codes) == (2, ["gpu.count"])
    met = check("--json", "--tensor-parallel-size=2", "--gpus=1,0", gpus=[H200, T4])
    assert (met.code, met.codes) == (0, ["gpu.mixed", "gpu.no_bf16"])


def test_too_few_of_a_kind(check: Check) -> None:
    run = check("--json", "--tensor-parallel-size", "2", gpus=[H200, T4])
    assert (run.code, run.codes) == (1, ["gpu.too_few"])


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
