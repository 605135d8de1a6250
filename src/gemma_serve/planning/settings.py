"""Every setting of a deployment: its name, what it takes, what it does.

The flags, the `GEMMA_SERVE_*` variables, the keys of the YAML file and the reference in the
docs all come from this table. It is kept apart from the pydantic model that validates the
values so that `--help` needn't import pydantic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ENVIRONMENT_PREFIX = "GEMMA_SERVE_"


@dataclass(frozen=True)
class Setting:
    """One setting. `kind` says how the command line takes it."""

    name: str
    metavar: str
    help: str
    kind: Literal["value", "switch", "repeated"] = "value"
    short: str | None = None

    @property
    def flag(self) -> str:
        """The long option: `max_model_len` is `--max-model-len`, `engine_args` `--engine-arg`."""
        name = self.name.removesuffix("s") if self.kind == "repeated" else self.name
        return "--" + name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable: `port` is `GEMMA_SERVE_PORT`."""
        return ENVIRONMENT_PREFIX + self.name.upper()


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "model",
        "ID|DIR|demo",
        "A Gemma on the Hugging Face Hub, a folder, or `demo`. "
        "Without it: google/gemma-7b-it where a GPU is seen, else demo.",
        short="-m",
    ),
    Setting("revision", "REV", "Branch, tag or commit of the model on the Hub."),
    Setting("served_model_name", "NAME", "The name that clients ask for; by default the model's."),
    Setting(
        "name",
        "NAME",
        "What `status`, `logs` and `stop` call this deployment; by default made from the model.",
    ),
    Setting("host", "ADDRESS", "Address to listen on. Default: 127.0.0.1."),
    Setting("port", "PORT", "Port to listen on; 0 takes a free one. Default: 8000."),
    Setting(
        "tensor_parallel_size",
        "N",
        "Number of GPUs to split the model over; by default the least that fits.",
    ),
    Setting("gpus", "LIST", "The GPUs to use, as nvidia-smi numbers them or by UUID: 1,3."),
    Setting(
        "gpu_memory_utilization",
        "FRACTION",
        "Share of each GPU's memory that vLLM may take. Default: 0.9.",
    ),
    Setting(
        "kv_cache_memory_bytes",
        "BYTES",
        "Exact size of the KV cache per GPU (512M, 8G), instead of what the share leaves.",
    ),
    Setting(
        "max_model_len",
        "TOKENS",
        "Longest prompt plus answer; by default the model's own, or the longest that fits.",
    ),
    Setting("max_num_seqs", "N", "Most requests in one batch; by default vLLM's choice."),
    Setting(
        "max_num_batched_tokens", "N", "Most tokens in one engine step; by default vLLM's choice."
    ),
    Setting("dtype", "TYPE", "auto, bfloat16, float16 or float32. Default: auto."),
    Setting("quantization", "METHOD", "vLLM's name of a quantization method, e.g. fp8_per_tensor."),
    Setting("kv_cache_dtype", "TYPE", "auto, fp8 or another type that vLLM knows. Default: auto."),
    Setting(
        "enforce_eager",
        "",
        "Skip compilation and CUDA graphs: quicker to start, slower to answer.",
        kind="switch",
    ),
    Setting(
        "language_model_only",
        "",
        "Leave out the vision and audio towers of a multimodal Gemma.",
        kind="switch",
    ),
    Setting("profile", "NAME", "A set of defaults; `exact` changes no result. Default: exact."),
    Setting("engine_python", "FILE", "Python that has vLLM; by default the one running this."),
    Setting(
        "download_dir",
        "DIR",
        "Another folder for the local cache of models; by default that of HF_HOME.",
    ),
    Setting(
        "cache_dir",
        "DIR",
        "Folder for what the engine compiles; by default in the platform's cache folder.",
    ),
    Setting(
        "api_key_file",
        "FILE",
        "File with the key that clients must send (or set GEMMA_SERVE_API_KEY).",
    ),
    Setting(
        "allow_unauthenticated",
        "",
        "Listen beyond this machine without an API key.",
        kind="switch",
    ),
    Setting(
        "drain_timeout",
        "SECONDS",
        "How long requests in flight may go on when asked to stop. Default: 0.",
    ),
    Setting(
        "shutdown_timeout",
        "SECONDS",
        "The most that any stop may let requests in flight go on: vLLM must know it from the "
        "start. Default: 60.",
    ),
    Setting(
        "restart",
        "no|on-failure",
        "Whether an engine that dies after it was ready is started again; by default no in the "
        "foreground, on-failure with --detach.",
    ),
    Setting(
        "probe_interval",
        "SECONDS",
        "How often a ready engine is asked whether it still generates. Default: 5.",
    ),
    Setting(
        "probe_deadline",
        "SECONDS",
        "How long a ready engine may take for that one token. Default: 20.",
    ),
    Setting(
        "phase_timeouts",
        "PHASE=SECONDS",
        "The longest that a phase of the start may go on without progress, repeatable: "
        "--phase-timeout weights=7200.",
        kind="repeated",
    ),
    Setting(
        "engine_args",
        "KEY=VALUE",
        "Any other flag of vLLM, repeatable: --engine-arg seed=7.",
        kind="repeated",
    ),
)
