"""What is known of a model's checkpoint before it is loaded: how large, which Gemma, which dtype.

The exact memory plan (activations, KV cache, the longest context) starts from the same facts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gemma_serve.errors import Problem
from gemma_serve.planning.gpus import Gpu

Source = Literal["folder", "cache", "hub", "catalogue"]
SystemRole = Literal["refused", "folded", "native"]

# vLLM refuses float16 for these ("Numerical instability").
REFUSES_FLOAT16 = frozenset({"gemma2", "gemma3", "gemma3_text"})

# As safetensors writes them.
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ALIASES = {"half": "float16", "float": "float32"}


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights as stored, and `source`, where the figures came from.

    `weights_bytes` is None where nobody could tell; `approximate` figures are right to a few
    percent. `dtype` is the stored one ("bfloat16"), `quantization` its method ("fp8") if any.
    """

    model: str
    source: Source
    weights_bytes: int | None = None
    architecture: str | None = None
    model_type: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    max_position_embeddings: int | None = None
    approximate: bool = False


@dataclass(frozen=True)
class CheckpointReading:
    """What an attempt to read a checkpoint gave: the facts, the problems, or both."""

    checkpoint: Checkpoint | None = None
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class CatalogueEntry:
    """A public Gemma, known by heart for when nobody can be asked.

    `weights_bytes` counts the whole checkpoint in bfloat16. `system_role` says what the model's
    chat template does with a system message: refuse it, fold it into the first user turn, or
    take it. Without `chat` there is no chat template at all.
    """

    id: str
    generation: str
    model_type: str
    weights_bytes: int
    approximate: bool
    max_position_embeddings: int
    system_role: SystemRole
    chat: bool

    def checkpoint(self) -> Checkpoint:
        """The entry as a checkpoint's facts."""
        return Checkpoint(
            model=self.id,
            source="catalogue",
            weights_bytes=self.weights_bytes,
            model_type=self.model_type,
            dtype="bfloat16",
            max_position_embeddings=self.max_position_embeddings,
            approximate=self.approximate,
        )


def checkpoint_from_config(
    model: str, config: Mapping[str, Any], *, source: Source, weights_bytes: int | None
) -> Checkpoint:
    """Read a `config.json`; a multimodal Gemma keeps some of it under `text_config`."""
    text = config.get("text_config")
    both: tuple[Mapping[str, Any], ...] = (config, text if isinstance(text, Mapping) else {})
    architectures = config.get("architectures") or [None]
    quantization = config.get("quantization_config")
    positions = _first(both, "max_position_embeddings")
    return Checkpoint(
        model=model,
        source=source,
        weights_bytes=weights_bytes,
        architecture=_text(architectures[0]),
        model_type=_text(config.get("model_type")),
        # transformers 5 writes `dtype`, older ones `torch_dtype`.
        dtype=_text(_first(both, "dtype") or _first(both, "torch_dtype")),
        quantization=_text(quantization.get("quant_method"))
        if isinstance(quantization, Mapping)
        else None,
        max_position_embeddings=positions if isinstance(positions, int) else None,
    )


def gemma_problem(checkpoint: Checkpoint) -> Problem | None:
    """A warning when the checkpoint says that it is something else than a Gemma."""
    kind = checkpoint.model_type or ""
    architecture = checkpoint.architecture or ""
    if not (kind or architecture):
        return None
    if kind.startswith("gemma") or architecture.startswith("Gemma"):
        return None
    return Problem(
        "model.not_gemma",
        f"{checkpoint.model} is a `{kind or architecture}`; "
        "gemma-serve knows Gemma, whose model types start with `gemma`",
        hint="vLLM may serve it all the same, but no check here was made for it",
        blocking=False,
    )


def engine_dtype(dtype: str, checkpoint: Checkpoint | None, gpus: Sequence[Gpu]) -> str:
    """The dtype that vLLM will compute in when told `dtype`; "auto" is resolved as vLLM does.

    Auto keeps 16 bits as they are, turns float32 into 16 bits, and falls back where a card
    can't do bfloat16: to float16, or to float32 for a model that refuses float16.
    """
    if dtype != "auto":
        return _ALIASES.get(dtype, dtype)
    stored = (checkpoint.dtype if checkpoint else None) or "bfloat16"
    refuses = checkpoint is not None and checkpoint.model_type in REFUSES_FLOAT16
    preferred = "float32" if refuses else "float16"
    if all(gpu.supports_bf16 for gpu in gpus):
        preferred = "bfloat16"
    if stored == "float16" and not refuses:
        return stored
    return preferred


def loaded_bytes(checkpoint: Checkpoint, dtype: str) -> int | None:
    """How large the weights are once loaded in `dtype`; quantized ones stay as they are."""
    stored = _DTYPE_BYTES.get(checkpoint.dtype or "")
    loaded = _DTYPE_BYTES.get(dtype)
    if checkpoint.weights_bytes is None or checkpoint.quantization or not stored or not loaded:
        return checkpoint.weights_bytes
    return checkpoint.weights_bytes * loaded // stored


def nearest_model(name: str, known: Iterable[str]) -> str | None:
    """The known model that a mistyped `name` most likely meant, or None.

    Names are compared without case, and without the organisation, which people leave out.
    """
    by_short_name = {_short(model): model for model in known}
    close = difflib.get_close_matches(_short(name), by_short_name, n=1, cutoff=0.8)
    return by_short_name[close[0]] if close else None


def _short(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower()


def _first(places: Iterable[Mapping[str, Any]], key: str) -> Any:
    return next((place[key] for place in places if place.get(key) is not None), None)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
