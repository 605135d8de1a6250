"""What is known of a model before it is loaded, and from where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from gemma_serve.errors import GemmaServeError, Problem
from gemma_serve.planning.model.catalogue import CatalogueEntry
from gemma_serve.planning.model.geometry import Geometry
from gemma_serve.planning.model.model_config import read_geometry
from gemma_serve.planning.model.parameters import parameter_count
from gemma_serve.planning.model.weights import HeaderTensor

Source = Literal["folder", "cache", "hub", "catalogue"]

# As safetensors writes them.
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class ModelFacts:
    """A model as its files describe it.

    `geometry` is None for a model that isn't a known Gemma. `tensors` are the headers of the
    weight files, empty where only the config is at hand; `weights_bytes` is their size as stored.
    `dtype` is the stored one ("bfloat16"); `quantization_config` is config.json's own. `entry` is
    the catalogue's, for a model that it lists.
    """

    model: str
    source: Source
    architecture: str | None = None
    model_type: str | None = None
    dtype: str | None = None
    quantization_config: Mapping[str, Any] | None = None
    geometry: Geometry | None = None
    tensors: tuple[HeaderTensor, ...] = ()
    weights_bytes: int | None = None
    entry: CatalogueEntry | None = None

    @property
    def quantization(self) -> str | None:
        """The method in which the weights are stored ("compressed-tensors"), if any."""
        return _text((self.quantization_config or {}).get("quant_method"))

    @property
    def parameters(self) -> int | None:
        """How many weights the model has; of a checkpoint that packs them, the catalogue's word."""
        if self.entry is not None and self.entry.parameters is not None:
            return self.entry.parameters
        if self.geometry is not None:
            return parameter_count(self.geometry)
        return sum(tensor.elements for tensor in self.tensors) or None

    @property
    def has_fp8_kv_cache(self) -> bool:
        """Whether the checkpoint asks for an fp8 KV cache, which vLLM's `auto` then takes.

        Source: vLLM's utils/torch_utils.py, get_kv_cache_quant_algo_string and its caller.
        """
        return bool((self.quantization_config or {}).get("kv_cache_scheme"))


@dataclass(frozen=True)
class FactsReading:
    """What an attempt to learn of a model gave: the facts, the problems, or both."""

    facts: ModelFacts | None = None
    problems: tuple[Problem, ...] = ()

    def adding(self, *problems: Problem) -> FactsReading:
        """The same reading with more problems."""
        return replace(self, problems=(*self.problems, *problems))


def facts_from_config(
    model: str,
    config: Mapping[str, Any],
    *,
    source: Source,
    tensors: Iterable[HeaderTensor] = (),
    entry: CatalogueEntry | None = None,
) -> FactsReading:
    """Read a `config.json`, and the headers of the weight files where they are at hand.

    A config that describes no Gemma that we know gives facts without geometry, and a warning.
    """
    tensors = tuple(tensors)
    text = config.get("text_config")
    places: tuple[Mapping[str, Any], ...] = (config, text if isinstance(text, Mapping) else {})
    architectures = config.get("architectures")
    quantization = config.get("quantization_config")
    facts = ModelFacts(
        model=model,
        source=source,
        architecture=_text(architectures[0])
        if isinstance(architectures, list | tuple) and architectures
        else None,
        model_type=_text(config.get("model_type")),
        # transformers 5 writes `dtype`, older ones `torch_dtype`.
        dtype=_first(places, "dtype") or _first(places, "torch_dtype") or _commonest(tensors),
        quantization_config=quantization if isinstance(quantization, Mapping) else None,
        tensors=tensors,
        weights_bytes=sum(tensor.size_bytes for tensor in tensors) if tensors else None,
        entry=entry,
    )
    try:
        return FactsReading(replace(facts, geometry=read_geometry(config)))
    except GemmaServeError as error:
        warnings = tuple(replace(problem, blocking=False) for problem in error.problems)
        return FactsReading(facts, warnings)


def _commonest(tensors: Iterable[HeaderTensor]) -> str | None:
    """The dtype that holds most of the weights, for a config that names none."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size_bytes
    return DTYPE_NAMES.get(max(sizes, key=lambda name: sizes[name])) if sizes else None


def _first(places: Iterable[Mapping[str, Any]], key: str) -> str | None:
    return next((text for place in places if (text := _text(place.get(key)))), None)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
