"""The engine's command line and environment, from the configuration and the facts. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gemma_serve.planning.config import EngineArg, ServeConfig, phase_limits_s
from gemma_serve.planning.engine_caches import cache_environment
from gemma_serve.planning.hardware.gpus import Gpu, cuda_environment

# `vllm serve` looks up a distribution called "vllm", which CPU builds are not; this module is
# in every build. (`vllm.entrypoints.api_server`, of many tutorials, has no /v1 at all.)
SERVER_MODULE = "vllm.entrypoints.openai.api_server"

# As the Hub's client reads its switches.
_TRUE = ("1", "ON", "YES", "TRUE")

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Engine:
    """A vLLM that is installed somewhere. A version is None where it can't be told.

    `cuda_version` is that of the CUDA which its torch was built for, `include_dir` where the C
    headers of its Python should be, `package_dir` where its source is.
    """

    python: Path
    device: Device
    version: str | None
    distribution: str | None
    torch_version: str | None = None
    cuda_version: str | None = None
    include_dir: Path | None = None
    package_dir: Path | None = None


@dataclass(frozen=True)
class ModelSource:
    """What to load (`location`: a folder or a repository id) and the name it is served under.

    `chat_template` replaces the model's own; `has_chat` is False for a base model, which has
    none. `commit` is that of a repository whose files are here.
    """

    location: str
    served_name: str
    is_local: bool
    chat_template: Path | None = None
    has_chat: bool = True
    commit: str | None = None


@dataclass(frozen=True)
class Launch:
    """How to start the engine.

    `environment` is laid over the caller's own. `secrets` maps a variable to the place that its
    value is read from at the start; the value itself is never part of a plan.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    secrets: Mapping[str, str]


def render_launch(
    config: ServeConfig,
    *,
    engine: Engine,
    model: ModelSource,
    gpus: tuple[Gpu, ...] = (),
    cores: tuple[int, ...] = (),
    inherited: Mapping[str, str] | None = None,
    key_source: str | None = None,
    caches: Path | None = None,
) -> Launch:
    """The command that serves `model` with `engine`.

    Args:
        gpus: the chosen GPUs; empty on a CPU engine.
        cores: the CPU cores that we may run on, shared out among the ranks of a CPU engine.
        inherited: the caller's environment; what it already sets is left as it is.
        key_source: where the API key is read from, if clients must send one.
        caches: the folder for what the engine compiles; None leaves it where vLLM wants it.
    """
    argv = (str(engine.python), "-m", SERVER_MODULE, *_arguments(config, engine.device, model))
    secrets = {} if key_source is None else {"VLLM_API_KEY": key_source}
    environment = _environment(config, engine, model, cores)
    if caches is not None:
        environment |= cache_environment(caches)
    # A variable that is set to nothing is as good as unset.
    missing = {k: v for k, v in environment.items() if not (inherited or {}).get(k)}
    # Ours wins over an inherited CUDA_VISIBLE_DEVICES: the choice was made among what it shows.
    return Launch(argv, missing | (cuda_environment(gpus) if gpus else {}), secrets)


def _arguments(config: ServeConfig, device: Device, model: ModelSource) -> list[str]:
    args: list[str] = []
    for name, value in _flags(config, device, model).items():
        args += _flag(name, value)
    for name, value in config.engine_args.items():
        args += _flag(name, value)
    return args


def _flags(config: ServeConfig, device: Device, model: ModelSource) -> dict[str, EngineArg]:
    """vLLM's flag for every setting that isn't left to vLLM, in a fixed order."""
    on_gpu = device == "cuda"
    flags: dict[str, EngineArg | None] = {
        "model": model.location,
        "served-model-name": model.served_name,
        "revision": None if model.is_local else config.revision,
        "host": config.host,
        "port": config.port,
        "tensor-parallel-size": config.tensor_parallel_size,
        "gpu-memory-utilization": config.gpu_memory_utilization if on_gpu else None,
        "kv-cache-memory-bytes": config.kv_cache_memory_bytes,
        "max-model-len": config.max_model_len,
        "max-num-seqs": config.max_num_seqs,
        "max-num-batched-tokens": config.max_num_batched_tokens,
        "dtype": _unless_auto(config.dtype),
        "quantization": config.quantization,
        "kv-cache-dtype": _unless_auto(config.kv_cache_dtype),
        "enforce-eager": config.enforce_eager or None,
        "language-model-only": config.language_model_only or None,
        "download-dir": None
        if model.is_local or config.download_dir is None
        else str(config.download_dir),
        # The most that any stop may drain: vLLM drains no longer than it was started with.
        "shutdown-timeout": max(config.shutdown_timeout, config.drain_timeout) or None,
    }
    if model.chat_template is not None and "chat-template" not in config.engine_args:
        flags["chat-template"] = str(model.chat_template)
    return {name: value for name, value in flags.items() if value is not None}


def _unless_auto(choice: str) -> str | None:
    return None if choice == "auto" else choice


def _flag(name: str, value: EngineArg) -> list[str]:
    """One flag as vLLM's parser takes it: switches bare, lists spread out, objects as JSON."""
    if isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false")):
        return [f"--{name}" if str(value).lower() == "true" else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *(str(item) for item in value)]
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    # A value that starts with a dash would be read as the next flag.
    return [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]


def _environment(
    config: ServeConfig, engine: Engine, model: ModelSource, cores: tuple[int, ...]
) -> dict[str, str]:
    # vLLM's own clock, 600 s for the whole start, would cut a slow load of weights short.
    start_s = math.ceil(sum(phase_limits_s(config).values()))
    wanted = {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENGINE_READY_TIMEOUT_S": str(start_s)}
    ranks = config.tensor_parallel_size or 1
    if model.is_local:
        wanted["HF_HUB_OFFLINE"] = "1"
    if engine.device == "cpu" and len(cores) >= ranks:
        # vLLM's own choice keeps a core free for every rank: half of a two-core machine.
        share = len(cores) // ranks
        lists = [cores[rank * share : (rank + 1) * share] for rank in range(ranks)]
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, c)) for c in lists)
    return wanted


def engine_environment(
    inherited: Mapping[str, str], laid_over: Mapping[str, str], secrets: Mapping[str, str]
) -> dict[str, str]:
    """The engine's whole environment: ours over the caller's, without settings meant for us.

    An engine that may not ask the Hub does not get its token either.
    """
    ours: tuple[str, ...] = ("GEMMA_SERVE_", "VLLM_API_KEY")
    if {**inherited, **laid_over}.get("HF_HUB_OFFLINE", "").upper() in _TRUE:
        ours += ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    kept = {name: value for name, value in inherited.items() if not name.startswith(ours)}
    return {**kept, **laid_over, **secrets}
