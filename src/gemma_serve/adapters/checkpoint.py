"""A checkpoint in a folder: its config.json and the headers of its weight files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_serve.errors import Problem
from gemma_serve.planning.model.facts import FactsReading, Source, facts_from_config
from gemma_serve.planning.model.repo_files import INDEX
from gemma_serve.planning.model.weights import HeaderTensor

# A header lists every tensor: about 100 bytes each. More than this is no header.
_LONGEST_HEADER = 100 * 2**20
# The second for brackets within brackets without end.
_NOT_JSON = (ValueError, RecursionError)


@dataclass(frozen=True)
class _Weights:
    """The tensors that the weight files hold; of PyTorch's own files only the size is known."""

    tensors: tuple[HeaderTensor, ...] = ()
    pickled_bytes: int | None = None
    problems: tuple[Problem, ...] = ()


def read_checkpoint(
    folder: Path, *, model: str | None = None, source: Source = "folder"
) -> FactsReading:
    """The checkpoint in `folder`; `model` is the name to call it by, else the folder's path.

    Without a readable config.json there are no facts. With weights that are missing or cut short
    the facts are those of the config, and the problem is a blocking one.
    """
    if not folder.is_dir():
        return FactsReading(problems=(_not_found(folder),))
    config = _read_json(folder / "config.json")
    if config is None:
        return FactsReading(problems=(_no_config(folder),))
    weights = _read_weights(folder)
    tensors = () if weights.problems else weights.tensors
    reading = facts_from_config(model or str(folder), config, source=source, tensors=tensors)
    if reading.facts is not None and weights.pickled_bytes is not None:
        facts = replace(reading.facts, weights_bytes=weights.pickled_bytes)
        reading = replace(reading, facts=facts)
    return reading.adding(*weights.problems)


def shards_of_index(folder: Path) -> frozenset[str] | None:
    """The weight files that the folder's index names; None where it has no index."""
    index = _read_json(folder / INDEX)
    if index is None:
        return None
    weight_map = index.get("weight_map")
    return frozenset(map(str, weight_map.values()) if isinstance(weight_map, dict) else ())


def _read_weights(folder: Path) -> _Weights:
    """All of the folder's weights: safetensors if there are any, else PyTorch's own files."""
    named = shards_of_index(folder)
    if named is not None:
        shards = sorted(named)
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing or not shards:
            return _Weights(problems=(_shards_missing(folder, missing, shards),))
        return _join(folder / shard for shard in shards)
    files = sorted(
        # `consolidated.*` holds the same weights a second time, in the authors' own layout.
        file
        for file in folder.glob("*.safetensors")
        if not file.name.startswith("consolidated")
    )
    if files:
        return _join(files)
    pickles = list(folder.glob("pytorch_model*.bin"))
    if pickles:
        return _Weights(pickled_bytes=sum(file.stat().st_size for file in pickles))
    return _Weights(problems=(_no_weights(folder),))


def _join(files: Iterable[Path]) -> _Weights:
    each = [_read_header(file) for file in files]
    return _Weights(
        tensors=tuple(tensor for weights in each for tensor in weights.tensors),
        problems=tuple(problem for weights in each for problem in weights.problems),
    )


def _read_header(file: Path) -> _Weights:
    """What the file's header promises, checked against how long the file is.

    The format: 8 bytes with the header's length, the header in JSON, the tensors.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(length) if length <= _LONGEST_HEADER else b""
        size = file.stat().st_size
        header = json.loads(text)
        tensors = tuple(
            _tensor(name, entry) for name, entry in header.items() if name != "__metadata__"
        )
        end = max((int(header[t.name]["data_offsets"][1]) for t in tensors), default=0)
    except (OSError, *_NOT_JSON, TypeError, LookupError, AttributeError, OverflowError):
        return _Weights(problems=(_not_safetensors(file),))
    wanted = 8 + length + end
    return _Weights(tensors, problems=(_cut_short(file, size, wanted),) if size < wanted else ())


def _tensor(name: str, entry: Any) -> HeaderTensor:
    first, last = entry["data_offsets"]
    shape = tuple(int(length) for length in entry["shape"])
    if not 0 <= first <= last:
        raise ValueError(name)
    return HeaderTensor(name, str(entry["dtype"]), shape, int(last) - int(first))


def _read_json(file: Path) -> Mapping[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, *_NOT_JSON):
        return None
    return content if isinstance(content, dict) else None


def _not_found(folder: Path) -> Problem:
    found = "is a file" if folder.exists() else "does not exist"
    return Problem(
        "repo-not-found",
        f"the model folder {folder} {found}; a folder with config.json and weights is wanted",
        hint="give the folder that holds config.json, or a name on the Hub such as "
        "`--model google/gemma-7b-it`",
    )


def _no_config(folder: Path) -> Problem:
    found = "can't be read as JSON" if (folder / "config.json").exists() else "is missing"
    return Problem(
        "model.no_config",
        f"{folder / 'config.json'} {found}; it says what kind of model the folder holds",
        hint="give the folder that `gemma-serve download` printed, or download the model again",
    )


def _shards_missing(folder: Path, missing: list[str], shards: list[str]) -> Problem:
    if not shards:
        return Problem(
            "weights-missing",
            f"{folder / INDEX} names no weight files; at least one is wanted",
            hint="download it again: `gemma-serve download` goes on where it stopped",
        )
    some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    return Problem(
        "weights-missing",
        f"{len(missing)} of the {len(shards)} weight files that {folder / INDEX} names are "
        f"missing: {some}",
        hint="download it again: `gemma-serve download` goes on where it stopped",
    )


def _no_weights(folder: Path) -> Problem:
    return Problem(
        "weights-missing",
        f"{folder} holds no weights; *.safetensors files are wanted",
        hint="download the whole model, not its config alone: `gemma-serve download --model NAME`",
    )


def _not_safetensors(file: Path) -> Problem:
    return Problem(
        "weights-truncated",
        f"{file} is not a safetensors file; its first bytes are no header",
        hint="if it came with `git clone`, run `git lfs pull` there; else download it again",
    )


def _cut_short(file: Path, size: int, wanted: int) -> Problem:
    return Problem(
        "weights-truncated",
        f"{file} is cut short: {size:,} bytes, and its header promises {wanted:,}",
        hint="download it again: `gemma-serve download` goes on where it stopped",
    )
