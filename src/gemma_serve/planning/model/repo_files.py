"""Which files of a model's repository vLLM needs, and which are the same weights once more."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

INDEX = "model.safetensors.index.json"

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLE = re.compile(r"pytorch_model[^/]*\.bin")
# Configuration, tokenizer and chat template, under all the names that they have had.
_SETTINGS = (".json", ".jinja", ".model", ".txt", ".tiktoken")
# Sentence-transformers keeps the layers behind an embedding model in numbered folders.
_PARTS_IN_FOLDERS = re.compile(
    r"\d+_[A-Za-z]+/(config\.json|model\.safetensors)|additional_chat_templates/[^/]+\.jinja"
)


@dataclass(frozen=True)
class RepoFile:
    """One file of a repository as the Hub lists it.

    `checksum` in hexadecimal is the SHA-256 of the content (64 digits) or git's SHA-1 of the blob
    (40 digits); None where none is known.
    """

    name: str
    size_bytes: int
    checksum: str | None = None


def files_to_serve(listing: Sequence[RepoFile]) -> tuple[RepoFile, ...]:
    """The files of `listing` that vLLM reads, the small ones first, in a stable order.

    Of the weights only one format, safetensors if there is any, and no copy in the authors' own
    layout (`consolidated.*`, `original/`).
    """
    weights = set(weight_names([file.name for file in listing]))
    other_formats_index = weights and not any(_PICKLE.fullmatch(name) for name in weights)
    chosen = [
        file
        for file in listing
        if file.name in weights
        or (
            _is_setting(file.name)
            and not (other_formats_index and file.name == "pytorch_model.bin.index.json")
        )
    ]
    return tuple(sorted(chosen, key=lambda file: (file.name in weights, file.name)))


def weight_names(names: Collection[str]) -> list[str]:
    """The weight files among `names` that vLLM loads, in their order."""
    tensors = [
        name
        for name in names
        if name.endswith(".safetensors") and "/" not in name and not name.startswith("consolidated")
    ]
    if INDEX in names:
        return [name for name in tensors if _SHARD.fullmatch(name)] or tensors
    return tensors or [name for name in names if _PICKLE.fullmatch(name)]


def with_shards_of_index(
    chosen: Sequence[RepoFile], listing: Sequence[RepoFile], shards: Collection[str] | None
) -> tuple[RepoFile, ...]:
    """`chosen` with just those weights that the index names, as far as the Hub lists them.

    Without an index (None) it stays as it is.
    """
    if shards is None:
        return tuple(chosen)
    weights = set(weight_names([file.name for file in listing]))
    kept = [file for file in chosen if file.name not in weights]
    named = [file for file in listing if file.name in shards and is_inside(file.name)]
    return (*kept, *sorted(named, key=lambda file: file.name))


def is_inside(name: str) -> bool:
    """Whether a file of this name is in the folder that it is put in, and not beside it."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _is_setting(name: str) -> bool:
    if "/" in name:
        return _PARTS_IN_FOLDERS.fullmatch(name) is not None
    return name.endswith(_SETTINGS)
