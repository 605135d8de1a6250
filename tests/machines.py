"""Machines for `check-gpu`, described for the stand-in for NVML, and ways to run it there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import gemma_serve

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


def load_stand_in() -> ModuleType:
    """The stand-in for NVML, fresh, since it reads its machine when it is imported."""
    spec = importlib.util.spec_from_file_location("pynvml", TESTS / "fake_nvml" / "pynvml.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
