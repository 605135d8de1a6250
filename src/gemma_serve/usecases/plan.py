"""What `up` would run, and where every value of it came from. Starts nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_serve.adapters import host, settings
from gemma_serve.adapters.chat_template import own_chat_template, refuses_system_role
from gemma_serve.adapters.gpu import read_gpus
from gemma_serve.adapters.hub import cached_snapshot
from gemma_serve.adapters.installed_engine import find_engine
from gemma_serve.adapters.package_data import data_path, load_catalogue
from gemma_serve.errors import GemmaServeError, Problem, UsageError
from gemma_serve.planning.config import Layer, ResolvedConfig, ServeConfig, is_loopback, resolve
from gemma_serve.planning.gpus import Gpu, visible_gpus
from gemma_serve.planning.launch import Device, Engine, Launch, ModelSource, render_launch
from gemma_serve.planning.smoke import DEMO_MODEL, Answers, parse_answers
from gemma_serve.usecases.check_gpu import as_folder, check_gpu, find_checkpoint
from gemma_serve.usecases.configure import read_layers

DEFAULT_GPU_MODEL = "google/gemma-7b-it"

# With these flags of vLLM a GPU holds less than its share of the checkpoint as stored.
_SHRINK_THE_WEIGHTS = ("cpu-offload", "pipeline-parallel", "hf-overrides", "load-format")

_DEMO_KV_CACHE_BYTES = 256 * 2**20
_MOST_CPU_KV_CACHE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class ServePlan:
    """A deployment, decided. `problems` that are blocking keep `up` from starting it.

    `notes` are the choices that were made for the person, each with its reason.
    """

    config: ServeConfig
    sources: Mapping[str, str]
    engine: Engine
    model: ModelSource
    gpus: tuple[Gpu, ...]
    launch: Launch
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]

    @property
    def known_answers(self) -> Answers | None:
        """What the model must answer, if it is the demo, whatever it is served as."""
        if self.config.model != DEMO_MODEL:
            return None
        return parse_answers(data_path("answers.json").read_text(encoding="utf-8"))

    @property
    def ok(self) -> bool:
        """Whether nothing stands against starting it."""
        return not any(problem.blocking for problem in self.problems)


def make_plan(
    flags: Mapping[str, Any], *, environ: Mapping[str, str], file: Path | None = None
) -> ServePlan:
    """Decide what to run, from what was set and what this machine has.

    Args:
        flags: values by field name, only those that were given; text is fine.
        environ: the caller's environment.
        file: a YAML file of settings.

    Raises:
        UsageError: a value or a file is wrong (one problem for each), or the server would be
            open to other machines without a key.
    """
    layers, warnings = read_layers(flags, environ, file)
    given = resolve(layers)
    engine, missing = _find_engine(given.config, environ)
    resolved = resolve([*layers, _detected(given, engine.device, environ)])
    decided = _decide(_with_one_key(_with_a_port(resolved), environ), engine, environ)
    return replace(decided, problems=(*warnings, *missing, *decided.problems))


def check_before_start(plan: ServePlan) -> tuple[Problem, ...]:
    """The plan's problems, and what only matters at the moment of starting: the port."""
    port = host.port_problem(plan.config.host, plan.config.port)
    return (*plan.problems, *([port] if port else []))


def _find_engine(
    config: ServeConfig, environ: Mapping[str, str]
) -> tuple[Engine, tuple[Problem, ...]]:
    """The engine, or the one that would be wanted here and why it is missing."""
    try:
        return find_engine(config.engine_python), ()
    except GemmaServeError as error:
        device: Device = "cuda" if _sees_gpu(environ) else "cpu"
        python = config.engine_python or Path("python")
        return Engine(python, device, version=None, distribution=None), error.problems


def _sees_gpu(environ: Mapping[str, str]) -> bool:
    gpus = read_gpus().gpus
    return bool(visible_gpus(gpus, environ.get("CUDA_VISIBLE_DEVICES")).gpus)


def _detected(given: ResolvedConfig, device: Device, environ: Mapping[str, str]) -> Layer:
    """Defaults that depend on the machine, each with its reason; weaker than all that was set."""
    chosen: dict[str, tuple[object, str]] = {}
    sees_gpu = _sees_gpu(environ)
    if sees_gpu and device == "cuda":
        chosen["model"] = (DEFAULT_GPU_MODEL, "a GPU is seen")
    elif sees_gpu:
        chosen["model"] = (DEMO_MODEL, "vLLM here is built for CPUs")
    else:
        chosen["model"] = (DEMO_MODEL, "no GPU is seen")
    if device == "cpu":
        is_demo = given.sources["model"] == "default" or given.config.model == DEMO_MODEL
        size = cpu_kv_cache_bytes(host.available_memory_bytes(), is_demo=is_demo)
        if "VLLM_CPU_KVCACHE_SPACE" not in environ:
            chosen["kv_cache_memory_bytes"] = (size, "out of this machine's free memory")
        chosen["enforce_eager"] = (True, "compiling does not pay on a CPU")
    new = {name: pair for name, pair in chosen.items() if given.sources[name] == "default"}
    return Layer(
        "detected",
        {name: value for name, (value, _) in new.items()},
        {name: reason for name, (_, reason) in new.items()},
    )


def cpu_kv_cache_bytes(available_bytes: int, *, is_demo: bool) -> int:
    """Main memory for the KV cache: a quarter of what is free, 4 GiB at most, in whole 64 MiB.

    vLLM's own default is a share of all memory, and it refuses to start where that isn't free.
    """
    most = _DEMO_KV_CACHE_BYTES if is_demo else _MOST_CPU_KV_CACHE_BYTES
    step = 64 * 2**20
    return max(step, min(most, available_bytes // 4) // step * step)


def _with_a_port(resolved: ResolvedConfig) -> ResolvedConfig:
    """Port 0 means any: take one now, so that the plan and the URL can name it."""
    if resolved.config.port != 0:
        return resolved
    try:
        port = host.free_port(resolved.config.host)
    except OSError:
        return resolved  # the address is wrong, and the port's check will say so
    config = resolved.config.model_copy(update={"port": port})
    return ResolvedConfig(config, {**resolved.sources, "port": "detected: a free port"})


def _with_one_key(resolved: ResolvedConfig, environ: Mapping[str, str]) -> ResolvedConfig:
    """The variable with the key is stronger than a configuration file that names a key file."""
    from_file = resolved.sources["api_key_file"].startswith("file ")
    if not (from_file and environ.get(settings.API_KEY_VARIABLE)):
        return resolved
    config = resolved.config.model_copy(update={"api_key_file": None})
    source = f"environment {settings.API_KEY_VARIABLE}"
    return ResolvedConfig(config, {**resolved.sources, "api_key_file": source})


def _decide(resolved: ResolvedConfig, engine: Engine, environ: Mapping[str, str]) -> ServePlan:
    config = resolved.config
    key = settings.find_api_key(environ, config.api_key_file)
    if key is None:
        _refuse_to_be_open(config)
    gpus, gpu_note, problems = _check_machine(config, engine.device, environ)
    model = find_model(config)
    launch = render_launch(
        config,
        engine=engine,
        model=model,
        gpus=gpus,
        cores=host.usable_cores(),
        inherited=environ,
        key_source=None if key is None else key.source,
    )
    notes = [gpu_note] if gpu_note else []
    if resolved.sources["model"].startswith("detected: "):
        reason = resolved.sources["model"].removeprefix("detected: ")
        notes.insert(0, f"no --model was given and {reason}: taking {config.model}")
    problems = (*settings.key_file_warnings(config.api_key_file), *problems)
    return ServePlan(config, resolved.sources, engine, model, gpus, launch, tuple(notes), problems)


def _check_machine(
    config: ServeConfig, device: Device, environ: Mapping[str, str]
) -> tuple[tuple[Gpu, ...], str, tuple[Problem, ...]]:
    """The GPUs to use, why these, and what is wrong with them or with the model's files."""
    if device == "cpu":
        reading = find_checkpoint(config.model, config.revision, cache_dir=config.download_dir)
        return (), "", tuple(_soften(problem, config) for problem in reading.problems)
    report = check_gpu(
        environ=environ,
        model=config.model,
        revision=config.revision,
        tensor_parallel_size=config.tensor_parallel_size,
        gpus=config.gpus,
        gpu_memory_utilization=config.gpu_memory_utilization,
        dtype=config.dtype,
        download_dir=config.download_dir,
    )
    reason = report.chosen.reason if report.chosen.gpus else ""
    return report.chosen.gpus, reason, tuple(_soften(p, config) for p in report.problems)


def _soften(problem: Problem, config: ServeConfig) -> Problem:
    """What is not certain is a warning: a size that nobody knows, or that vLLM will shrink."""
    shrinks = config.quantization is not None or any(
        name.startswith(_SHRINK_THE_WEIGHTS) for name in config.engine_args
    )
    unsure = problem.code == "model.size_unknown" or (problem.code == "gpu.too_small" and shrinks)
    return replace(problem, blocking=False) if unsure else problem


def find_model(config: ServeConfig) -> ModelSource:
    """Where the model is loaded from, its name for clients, and the chat template it needs."""
    folder = as_folder(config.model)
    if folder is None:
        location, name, files = config.model, config.model, _cached(config)
    else:
        location, files = str(folder), folder
        name = DEMO_MODEL if config.model == DEMO_MODEL else folder.resolve().name
    entry = next((entry for entry in load_catalogue() if entry.id == config.model), None)
    refuses, has_chat = False, True
    if files is not None:
        template = own_chat_template(files)
        has_chat = template is not None
        refuses = has_chat and refuses_system_role(template or "")
    elif entry is not None:
        refuses, has_chat = entry.system_role == "refused" and entry.chat, entry.chat
    return ModelSource(
        location,
        config.served_model_name or name,
        is_local=folder is not None,
        chat_template=data_path("chat_templates", "system-in-first-turn.jinja")
        if refuses
        else None,
        has_chat=has_chat,
    )


def _cached(config: ServeConfig) -> Path | None:
    """The Hub's cached snapshot, if it has come as far as the tokenizer's files."""
    snapshot = cached_snapshot(config.model, config.revision, config.download_dir)
    if snapshot is None or not (snapshot / "tokenizer_config.json").exists():
        return None
    return snapshot


def _refuse_to_be_open(config: ServeConfig) -> None:
    """Without a key, others may only be let in when that was said."""
    if config.allow_unauthenticated or is_loopback(config.host):
        return
    raise UsageError(
        f"listening on {config.host} lets other machines in, and no API key is set",
        code="config.unauthenticated",
        hint=f"set {settings.API_KEY_VARIABLE} or --api-key-file, "
        "or say --allow-unauthenticated if that is meant",
    )
