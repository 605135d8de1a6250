"""On a GPU machine: make vLLM fail in the ways that people report, and keep what it printed.

    python scripts/gpu/provoke_failures.py --out FOLDER [--lanes cpu,gpu,shared] [--cases NAME,NAME]
    python scripts/gpu/provoke_failures.py --list
    python scripts/gpu/provoke_failures.py --keep FOLDER/raw.tar.gz --into tests/data/logs/failures

Needs vLLM and torch importable and no weights: every model is a Gemma's config.json, a small
tokenizer and `--load-format dummy`. FOLDER/raw.tar.gz holds one log for each case,
FOLDER/cases.json how each ended. The `gpu` lane runs one engine at a time, the `cpu` and `shared`
lanes several; `shared` starts when `gpu` is done. `gpu-pair` and `pair` are the same for a machine
with two cards, and are run only when they are named. Some cases need root: they hide a file in a
mount namespace or limit memory in a cgroup.
`--keep` writes the logs with neutral paths. `--small` rehearses it without a GPU.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tarfile
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from measure_memory import MODELS, nvidia_smi, small

ROOT = Path("/tmp/provoked")
GIB = 1 << 30
UUID = "11111111-2222-3333-4444-555555555555"
NO_COMPILER = "compiler gcc cc clang g++ c++ clang++"
READY = r"Application startup complete"
LOADING = r"Loading model from scratch|Starting to load model"
LOADED = r"Model loading took"
Lane = Literal["cpu", "gpu", "shared", "pair", "gpu-pair"]
ALONE = ("gpu", "gpu-pair")
CGROUP = Path("/sys/fs/cgroup")

# --- The cases -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One start: `name` is ID.VARIANT, `steps` what happens when the log says what."""

    name: str
    lane: Lane
    model: str = "gemma-3-270m"
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    # Pairs of a pattern of the log and an action; each is taken once, in this order.
    steps: tuple[tuple[str, str], ...] = ()
    hide: tuple[str, ...] = ()
    # How much of the GPU another process holds at the start, as a share.
    held: float = 0.0
    # What the engine may take, in GiB, turned into a share of the card's memory.
    take_gib: float = 0.0
    seconds: float = 100.0
    linger: float = 0.0
    after: str = ""
    fresh: bool = True
    cpu_rehearsal: bool = False


EAGER = ("--enforce-eager",)
FIXED = (*EAGER, "--kv-cache-memory-bytes", "1G")
WIDE = (*EAGER, "--kv-cache-memory-bytes", "4G")
TWO = ("--tensor-parallel-size", "2")
NARROW = ("--max-num-batched-tokens", "2048", "--max-num-seqs", "64")
SHORT = ("--max-model-len", "8192")


def _gpu(name: str, **more: Any) -> Case:
    """A case that needs the card for itself; forked from this process, to spare the imports."""
    return Case(name, "gpu", **{"fresh": False, **more})


def _cpu(name: str, **more: Any) -> Case:
    """A case that ends before the engine takes GPU memory."""
    return Case(name, "cpu", **{"cpu_rehearsal": True, **more})


def _shared(name: str, *, flags: tuple[str, ...] = FIXED, **more: Any) -> Case:
    """A case whose engine takes little of the card and does not look at what is free."""
    more.setdefault("take_gib", 4.0)
    return Case(name, "shared", **{"flags": flags, **more})


def _pair(name: str, **more: Any) -> Case:
    """The same with two cards."""
    flags = (*FIXED, *SHORT, *TWO)
    return Case(name, "pair", **{"flags": flags, "take_gib": 6.0, "model": "gemma-2b", **more})


def _ready(*actions: str) -> tuple[tuple[str, str], ...]:
    return tuple((READY, action) for action in actions)


CASES: tuple[Case, ...] = (
    # The card for itself.
    _gpu("gpu-busy.holder", flags=EAGER, held=0.75),
    _gpu("gpu-busy.no-memory-at-all", flags=EAGER, held=0.999),
    _gpu("kv-none.low-util", model="gemma-7b", flags=(*EAGER, "--gpu-memory-utilization", "0.1")),
    _gpu("kv-none.tight", model="gemma-7b", flags=(*EAGER, *SHORT), take_gib=16.6),
    _gpu("kv-too-small.util", model="gemma-7b", flags=(*EAGER, *SHORT, *NARROW), take_gib=18.8),
    _gpu("kv-too-small.bytes", model="gemma-7b",
         flags=(*EAGER, *SHORT, "--kv-cache-memory-bytes", "1G")),
    _gpu("kv-too-small.hybrid", model="gemma-3-1b",
         flags=(*EAGER, "--max-model-len", "131072", "--kv-cache-memory-bytes", "256M")),
    _gpu("gemma4-transformers-515.serve", model="gemma-4-E4B", flags=FIXED),
    _gpu("autofit-none.bytes", model="gemma-7b",
         flags=(*EAGER, "--max-model-len", "-1", "--kv-cache-memory-bytes", "1M")),
    _gpu("healthy.autofit", model="gemma-7b", take_gib=20,
         flags=(*EAGER, "--max-model-len", "auto", *NARROW), steps=_ready("ask", "term")),
    _gpu("weights-oom.float32", model="gemma-3-27b",
         flags=(*EAGER, *SHORT, "--dtype", "float32")),
    _gpu("weights-oom.late-grab", model="gemma-7b", flags=(*EAGER, *SHORT), take_gib=40,
         steps=((LOADING, "leave 0.2"),)),
    _gpu("weights-oom.profiling", model="gemma-7b", flags=(*EAGER, *SHORT), take_gib=40,
         steps=((LOADED, "leave 0.1"),)),
    _gpu("weights-oom.kv-cache", model="gemma-2b", flags=(*EAGER, *SHORT), take_gib=40,
         steps=((r"Available KV cache memory", "leave 4"),)),
    _gpu("weights-oom.sampler", model="gemma-2b", take_gib=40,
         flags=(*EAGER, *SHORT, "--max-num-seqs", "4096"),
         env={"VLLM_USE_V2_MODEL_RUNNER": "0"},
         steps=((r"GPU KV cache size", "leave-soon 4.5"),)),
    _gpu("healthy.util-99", model="gemma-2b",
         flags=(*EAGER, *SHORT, "--max-num-seqs", "8192", "--gpu-memory-utilization", "0.99"),
         env={"VLLM_USE_V2_MODEL_RUNNER": "0"}, steps=_ready("ask", "term")),
    _gpu("weights-oom.graphs", model="gemma-2b", flags=SHORT, take_gib=40,
         steps=((r"Capturing CUDA graphs", "leave 0"),)),
    _gpu("profile-race.loading", model="gemma-2b", flags=(*EAGER, *SHORT), held=0.6, take_gib=20,
         steps=((LOADING, "hold 0"),)),
    _gpu("profile-race.loaded", model="gemma-2b", flags=(*EAGER, *SHORT), held=0.6, take_gib=20,
         steps=((LOADED, "hold 0"),)),
    _gpu("healthy.leader-killed-ready", model="gemma-2b", flags=(*EAGER, *SHORT),
         steps=_ready("kill-leader", "processes", "second gpu-busy.orphan-of-ready")),
    _gpu("healthy.leader-killed-in-load", model="gemma-7b", flags=(*EAGER, *SHORT),
         steps=tuple((LOADED, action) for action in
                     ("kill-leader", "processes", "second gpu-busy.orphan-of-load"))),
    # No GPU memory.
    _cpu("tp-too-big.four", model="gemma-7b", flags=("--tensor-parallel-size", "4")),
    _cpu("tp-too-big.three", model="gemma-7b", flags=("--tensor-parallel-size", "3")),
    _cpu("visible-devices.mig", env={"CUDA_VISIBLE_DEVICES": f"MIG-{UUID}"}),
    _cpu("visible-devices.uuid", env={"CUDA_VISIBLE_DEVICES": f"GPU-{UUID}"}),
    _cpu("visible-devices.index", env={"CUDA_VISIBLE_DEVICES": "3"}),
    _cpu("no-gpu-visible.empty", env={"CUDA_VISIBLE_DEVICES": ""}),
    _cpu("visible-devices.minus-one", env={"CUDA_VISIBLE_DEVICES": "-1"}),
    _cpu("no-gpu-visible.no-driver", hide=("driver",)),
    _cpu("fp16-refused.gemma3", model="gemma-3-4b",
         flags=("--dtype", "half", "--language-model-only")),
    _cpu("fp16-refused.gemma3-text", flags=("--dtype", "float16")),
    _cpu("fp16-refused.gemma2", model="gemma-2-2b", flags=("--dtype", "half")),
    _cpu("len-over-derived.gemma", model="gemma-7b", flags=("--max-model-len", "32768")),
    _cpu("len-over-derived.gemma3", flags=("--max-model-len", "200000")),
    _cpu("arch-unsupported.later", model="later-architecture"),
    _cpu("arch-unsupported.not-in-transformers", model="later-architecture-known-type"),
    _cpu("transformers-too-old.gemma5", model="later-model-type"),
    _cpu("flag-unknown.removed", flags=("--disable-log-requests",)),
    _cpu("flag-unknown.misspelt", flags=("--max-model-length", "8192")),
    _cpu("flag-unknown.value", flags=("--dtype", "bf16")),
    _cpu("unknown.quantization-mismatch", model="gemma-7b-fp8", flags=("--quantization", "awq")),
    _cpu("repo-not-found.folder", model="missing-folder"),
    # Side by side.
    _shared("healthy.visible-by-uuid", env={"CUDA_VISIBLE_DEVICES": "{uuid}"},
            steps=_ready("ask", "term")),
    _shared("unknown.no-image-processor", model="gemma-3-4b"),
    _shared("port-in-use.before-load", steps=(("", "bind"),), cpu_rehearsal=True),
    _shared("healthy.term", steps=_ready("ask", "term"), cpu_rehearsal=True),
    _shared("healthy.int", steps=_ready("ask", "int"), cpu_rehearsal=True),
    _shared("healthy.compiled", flags=("--kv-cache-memory-bytes", "1G"), seconds=150,
            env={"VLLM_CACHE_ROOT": f"{ROOT}/cache-aot"}, steps=_ready("ask", "term")),
    _shared("healthy.compiled-no-aot", flags=("--kv-cache-memory-bytes", "1G"), seconds=150,
            env={"VLLM_CACHE_ROOT": f"{ROOT}/cache-jit", "VLLM_USE_AOT_COMPILE": "0",
                 "VLLM_USE_STANDALONE_COMPILE": "0"},
            steps=_ready("ask", "term")),
    _shared("healthy.stopped-in-load", model="gemma-2b", flags=WIDE, steps=((LOADED, "term"),)),
    _shared("healthy.interrupted-in-load", model="gemma-2b", flags=WIDE,
            steps=((LOADED, "int"),)),
    _shared("healthy.stopped-at-the-start", cpu_rehearsal=True,
            steps=((r"non-default args", "int"),)),
    _shared("healthy.ready-timeout-of-two-seconds", model="gemma-7b", flags=WIDE,
            env={"VLLM_ENGINE_READY_TIMEOUT_S": "2"}, steps=_ready("ask", "term")),
    _shared("ready-timeout.addresses", model="gemma-7b", flags=(*WIDE, "--api-server-count", "2"),
            env={"VLLM_ENGINE_READY_TIMEOUT_S": "2"}, steps=_ready("ask", "term")),
    _shared("ready-timeout.engine", model="gemma-7b", flags=(*WIDE, "--api-server-count", "2"),
            env={"VLLM_ENGINE_READY_TIMEOUT_S": "20"}, steps=((LOADING, "stop-engine"),)),
    _shared("engine-killed.kill-in-load", model="gemma-7b", steps=((LOADING, "kill-engine"),)),
    _shared("engine-killed.kill-ready", steps=_ready("ask", "kill-engine", "ask"), linger=3,
            cpu_rehearsal=True),
    _shared("engine-killed.kill-in-request", linger=3,
            steps=_ready("ask-long", "kill-engine", "ask")),
    _shared("engine-killed.segv-ready", steps=_ready("ask", "segv-engine", "ask"), linger=3),
    _shared("engine-killed.term-ready", steps=_ready("ask", "term-engine", "ask"), linger=3),
    # The log of a killed process does not say who killed it.
    _shared("healthy.leader-killed-by-kernel-in-start", model="gemma-2b", hide=("memory 1200M",)),
    _shared("engine-killed.by-kernel-in-load", model="gemma-2b", hide=("memory 100G",),
            steps=((LOADED, "squeeze 900M"),)),
    _shared("healthy.leader-killed-by-kernel-ready", hide=("memory 100G",), linger=3,
            steps=_ready("ask", "squeeze 900M", "ask")),
    _shared("unknown.quantization-deprecated", model="gemma-7b-fp-quant"),
    _shared("quant-capability.fp-quant", model="gemma-7b-fp-quant",
            flags=(*FIXED, "--allow-deprecated-quantization")),
    _shared("nvcc-missing.no-cuda-home", model="gemma-2b",
            env={"VLLM_USE_FLASHINFER_SAMPLER": "1", "CUDA_HOME": "/usr/local/cuda-12.8"}),
    _shared("nvcc-missing.empty-toolkit", model="gemma-2b", hide=("toolkit-files", "compiler nvcc"),
            env={"VLLM_USE_FLASHINFER_SAMPLER": "1"}, unset=("CUDA_HOME", "CUDA_PATH")),
    _shared("nvcc-missing.no-toolkit", model="gemma-2b", hide=("toolkit", "compiler nvcc"),
            env={"VLLM_USE_FLASHINFER_SAMPLER": "1"}, unset=("CUDA_HOME", "CUDA_PATH")),
    _shared("python-headers.no-compiler", model="gemma-2b", hide=(NO_COMPILER,),
            unset=("CC", "CXX")),
    _shared("python-headers.no-compiler-compiled", model="gemma-3-1b", unset=("CC", "CXX"),
            flags=("--kv-cache-memory-bytes", "1G"), hide=(NO_COMPILER,), seconds=150),
    _shared("python-headers.no-header", model="gemma-2b", hide=("headers",)),
    _shared("disk-full.compile-cache", model="gemma-3-1b", hide=("disk",), seconds=150,
            flags=("--kv-cache-memory-bytes", "1G"),
            env={"VLLM_CACHE_ROOT": f"{ROOT}/tiny-disk/vllm",
                 "TORCHINDUCTOR_CACHE_DIR": f"{ROOT}/tiny-disk/inductor"}),
    *(_shared(f"{kind}.{damage}", flags=("--kv-cache-memory-bytes", "1G"), seconds=150,
              env={"VLLM_CACHE_ROOT": f"{ROOT}/damaged-{damage}",
                   **({} if "aot" in damage else {"VLLM_USE_AOT_COMPILE": "0",
                                                  "VLLM_USE_STANDALONE_COMPILE": "0"}),
                   **({"VLLM_FORCE_AOT_LOAD": "1"} if "forced" in damage else {})},
              after="healthy.compiled" if "aot" in damage else "healthy.compiled-no-aot",
              steps=(("", f"damage {damage}"), *_ready("ask", "term")))
      for kind, damage in (
          ("compile-cache", "aot-truncated"), ("compile-cache", "aot-forced-truncated"),
          ("healthy", "aot-model-truncated"), ("compile-cache", "graphs-truncated"),
          ("compile-cache", "graphs-deleted"), ("compile-cache", "index-truncated"))),
    # Two cards.
    Case("gpu-busy.one-of-two", "gpu-pair", "gemma-2b", (*EAGER, *SHORT, *TWO), held=0.75),
    _pair("tp-heads.two", model="odd-heads"),
    _pair("healthy.two-cards", steps=_ready("ask", "term")),
    _pair("engine-killed.worker-ready", steps=_ready("ask", "kill-worker", "ask"), linger=3),
    _pair("engine-killed.engine-of-two-ready", linger=3,
          steps=_ready("ask", "kill-engine", "ask")),
    _pair("engine-killed.worker-in-load", model="gemma-7b", steps=((LOADING, "kill-worker"),)),
    _pair("nccl-hang.worker-stopped", env={"VLLM_RINGBUFFER_WARNING_INTERVAL": "10"},
          steps=(*_ready("ask", "stop-worker", "ask-long"),
                 (r"(?s)No available shared.*No available shared", "term"))),
    _pair("healthy.two-cards-small-shm", env={"NCCL_P2P_DISABLE": "1"}, hide=("shm 20m",),
          steps=_ready("ask", "term")),
)  # fmt: skip


# As of embeddinggemma-300m.
ODD_HEADS = {"hidden_size": 768, "num_attention_heads": 3, "num_key_value_heads": 1}


def configs(small_ones: bool) -> dict[str, dict[str, Any]]:
    """config.json of every model that a case names, by name; `missing-folder` has none."""
    plain = {name: {"torch_dtype": "bfloat16", **shape} for name, shape in MODELS.items()}
    if small_ones:
        longer = {"max_position_embeddings": 8192}
        plain = {
            name: small(shape) | ({} if "text_config" in shape else longer)
            for name, shape in plain.items()
        }
    seven = plain["gemma-7b"]
    tiny = plain["gemma-3-270m"]
    later = {"architectures": ["Gemma5ForCausalLM"]}
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    fp_quant = {
        "quant_method": "fp_quant",
        "hadamard_group_size": 32,
        "forward_dtype": "mxfp4",
        "forward_method": "abs_max",
        "modules_to_not_convert": ["lm_head"],
    }
    return {
        **plain,
        "odd-heads": {**tiny, **ODD_HEADS},
        "later-model-type": {**tiny, "model_type": "gemma5_text", **later},
        "later-architecture": {**tiny, **later},
        "later-architecture-known-type": {**tiny, "architectures": ["Gemma3ForObjectDetection"]},
        "gemma-7b-fp8": {**seven, "quantization_config": fp8},
        "gemma-7b-awq-plain": {**seven, "quantization_config": awq},
        "gemma-7b-fp-quant": {**seven, "quantization_config": fp_quant},
    }


def write_launcher() -> None:
    """What pip installs as `vllm`, so that messages name the program as they do elsewhere."""
    launcher = ROOT / "bin" / "vllm"
    launcher.parent.mkdir(parents=True, exist_ok=True)
    launcher.write_text(
        "import sys\nfrom vllm.entrypoints.cli.main import main\n"
        "if __name__ == '__main__':\n    sys.exit(main())\n"
    )


def write_models(small_ones: bool) -> None:
    """One folder for each model: config.json and the demo's tokenizer."""
    demo = Path(__file__).parents[2] / "src" / "gemma_serve" / "data" / "demo"
    for name, config in configs(small_ones).items():
        folder = ROOT / "models" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        for file in demo.glob("token*.json"):
            shutil.copy(file, folder)


# --- Starting and ending one ---------------------------------------------------------------------


class Holder:
    """A process that holds GPU memory, and does as it is told on its standard input."""

    PROGRAM = """
import sys, time, torch
held = []
def take(gib):
    try:
        held.append(torch.empty(int(gib * 2**30), dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError:
        return False
    return True
def leave(gib):
    for _ in range(200):
        free = torch.cuda.mem_get_info()[0] / 2**30 - gib
        if free < 0.01 or not take(free * 0.98 if free > 1 else min(free, 0.02)):
            return
torch.cuda.init(); take(0.001)
print("up", flush=True)
for line in sys.stdin:
    what, amount = line.split()
    if what == "hold":
        held.clear(); torch.cuda.empty_cache()
        float(amount) and take(float(amount))
    elif what == "leave":
        leave(float(amount))
    elif what == "leave-soon":
        start = torch.cuda.mem_get_info()[0]
        until = time.monotonic() + 5
        while time.monotonic() < until and torch.cuda.mem_get_info()[0] > start - 2**30:
            time.sleep(0.002)
        time.sleep(0.05)
        leave(float(amount))
    print("done", torch.cuda.mem_get_info()[0], flush=True)
"""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def tell(self, order: str, *, wait: bool = True) -> None:
        """Pass an order on; `leave-soon` is not waited for."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        if wait:
            self._process.stdout.readline()

    def end(self) -> None:
        """End the process; its memory is free afterwards."""
        self._process.kill()
        self._process.wait()


@dataclass
class Running:
    """A case under way."""

    case: Case
    pid: int
    port: int
    log: Path
    begun: float
    steps: list[tuple[str, str]]
    notes: list[str] = field(default_factory=list)
    # Popen objects that are forgotten are waited for by the next one, and their status is lost.
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)
    leader: subprocess.Popen[bytes] | None = None
    sockets: list[socket.socket] = field(default_factory=list)
    ended: float | None = None
    status: int | None = None

    def note(self, text: str) -> None:
        """Keep what was done, with the time since the start."""
        self.notes.append(f"{time.monotonic() - self.begun:.1f} s {text}")


def argv(case: Case, port: int) -> list[str]:
    """What follows `vllm`."""
    shown = ["serve", str(ROOT / "models" / case.model), "--load-format", "dummy"]
    shown += ["--served-model-name", "gemma", "--host", "127.0.0.1", "--port", str(port)]
    flags = list(case.flags)
    if case.take_gib and "--gpu-memory-utilization" not in flags:
        total = int(nvidia_smi("memory.total") or 81559) / 1024
        flags += ["--gpu-memory-utilization", f"{case.take_gib / total:.3f}"]
    return [*shown, *flags]


def environment(case: Case) -> dict[str, str]:
    """The case's environment: this one's, without a network and with caches of its own."""
    home = ROOT / "home" / case.name
    home.mkdir(parents=True, exist_ok=True)
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "PYTHONUNBUFFERED": "1",
        **({} if case.fresh else {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}),
    }
    if case.name.split(".")[0] in ("nvcc-missing", "python-headers", "disk-full", "compile-cache"):
        env |= {
            "FLASHINFER_WORKSPACE_BASE": str(home),
            "TRITON_CACHE_DIR": str(home / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor"),
            "VLLM_CACHE_ROOT": str(home / "vllm"),
        }
    env |= case.env
    for name, value in env.items():
        if value == "{uuid}":
            env[name] = nvidia_smi("uuid") or f"GPU-{UUID}"
    for name in case.unset:
        env.pop(name, None)
    for what in case.hide:
        if what.startswith("compiler "):
            env["PATH"] = _path_without(home / "bin", what.split()[1:], env["PATH"])
    return env


def _path_without(folder: Path, programs: Sequence[str], path: str) -> str:
    """A PATH of one folder that links to all programs but those."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    left_out = re.compile(rf"(x86_64-linux-gnu-)?({'|'.join(map(re.escape, programs))})(-[\d.]+)?")
    for place in path.split(":"):
        for program in Path(place).glob("*") if place else ():
            if not left_out.fullmatch(program.name) and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program)
    return str(folder)


def hiding(case: Case) -> str:
    """Shell commands that hide things from the case, in a mount namespace of its own."""
    empty = ROOT / "empty"
    empty.mkdir(parents=True, exist_ok=True)
    lines = []
    for what in case.hide:
        if what == "headers":
            lines.append(f"mount --bind {empty} $(readlink -f {sysconfig.get_path('include')})")
        elif what == "toolkit-files":
            lines.append(f"mount --bind {empty} $(readlink -f /usr/local/cuda)")
        elif what == "toolkit":
            lines.append(
                f"mkdir -p {ROOT}/local.all {ROOT}/local;"
                f" mount --rbind /usr/local {ROOT}/local.all;"
                f" for e in {ROOT}/local.all/*; do case $e in */cuda*) ;;"
                f" *) ln -sfn $e {ROOT}/local/;; esac; done; mount --bind {ROOT}/local /usr/local"
            )
        elif what == "driver":
            lines.append(
                "for f in $(ldconfig -p | grep -E 'libcuda.so|libnvidia-ml' | sed 's/.*=> //');"
                " do mount --bind /dev/null $(readlink -f $f); done"
            )
        elif what == "disk":
            lines.append(
                f"mkdir -p {ROOT}/tiny-disk; mount -t tmpfs -o size=200k tmpfs {ROOT}/tiny-disk"
            )
        elif what.startswith("shm "):
            lines.append(f"mount -t tmpfs -o size={what.split()[1]} tmpfs /dev/shm")
        elif what.startswith("memory "):
            group = CGROUP / case.name
            lines.append(
                f"mkdir -p {group}; echo {what.split()[1]} > {group}/memory.max;"
                f" echo $$ > {group}/cgroup.procs"
            )
    return "; ".join(lines)


def start(case: Case, out: Path) -> Running:
    """Start the case's engine with its output in a log."""
    port = _free_port()
    log = out / f"{case.name}.log"
    begun = time.monotonic()
    steps = list(case.steps)
    running = Running(case, 0, port, log, begun, steps)
    while steps and not steps[0][0]:
        act(running, steps.pop(0)[1], None)
    line, env = argv(case, port), environment(case)
    running.note("vllm " + " ".join(line))
    if case.fresh:
        command = [sys.executable, str(ROOT / "bin" / "vllm"), *line]
        hide = hiding(case)
        if hide:
            command = ["unshare", "-m", "sh", "-ec", hide + '; exec "$0" "$@"', *command]
        with log.open("wb") as sink:
            running.leader = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
                start_new_session=True, cwd="/tmp",
            )  # fmt: skip
        running.pid = running.leader.pid
        return running
    sys.stdout.flush()
    running.pid = os.fork()
    if running.pid == 0:
        _become(line, env, log)
    return running


def _become(line: Sequence[str], env: Mapping[str, str], log: Path) -> None:
    """Be `vllm` with these arguments, as far as a process can that has imported it before."""
    os.setsid()
    os.chdir("/tmp")
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["vllm", *line]
    from vllm.entrypoints.cli.main import main as vllm

    # It must not unwind into the loop that forked it.
    status = 0
    try:
        vllm()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        status = 1
        trace = error.__traceback__
        traceback.print_exception(error.with_traceback(trace and trace.tb_next))
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes(session: int) -> Iterator[tuple[int, str]]:
    """Processes of a session, by pid and title."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            stat = (folder / "stat").read_text()
            state, _, _, of_session = stat.rpartition(")")[2].split()[:4]
            if int(of_session) == session and state != "Z":
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                yield int(folder.name), title


def end_all(session: int) -> None:
    """Kill what is left of a session that was started here."""
    for _ in range(20):
        left = [pid for pid, _ in processes(session)]
        if not left:
            return
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


SIGNALS = {
    "kill": signal.SIGKILL,
    "segv": signal.SIGSEGV,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "stop": signal.SIGSTOP,
}


def act(running: Running, action: str, holder: Holder | None) -> None:
    """Take one step of a case."""
    running.note(action)
    what, _, target = action.partition("-")
    if action.split()[0] in ("hold", "leave", "leave-soon"):
        assert holder is not None
        holder.tell(action)
    elif action in ("term", "int"):
        os.kill(running.pid, SIGNALS[action])
    elif action == "kill-leader":
        os.kill(running.pid, signal.SIGKILL)
    elif what in SIGNALS and target in ("engine", "worker"):
        title = {"engine": "VLLM::EngineCore", "worker": "VLLM::Worker"}[target]
        found = [pid for pid, line in processes(running.pid) if line.startswith(title)]
        running.note(f"{title}: {found}")
        if found:
            os.kill(found[-1], SIGNALS[what])
            time.sleep(1.0 if what != "stop" else 0.0)
    elif action == "ask":
        running.note(ask(running.port))
    elif action.startswith("squeeze "):
        (CGROUP / running.case.name / "memory.max").write_text(action.split()[1])
        time.sleep(2)
        events = (CGROUP / running.case.name / "memory.events").read_text()
        running.note(" ".join(events.split()))
    elif action == "ask-long":
        program = f"import {Path(__file__).stem} as p; print(p.ask({running.port}, 4000, 60))"
        child = subprocess.Popen(
            [sys.executable, "-c", program], cwd=Path(__file__).parent, stdout=subprocess.DEVNULL
        )
        running.children.append(child)
        time.sleep(4)
    elif action == "processes":
        time.sleep(1)
        running.note(f"left {list(processes(running.pid))}")
        running.note(f"GPU memory in use {nvidia_smi('memory.used')} MiB")
    elif action == "bind":
        taken = socket.socket()
        taken.bind(("127.0.0.1", running.port))
        taken.listen()
        running.sockets.append(taken)
    elif action.startswith("damage "):
        running.note(damage(action.split()[1]))


def ask(port: int, tokens: int = 5, seconds: float = 20) -> str:
    """One completion of token ids; what came back, short."""
    body = {"model": "gemma", "prompt": [2, 10, 11, 12], "max_tokens": tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return f"answer {json.load(answer)['usage']['completion_tokens']} tokens"
    except urllib.error.HTTPError as error:
        return f"answer {error.code} {error.read()[:300]!r}"
    except (OSError, ValueError) as error:
        return f"no answer: {error!r}"


def damage(how: str) -> str:
    """Copy a good compilation cache and damage the copy in one way; which files were hit."""
    source = ROOT / ("cache-aot" if "aot" in how else "cache-jit")
    target = ROOT / f"damaged-{how}"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    for file in target.rglob("*"):
        # The cache holds its own path; a damaged copy must not fail for that.
        if file.is_file() and file.suffix in (".py", ".json", ".txt"):
            text = file.read_bytes()
            file.write_bytes(text.replace(bytes(source), bytes(target)))
    kinds: dict[str, Callable[[Path], bool]] = {
        "aot-model": lambda file: "torch_aot_compile" in file.parts and file.name == "model",
        "aot": lambda file: "torch_aot_compile" in file.parts,
        "graphs": lambda file: "inductor_cache" in file.parts or "artifact" in file.name,
        "index": lambda file: file.name == "vllm_compile_cache.py",
    }
    of_kind = kinds["aot-model" if how.startswith("aot-model") else how.split("-")[0]]
    chosen = [file for file in target.rglob("*") if file.is_file() and of_kind(file)]
    for file in chosen:
        if how.endswith("deleted"):
            file.unlink()
        else:
            with file.open("r+b") as content:
                content.truncate(file.stat().st_size // 2)
    return f"damaged {len(chosen)} files: {[str(f.relative_to(target)) for f in chosen[:5]]}"


# --- The run -------------------------------------------------------------------------------------


class Run:
    """The lanes, their cases and how they ended."""

    def __init__(self, out: Path, cases: Sequence[Case], until: float) -> None:
        self._out = out
        self._raw = out / "raw"
        self._raw.mkdir(parents=True, exist_ok=True)
        self._waiting = list(cases)
        self._running: list[Running] = []
        self._until = until
        self._holder: Holder | None = None
        several = max(2, (os.cpu_count() or 2) * 3 // 8)
        self._limits = {"gpu": 1, "gpu-pair": 1, "cpu": several, "shared": several, "pair": several}
        self.results: dict[str, Any] = {}

    def go(self) -> None:
        """Run all cases; what has not ended in time is ended."""
        while (self._waiting or self._running) and time.monotonic() < self._until:
            self._start_some()
            for running in list(self._running):
                self._watch(running)
            time.sleep(0.01)

    def end(self) -> None:
        """End what is still running."""
        for running in list(self._running):
            running.note("out of time")
            self._finish(running)
        if self._holder is not None:
            self._holder.end()

    def _start_some(self) -> None:
        for case in list(self._waiting):
            lanes = [running.case.lane for running in self._running]
            waiting = [other.lane for other in self._waiting]
            alone = any(lane in ALONE for lane in (*lanes, *waiting))
            if lanes.count(case.lane) >= self._limits[case.lane]:
                continue
            if case.lane in ("shared", "pair") and alone:
                continue
            if case.lane == "gpu-pair" and ("gpu" in waiting or "gpu" in lanes):
                continue
            unfinished = [other.name for other in self._waiting]
            unfinished += [running.case.name for running in self._running]
            if case.after in unfinished:
                continue
            self._waiting.remove(case)
            self._prepare(case)
            try:
                self._running.append(start(case, self._raw))
            except OSError as error:
                print(f"{case.name}: not started: {error!r}", flush=True)

    def _prepare(self, case: Case) -> None:
        if case.lane == "cpu":
            return
        orders = [action for _, action in case.steps]
        needed = case.held or any(o.split()[0] in ("hold", "leave", "leave-soon") for o in orders)
        if self._holder is not None and not needed:
            self._holder.end()
            self._holder = None
        if needed and self._holder is None:
            self._holder = Holder()
        if self._holder is not None:
            self._holder.tell("hold 0")
            if case.held:
                total = int(nvidia_smi("memory.total") or 0) / 1024
                if case.held > 0.99:
                    self._holder.tell("leave 0")
                else:
                    self._holder.tell(f"hold {case.held * total:.1f}")

    def _watch(self, running: Running) -> None:
        text = running.log.read_text(errors="replace") if running.log.exists() else ""
        while running.steps and re.search(running.steps[0][0], text):
            action = running.steps.pop(0)[1]
            if action.startswith("second "):
                self._second(running, action.split()[1])
            else:
                try:
                    act(running, action, self._holder)
                except OSError as error:
                    running.note(f"{action} failed: {error!r}")
        if running.ended is None:
            running.status = _status(running)
            if running.status is not None:
                running.ended = time.monotonic()
        now = time.monotonic()
        if now - running.begun > running.case.seconds:
            running.note("ended: too long")
            self._finish(running)
        elif running.ended is not None and now - running.ended >= running.case.linger:
            self._finish(running)

    def _second(self, running: Running, name: str) -> None:
        """A second start of that name beside what the first has left."""
        case = running.case
        again = Case(name, "gpu", case.model, case.flags, steps=_ready("term"),
                     fresh=False, seconds=60)  # fmt: skip
        self._running.append(start(again, self._raw))
        other = self._running[-1]
        while other in self._running:
            self._watch(other)
            time.sleep(0.01)
        running.note(f"left {list(processes(running.pid))}")

    def _finish(self, running: Running) -> None:
        left = list(processes(running.pid))
        if left:
            running.note(f"left {left}")
        end_all(running.pid)
        _status(running)
        for child in running.children:
            child.kill()
            child.wait()
        for taken in running.sockets:
            taken.close()
        self._running.remove(running)
        seconds = round(time.monotonic() - running.begun, 1)
        case = running.case
        self.results[case.name] = {
            "status": running.status,
            "seconds": seconds,
            "steps_left": running.steps,
            "notes": running.notes,
            "env": {**case.env},
            "hide": case.hide,
        }
        if case.lane in ALONE:
            self.results[case.name]["used_after_mib"] = _settled(bool(self._holder))
        print(f"{case.name}: exit {running.status} after {seconds} s, {running.notes[-1][:150]}")
        print("   ", _last_error(running.log), flush=True)
        (self._out / "cases.json").write_text(json.dumps(self.results, indent=1))


def _status(running: Running) -> int | None:
    """The exit status of the leader, or None while it runs."""
    if running.leader is not None:
        return running.leader.poll()
    with suppress(ChildProcessError):
        pid, status = os.waitpid(running.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None
    return None


def _settled(held: bool) -> str | None:
    """Memory in use once no engine is left, or after five seconds."""
    used = nvidia_smi("memory.used")
    for _ in range(10):
        if held or used is None or int(used) < 1000:
            break
        time.sleep(0.5)
        used = nvidia_smi("memory.used")
    return used


def _last_error(log: Path) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    errors = re.findall(r"^.*\b\w*(?:Error|Exception|error): .*$", text, re.M)
    wrapper = "Engine core initialization failed"
    own = [line for line in errors if wrapper not in line] or text.splitlines()[-1:]
    return own[-1].strip()[:230] if own else "(nothing printed)"


def import_engine() -> bool:
    """Import what every start needs, once; whether CUDA is still untouched, so that forks may."""
    modules = (
        "vllm.entrypoints.cli.main", "vllm.entrypoints.cli.serve",
        "vllm.entrypoints.cli.benchmark.main", "vllm.entrypoints.cli.launch",
        "vllm.entrypoints.openai.api_server", "vllm.v1.engine.core", "vllm.v1.engine.async_llm",
        "vllm.v1.executor.uniproc_executor", "vllm.v1.worker.gpu_worker",
        "vllm.v1.worker.gpu.model_runner", "vllm.v1.worker.gpu_model_runner",
    )  # fmt: skip
    for name in modules:
        try:
            __import__(name)
        except Exception as error:
            print(f"import of {name}: {error!r}", flush=True)
    import torch

    return not torch.cuda.is_initialized()


# --- Keeping logs --------------------------------------------------------------------------------


def neutral(text: str, hosts: Sequence[str]) -> str:
    """A log with the paths, names and addresses of a machine that is nobody's."""
    site = "/opt/venv/lib/python3.12/site-packages"
    replaced = (
        (r"/tmp/site(?=/)", site),
        (r"/opt/torch/\.venv/lib/python3\.12/site-packages", site),
        (r"/opt/torch/\.venv", "/opt/venv"),
        (r"/opt/gcc/bin", "/usr/bin"),
        (rf"{ROOT}/models", "/models"),
        (rf"{ROOT}/bin", "/opt/venv/bin"),
        (rf"{ROOT}/home/[^/\s'\"]+/vllm", "/home/user/.cache/vllm"),
        (rf"{ROOT}/home/[^/\s'\"]+/inductor", "/tmp/torchinductor_user"),
        (rf"{ROOT}/home/[^/\s'\"]+/triton", "/home/user/.triton/cache"),
        (rf"{ROOT}/home/[^/\s'\"]+", "/home/user"),
        (rf"{ROOT}/(cache-\w+|damaged-[\w-]+|tiny-disk/vllm)", "/home/user/.cache/vllm"),
        (rf"{ROOT}/tiny-disk/inductor", "/tmp/torchinductor_user"),
        (rf"{ROOT}", "/tmp"),
        (r"/tmp/torchinductor_root", "/tmp/torchinductor_user"),
        (r"/root(?=/)", "/home/user"),
        (r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", f"GPU-{UUID}"),
        *((rf"\b{re.escape(host)}\b", "192.0.2.2") for host in hosts if len(host) > 3),
    )  # fmt: skip
    for pattern, by in replaced:
        text = re.sub(pattern, by, text)
    return text


def cut(text: str, most: int) -> str:
    """The text itself, or its two ends around a marked gap."""
    if len(text.encode()) <= most:
        return text
    lines = text.splitlines(keepends=True)
    head, tail, size = 0, len(lines), 0
    while head < tail and size + len(lines[head].encode()) < most // 2:
        size += len(lines[head].encode())
        head += 1
    size = 0
    while tail > head and size + len(lines[tail - 1].encode()) < most // 2:
        tail -= 1
        size += len(lines[tail].encode())
    gap = f"[... {tail - head} lines left out ...]\n"
    return "".join([*lines[:head], gap, *lines[tail:]])


def keep(archive: Path, into: Path, version: str, most: int = 120_000) -> None:
    """Write the logs of a run with neutral paths, one file for each case."""
    into.mkdir(parents=True, exist_ok=True)
    hosts: list[str] = json.loads((archive.parent / "machine.json").read_text())["hosts"]
    with tarfile.open(archive) as logs:
        for member in logs.getmembers():
            content = logs.extractfile(member) if member.isfile() else None
            if content is not None and member.name.endswith(".log"):
                text = neutral(content.read().decode(errors="replace"), hosts)
                name = f"{Path(member.name).name.removesuffix('.log')}.vllm-{version}.log"
                (into / name).write_text(cut(text, most))


def hosts() -> list[str]:
    """This machine's name and addresses."""
    addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    return [name for name in (socket.gethostname(), *addresses) if name not in ("localhost", "")]


def main() -> int:
    parser = argparse.ArgumentParser(description="Make vLLM fail, and keep what it printed.")
    parser.add_argument("--out", type=Path, default=Path("provoked"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--lanes", default="cpu,gpu,shared")
    parser.add_argument("--cases", default="", help="names or ids, comma-separated; default: all")
    parser.add_argument("--small", action="store_true", help="few layers, without a GPU")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--keep", type=Path, help="an archive of raw logs")
    parser.add_argument("--into", type=Path, default=Path("tests/data/logs/failures"))
    parser.add_argument("--version", default="0.26.0", help="of vLLM, for the names of kept logs")
    options = parser.parse_args()
    options.out = options.out.resolve()
    begun = time.monotonic()
    if options.keep:
        keep(options.keep, options.into, options.version)
        return 0
    names = [name for name in options.cases.split(",") if name]
    lanes = options.lanes.split(",")
    cases = [
        case
        for case in CASES
        if (case.name in names or case.name.split(".")[0] in names or not names)
        and (case.lane in lanes)
        and (case.cpu_rehearsal or not options.small or names)
    ]
    if options.list:
        print("\n".join(f"{case.lane:7}{case.name}" for case in cases))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "machine.json").write_text(
        json.dumps({"hosts": hosts(), "gpu": nvidia_smi("name"), "python": sys.version})
    )
    write_models(options.small)
    write_launcher()
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if any(not case.fresh for case in cases) and not import_engine():
        print("CUDA is initialized by the imports: no case may be forked", flush=True)
        return 1
    print(f"imported after {time.monotonic() - begun:.1f} s, {len(cases)} cases", flush=True)
    run = Run(options.out, cases, begun + options.minutes * 60)
    try:
        run.go()
    finally:
        run.end()
        with tarfile.open(options.out / "raw.tar.gz", "w:gz") as archive:
            archive.add(options.out / "raw", "raw")
        shutil.rmtree(options.out / "raw")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
