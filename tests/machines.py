"""Machines for `check-gpu`, described for the stand-in for NVML, and ways to run it there."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from huggingface_hub import constants

import gemma_serve
from gemma_serve.cli import main

TESTS = Path(__file__).parent
SRC = Path(gemma_serve.__file__).parents[1]
GIB = 2**30
MIB = 2**20
NOBODY = 999_999_999  # no process has this number

NO_LIBRARY, NOT_LOADED, MISMATCH, NO_PERMISSION, LOST = 12, 9, 18, 4, 15
NOT_SUPPORTED, NO_SUCH_FUNCTION, UNKNOWN_ERROR = 3, 13, 999

H200 = {
    "uuid": "GPU-11111111-2222-3333-4444-555555555555",
    "bus": "00000000:3B:00.0",
    "name": "NVIDIA H200",
    "total": 143_771 * MIB,
    "reserved": 616 * MIB,
    "used": 0,
    "cc": [9, 0],
    "mig": 0,
    "compute": [],
    "graphics": [],
}
T4 = {
    **H200,
    "uuid": "GPU-77777777-8888-9999-aaaa-bbbbbbbbbbbb",
    "bus": "00000000:5E:00.0",
    "name": "Tesla T4",
    "total": 15_360 * MIB,
    "reserved": 443 * MIB,
    "cc": [7, 5],
    "mig": None,
}
L4 = {
    **H200,
    "uuid": "GPU-44444444-0000-1111-2222-333333333333",
    "bus": "00000000:00:03.0",
    "name": "NVIDIA L4",
    "total": 23_034 * MIB,
    "reserved": 479 * MIB,
    "cc": [8, 9],
    "mig": None,
}


def several(gpu: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """So many GPUs of one kind."""
    return [
        {**gpu, "uuid": f"{gpu['uuid'][:-2]}{index:02}", "bus": f"00000000:{index:02X}:00.0"}
        for index in range(count)
    ]


def engine_python(folder: Path, *, version: str = "0.32.0", distribution: str = "vllm") -> Path:
    """An interpreter that says which vLLM it has, and can do nothing else."""
    script = folder / "engine-python"
    script.write_text(f"#!/bin/sh\necho '{json.dumps([distribution, version])}'\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


@dataclass(frozen=True)
class Run:
    """What one run of the program gave."""

    code: int
    out: str
    err: str

    @property
    def answer(self) -> dict[str, Any]:
        """The JSON object; `--json` leaves nothing on standard error."""
        assert self.err == ""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    @property
    def data(self) -> dict[str, Any]:
        data = self.answer["data"]
        assert isinstance(data, dict)
        return data

    @property
    def codes(self) -> list[str]:
        return [problem["code"] for problem in self.answer["problems"]]


def run_program(*argv: str, environ: dict[str, str] | None = None, **machine: Any) -> Run:
    """Run `check-gpu` on `machine`, described as tests/fake_nvml/pynvml.py takes it."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-m", "gemma_serve", "check-gpu", *argv],
        env={
            **kept,
            "PYTHONPATH": os.pathsep.join([str(TESTS / "fake_nvml"), str(SRC)]),
            "FAKE_NVML": json.dumps(machine),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(TESTS / "no-such-folder"),
            "NO_COLOR": "1",
            **(environ or {}),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    return Run(done.returncode, done.stdout, done.stderr)


Check = Callable[..., Run]


def runner(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> Check:
    """As `run_program`, in this process, with vLLM 0.32.0 for GPUs as the engine."""
    engine = {"GEMMA_SERVE_ENGINE_PYTHON": str(engine_python(folder))}

    def run(
        *argv: str,
        command: str = "check-gpu",
        environ: dict[str, str] | None = None,
        **machine: Any,
    ) -> Run:
        with monkeypatch.context() as patch:
            for name in [*os.environ]:
                if name.startswith(("GEMMA_SERVE_", "VLLM_")) or name == "CUDA_VISIBLE_DEVICES":
                    patch.delenv(name)
            variables = {**engine, **(environ or {}), "FAKE_NVML": json.dumps(machine)}
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            patch.setattr(constants, "HF_HUB_CACHE", str(folder))
            patch.setitem(sys.modules, "pynvml", load_stand_in())
            code = main([command, *argv])
        return Run(code, *capsys.readouterr())

    return run


def load_stand_in() -> ModuleType:
    """The stand-in for NVML, fresh, since it reads its machine when it is imported."""
    spec = importlib.util.spec_from_file_location("pynvml", TESTS / "fake_nvml" / "pynvml.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
