"""A checkpoint in a folder: its config.json and the sizes of its weight files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_serve.errors import Problem
from gemma_serve.planning.checkpoint import (
    DTYPE_NAMES,
    CheckpointReading,
    Source,
    checkpoint_from_config,
    gemma_problem,
)

_INDEX = "model.safetensors.index.json"
# A header lists every tensor: about 100 bytes each. More than this is no header.
_LONGEST_HEADER = 100 * 2**20


@dataclass(frozen=True)
class _Weights:
    """The tensors of one file or of all: bytes by dtype, as safetensors names them ("BF16")."""

    bytes_by_dtype: Counter[str]
    problems: tuple[Problem, ...] = ()


def read_checkpoint(
    folder: Path, *, model: str | None = None, source: Source = "folder"
) -> CheckpointReading:
    """The checkpoint in `folder`; `model` is the name to call it by, else the folder's path.

    Without a readable config.json there is no checkpoint. With weights that are missing or cut
    short there is one, whose size is unknown.
    """
    if not folder.is_dir():
        return CheckpointReading(problems=(_not_found(folder),))
    config = _read_json(folder / "config.json")
    if config is None:
        return CheckpointReading(problems=(_no_config(folder),))
    weights = _read_weights(folder)
    size = None if weights.problems else weights.bytes_by_dtype.total()
    checkpoint = checkpoint_from_config(
        model or str(folder), config, source=source, weights_bytes=size
    )
    if checkpoint.dtype is None and weights.bytes_by_dtype:
        [(commonest, _)] = weights.bytes_by_dtype.most_common(1)
        checkpoint = replace(checkpoint, dtype=DTYPE_NAMES.get(commonest))
    other = gemma_problem(checkpoint)
    return CheckpointReading(checkpoint, (*weights.problems, *([other] if other else [])))


def _read_weights(folder: Path) -> _Weights:
    """All of the folder's weights: safetensors if there are any, else PyTorch's own files."""
    index = _read_json(folder / _INDEX)
    if index is not None:
        shards = sorted({str(shard) for shard in index.get("weight_map", {}).values()})
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing or not shards:
            return _Weights(Counter(), (_shards_missing(folder, missing, shards),))
        return _sum(folder / shard for shard in shards)
    files = sorted(
        # `consolidated.*` holds the same weights a second time, in the authors' own layout.
        file
        for file in folder.glob("*.safetensors")
        if not file.name.startswith("consolidated")
    )
    if files:
        return _sum(files)
    pickles = list(folder.glob("pytorch_model*.bin"))
    if pickles:
        return _Weights(Counter({"": sum(file.stat().st_size for file in pickles)}))
    return _Weights(Counter(), (_no_weights(folder),))


def _sum(files: Iterable[Path]) -> _Weights:
    each = [_read_header(file) for file in files]
    total = sum((weights.bytes_by_dtype for weights in each), start=Counter[str]())
    return _Weights(total, tuple(problem for weights in each for problem in weights.problems))


def _read_header(file: Path) -> _Weights:
    """What the file's header promises, checked against how long the file is.

    The format: 8 bytes with the header's length, the header in JSON, the tensors.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(length) if length <= _LONGEST_HEADER else b""
        size = file.stat().st_size
        tensors = _tensors(json.loads(text))
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return _Weights(Counter(), (_not_safetensors(file),))
    sizes: Counter[str] = Counter()
    for dtype, first, last in tensors:
        sizes[dtype] += last - first
    wanted = 8 + length + max((last for _, _, last in tensors), default=0)
    return _Weights(sizes, (_cut_short(file, size, wanted),) if size < wanted else ())


def _tensors(header: Any) -> list[tuple[str, int, int]]:
    """Each tensor's dtype, first byte and end."""
    found = []
    for name, tensor in header.items():
        if name != "__metadata__":
            first, last = tensor["data_offsets"]
            found.append((str(tensor["dtype"]), int(first), int(last)))
    return found


def _read_json(file: Path) -> Mapping[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _not_found(folder: Path) -> Problem:
    found = "is a file" if folder.exists() else "does not exist"
    return Problem(
        "model.not_found",
        f"the model folder {folder} {found}; a folder with config.json and weights is wanted",
        hint="give the folder that holds config.json, or a name on the Hub such as "
        "`--model google/gemma-7b-it`",
    )


def _no_config(folder: Path) -> Problem:
    found = "can't be read as JSON" if (folder / "config.json").exists() else "is missing"
    return Problem(
        "model.no_config",
        f"{folder / 'config.json'} {found}; it says what kind of model the folder holds",
        hint="give the folder that `hf download` printed, or download the model again",
    )


def _shards_missing(folder: Path, missing: list[str], shards: list[str]) -> Problem:
    if not shards:
        return Problem(
            "model.weights_missing",
            f"{folder / _INDEX} names no weight files; at least one is wanted",
            hint="download the model again: `hf download` continues where it stopped",
        )
    some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    return Problem(
        "model.weights_missing",
        f"{len(missing)} of the {len(shards)} weight files that {folder / _INDEX} names are "
        f"missing: {some}",
        hint="download the model again: `hf download` continues where it stopped",
    )


def _no_weights(folder: Path) -> Problem:
    return Problem(
        "model.weights_missing",
        f"{folder} holds no weights; *.safetensors files are wanted",
        hint="download the whole model, not its config alone: `hf download MODEL`",
    )


def _not_safetensors(file: Path) -> Problem:
    return Problem(
        "model.weights_broken",
        f"{file} is not a safetensors file; its first bytes are no header",
        hint="if it came with `git clone`, run `git lfs pull` there; else download it again",
    )


def _cut_short(file: Path, size: int, wanted: int) -> Problem:
    return Problem(
        "model.weights_broken",
        f"{file} is cut short: {size:,} bytes, and its header promises {wanted:,}",
        hint="download the model again: `hf download` continues where it stopped",
    )
