"""What is known of a model, from the nearest place that knows it, and where it is loaded from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gemma_serve.adapters.chat_template import own_chat_template, refuses_system_role
from gemma_serve.adapters.checkpoint import read_checkpoint
from gemma_serve.adapters.hub.cache import cached_snapshot
from gemma_serve.adapters.package_data import data_path, load_catalogue
from gemma_serve.errors import Problem
from gemma_serve.planning.config import ServeConfig
from gemma_serve.planning.launch import ModelSource
from gemma_serve.planning.model.catalogue import CatalogueEntry, nearest_model
from gemma_serve.planning.model.facts import FactsReading, ModelFacts, facts_from_config
from gemma_serve.planning.smoke.questions import DEMO_MODEL
from gemma_serve.usecases.local_files import find_cached


def find_model_facts(
    model: str, revision: str | None = None, *, cache_dir: Path | None = None
) -> FactsReading:
    """The model's facts from the nearest place that has them.

    A folder is read as it is. A name is looked for in the Hub's local cache, then in the
    catalogue, which knows the public Gemmas to the byte; of the rest, and of a given `revision`,
    the Hub is asked for config.json and headers, unless HF_HUB_OFFLINE is set. A model of which
    nobody can say anything is a blocking problem.
    """
    folder = as_folder(model)
    if folder is not None:
        reading = read_checkpoint(folder, model=model)
    else:
        reading = _by_name(model, revision, cache_dir)
    return _unknown_to_all(model, reading)


def as_folder(model: str) -> Path | None:
    """The folder that `model` means, if it means one; as vLLM, a folder that exists goes first."""
    if model == DEMO_MODEL:
        return data_path(DEMO_MODEL)
    path = Path(model).expanduser()
    if path.is_dir() or path.is_absolute() or model.startswith((".", "~")):
        return path
    return None


def catalogue_entry(model: str) -> CatalogueEntry | None:
    """The catalogue's entry of this very name."""
    return next((entry for entry in load_catalogue() if entry.id == model), None)


def _by_name(model: str, revision: str | None, cache_dir: Path | None) -> FactsReading:
    entry = catalogue_entry(model)
    cached = _from_cache(model, revision, cache_dir, entry)
    if cached is not None:
        return cached
    if entry is not None and revision is None:
        return _from_catalogue(entry)
    from gemma_serve.adapters.hub.client import is_offline
    from gemma_serve.adapters.hub.facts import offline_problem, read_hub

    if is_offline():
        reading = FactsReading(problems=(offline_problem(),))
    else:
        reading = read_hub(model, revision)
    if any(problem.blocking for problem in reading.problems):
        return replace(reading, problems=with_suggestion(model, reading.problems))
    if reading.facts is None and entry is not None:
        return _from_catalogue(entry).adding(*reading.problems)
    return _with_entry(reading, entry)


def _from_catalogue(entry: CatalogueEntry) -> FactsReading:
    reading = facts_from_config(entry.id, entry.config, source="catalogue", entry=entry)
    # Of a model that vLLM does not serve, or whose memory nobody counts, the entry says all.
    return reading if entry.served and entry.shape else replace(reading, problems=())


def _from_cache(
    model: str, revision: str | None, cache_dir: Path | None, entry: CatalogueEntry | None
) -> FactsReading | None:
    """The snapshot that a download left, if it is whole; half of one will still be completed."""
    snapshot = cached_snapshot(model, revision, cache_dir)
    if snapshot is None:
        return None
    reading = read_checkpoint(snapshot, model=model, source="cache")
    if reading.facts is None or any(problem.blocking for problem in reading.problems):
        return None
    return _with_entry(reading, entry)


def _with_entry(reading: FactsReading, entry: CatalogueEntry | None) -> FactsReading:
    if reading.facts is None or entry is None:
        return reading
    return replace(reading, facts=replace(reading.facts, entry=entry))


def with_suggestion(model: str, problems: Sequence[Problem]) -> tuple[Problem, ...]:
    """The `problems`, with the nearest known Gemma as the way out of a name that isn't known."""
    near = _nearest(model)
    if catalogue_entry(model) is not None:
        first = "it is on huggingface.co: see what HF_ENDPOINT and HF_TOKEN are set to; or "
    elif near is not None:
        first = f"did you mean `--model {near}`? If not: "
    else:
        return tuple(problems)
    return tuple(
        replace(p, hint=first + p.hint) if p.code == "repo-not-found" else p for p in problems
    )


def _unknown_to_all(model: str, reading: FactsReading) -> FactsReading:
    facts = reading.facts
    if any(problem.blocking for problem in reading.problems) or _has_size(facts):
        return reading
    entry = facts.entry if facts is not None else None
    if entry is not None and not entry.served:
        return reading
    if entry is not None and entry.shape is None:
        return reading.adding(_not_planned_yet(entry))
    near = _nearest(model)
    unknown = Problem(
        "model.size_unknown",
        f"nobody could say how large {model} is, so whether it fits is not known",
        hint=f"did you mean `--model {near}`?"
        if near not in (None, model)
        else "download the model first and give its folder with `--model DIR`",
    )
    return reading.adding(unknown)


def _not_planned_yet(entry: CatalogueEntry) -> Problem:
    return Problem(
        "model.size_unknown",
        f"how much memory a `{entry.architecture}` takes is not planned here yet, so whether "
        f"{entry.id} fits is not known",
        hint=f"vLLM serves it: try `gemma-serve up --model {entry.id}`",
    )


def _has_size(facts: ModelFacts | None) -> bool:
    return facts is not None and (facts.geometry is not None or facts.weights_bytes is not None)


def _nearest(model: str) -> str | None:
    return nearest_model(model, [DEMO_MODEL, *(entry.id for entry in load_catalogue())])


def find_model(config: ServeConfig) -> ModelSource:
    """Where the model is loaded from, its name for clients, and the chat template it needs."""
    folder = as_folder(config.model)
    commit: str | None = None
    files = folder
    if folder is not None:
        name = DEMO_MODEL if config.model == DEMO_MODEL else folder.resolve().name
    else:
        name = config.model
        cached = find_cached(config.model, config.revision, config.download_dir)
        if cached is not None:
            files, commit = cached.folder, cached.commit
    entry = catalogue_entry(config.model)
    refuses, has_chat = False, True
    if files is not None:
        template = own_chat_template(files)
        has_chat = template is not None
        refuses = has_chat and refuses_system_role(template or "")
    elif entry is not None:
        refuses, has_chat = entry.system_role == "refused" and entry.chat, entry.chat
    return ModelSource(
        config.model if files is None else str(files),
        config.served_model_name or name,
        is_local=files is not None,
        chat_template=data_path("chat_templates", "system-in-first-turn.jinja")
        if refuses
        else None,
        has_chat=has_chat,
        commit=commit,
    )
