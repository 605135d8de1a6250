"""What GPUs this machine has, which would be used, and whether a model's weights fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_serve.adapters.checkpoint import read_checkpoint
from gemma_serve.adapters.gpu import read_gpus
from gemma_serve.adapters.hub import cached_snapshot, is_offline, offline_problem, read_hub
from gemma_serve.adapters.package_data import data_path, load_catalogue
from gemma_serve.errors import Problem
from gemma_serve.planning.checkpoint import (
    Checkpoint,
    CheckpointReading,
    engine_dtype,
    loaded_bytes,
    nearest_model,
)
from gemma_serve.planning.gpu_problems import WeightsFit, driver_problem, gpu_problems, weights_fit
from gemma_serve.planning.gpus import Chosen, GpuInventory, VisibleGpus, choose_gpus, visible_gpus
from gemma_serve.planning.smoke import DEMO_MODEL


@dataclass(frozen=True)
class GpuReport:
    """Everything that was found out; `weights` is None without a model, its size or a GPU."""

    inventory: GpuInventory
    visible: VisibleGpus
    chosen: Chosen
    checkpoint: Checkpoint | None
    weights: WeightsFit | None
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether an engine can start: a GPU is there, and nothing stands in the way."""
        return bool(self.chosen.gpus) and not any(p.blocking for p in self.problems)


def check_gpu(
    *,
    environ: Mapping[str, str],
    model: str | None = None,
    revision: str | None = None,
    tensor_parallel_size: int = 1,
    gpus: tuple[str, ...] | None = None,
    gpu_memory_utilization: float = 0.9,
    dtype: str = "auto",
    download_dir: Path | None = None,
) -> GpuReport:
    """Look at the GPUs and, with a `model`, at the size of its weights. Changes nothing.

    Raises:
        UsageError: `gpus` doesn't name visible GPUs, or not `tensor_parallel_size` of them.
    """
    inventory = read_gpus()
    visible = visible_gpus(inventory.gpus, environ.get("CUDA_VISIBLE_DEVICES"))
    chosen = choose_gpus(visible.gpus, wanted=gpus, count=tensor_parallel_size)
    reading = CheckpointReading()
    if model is not None:
        reading = find_checkpoint(model, revision, cache_dir=download_dir)
    checkpoint = reading.checkpoint
    weights = _weights(checkpoint, chosen, dtype, gpu_memory_utilization, tensor_parallel_size)
    found: Sequence[Problem] = ()
    if chosen.gpus:
        found = gpu_problems(
            chosen.gpus,
            gpu_memory_utilization=gpu_memory_utilization,
            weights_bytes=weights.loaded_bytes if weights else None,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            model_type=checkpoint.model_type if checkpoint else None,
        )
    problems = (*_seen(inventory), *visible.problems, *found, *reading.problems)
    return GpuReport(inventory, visible, chosen, checkpoint, weights, problems)


def find_checkpoint(
    model: str, revision: str | None = None, *, cache_dir: Path | None = None
) -> CheckpointReading:
    """The model's facts from the nearest place that has them.

    A folder is read as it is. A name is looked up on the Hub, then in the Hub's local cache,
    then in the catalogue; offline, the Hub is left out. A size that nobody knows is a problem.
    """
    folder = as_folder(model)
    if folder is not None:
        reading = read_checkpoint(folder, model=model)
    elif is_offline():
        reading = _without_hub(model, revision, cache_dir, offline_problem())
    else:
        reading = read_hub(model, revision)
        if any(problem.blocking for problem in reading.problems):
            return _with_suggestion(model, reading)
        if reading.checkpoint is None or reading.checkpoint.weights_bytes is None:
            reading = _without_hub(model, revision, cache_dir, *reading.problems)
    return _with_known_size(model, reading)


def _weights(
    checkpoint: Checkpoint | None,
    chosen: Chosen,
    dtype: str,
    gpu_memory_utilization: float,
    tensor_parallel_size: int,
) -> WeightsFit | None:
    if checkpoint is None or not chosen.gpus:
        return None
    loaded = loaded_bytes(checkpoint, engine_dtype(dtype, checkpoint, chosen.gpus))
    if loaded is None:
        return None
    return weights_fit(
        chosen.gpus,
        gpu_memory_utilization=gpu_memory_utilization,
        weights_bytes=loaded,
        tensor_parallel_size=tensor_parallel_size,
    )


def _seen(inventory: GpuInventory) -> list[Problem]:
    driver = driver_problem(inventory.cuda_version) if inventory.gpus else None
    return [p for p in (inventory.problem, *inventory.problems, driver) if p is not None]


def as_folder(model: str) -> Path | None:
    """The folder that `model` means, if it means one; as vLLM, a folder that exists goes first."""
    if model == DEMO_MODEL:
        return data_path(DEMO_MODEL)
    path = Path(model).expanduser()
    if path.is_dir() or path.is_absolute() or model.startswith((".", "~")):
        return path
    return None


def _without_hub(
    model: str, revision: str | None, cache_dir: Path | None, *why: Problem
) -> CheckpointReading:
    snapshot = cached_snapshot(model, revision, cache_dir)
    if snapshot is not None:
        cached = read_checkpoint(snapshot, model=model, source="cache")
        # Half a download: the rest will be fetched, so it is no problem yet.
        if cached.checkpoint is not None and cached.checkpoint.weights_bytes is not None:
            return cached
    entry = next((entry for entry in load_catalogue() if entry.id == model), None)
    return CheckpointReading(entry.checkpoint() if entry else None, why)


def _with_suggestion(model: str, reading: CheckpointReading) -> CheckpointReading:
    near = _nearest(model)
    if near is None or near == model:
        return reading
    problems = tuple(
        replace(p, hint=f"did you mean `--model {near}`?") if p.code == "model.not_found" else p
        for p in reading.problems
    )
    return replace(reading, problems=problems)


def _with_known_size(model: str, reading: CheckpointReading) -> CheckpointReading:
    known = reading.checkpoint is not None and reading.checkpoint.weights_bytes is not None
    if known or any(problem.blocking for problem in reading.problems):
        return reading
    near = _nearest(model)
    unknown = Problem(
        "model.size_unknown",
        f"nobody could say how large {model} is, so whether it fits is not known",
        hint=f"did you mean `--model {near}`?"
        if near not in (None, model)
        else "download the model first and give its folder with `--model DIR`",
    )
    return replace(reading, problems=(*reading.problems, unknown))


def _nearest(model: str) -> str | None:
    return nearest_model(model, [DEMO_MODEL, *(entry.id for entry in load_catalogue())])
