"""The public Gemmas, known by heart for when nobody can be asked, and before anything is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Variant = Literal["base", "it"]
SystemRole = Literal["refused", "folded", "native", "none"]
Modality = Literal["text", "image", "video", "audio"]


@dataclass(frozen=True)
class CatalogueEntry:
    """One repository of the Hub.

    `config` holds the keys of its config.json from which memory follows, as published; for a
    model without `shape` only what kind it is. `parameters` is right to a percent, None where not
    known. `chat` says whether there is a chat template, and `system_role` what that does with a
    system message: refuse it, fold it into the first user turn, take it, or have no place for it.
    `min_vllm` is the first vLLM with the architecture. The parsers are those that vLLM has for
    the model, None for models that call no tools or don't reason aloud. `dtype` is the stored
    one. `reason` says why vLLM does not serve the model; it is empty for one that is `served`.
    """

    id: str
    family: str
    license: str
    gated: bool
    variant: Variant = "base"
    chat: bool = False
    system_role: SystemRole = "none"
    min_vllm: str | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    dtype: str = "bfloat16"
    modalities: tuple[Modality, ...] = ("text",)
    pooling: bool = False
    served: bool = True
    reason: str = ""
    note: str = ""
    shape: str | None = None
    parameters: int | None = None
    # Not hashed, as a mapping can't be.
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def architecture(self) -> str | None:
        """The class that config.json names ("Gemma3ForConditionalGeneration")."""
        return next(iter(self.config.get("architectures", ())), None)

    @property
    def quantization_config(self) -> Mapping[str, Any] | None:
        """config.json's own, for a checkpoint that is stored quantized."""
        return self.config.get("quantization_config")


def read_catalogue(data: Mapping[str, Any]) -> tuple[CatalogueEntry, ...]:
    """The models of `data/catalogue.yaml`, in its order, each with its family's keys.

    Raises KeyError for a shape or quantization that the file doesn't define, or a needed key that
    is missing, and TypeError for a key that isn't known.
    """
    return tuple(
        _entry({**family, **model}, data)
        for family in data["families"]
        for model in family["models"]
    )


def _entry(given: dict[str, Any], data: Mapping[str, Any]) -> CatalogueEntry:
    del given["models"]
    given["modalities"] = tuple(given.get("modalities", ("text",)))
    given.setdefault("chat", given.get("variant") == "it")
    if not given["chat"]:
        for key in ("system_role", "tool_call_parser", "reasoning_parser"):
            given.pop(key, None)
    config = _config(given, data)
    parameters = data["parameters"][given["shape"]] if given.get("shape") else None
    return CatalogueEntry(**given, parameters=parameters, config=config)


def _config(given: dict[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says; takes the keys that only it needs out of `given`."""
    architecture, model_type = given.pop("architecture", None), given.pop("model_type", None)
    quantization = given.pop("quantization", None)
    config: dict[str, Any] = {}
    if given.get("shape"):
        config = dict(data["shapes"][given["shape"]])
        # transformers 5 writes `dtype`, older ones `torch_dtype`.
        config["dtype" if "dtype" in config else "torch_dtype"] = given.get("dtype", "bfloat16")
    elif architecture is not None:
        config = {"architectures": [architecture], "model_type": model_type}
    if quantization is not None:
        config["quantization_config"] = data["quantizations"][quantization]
    return config


def nearest_model(name: str, known: Iterable[str]) -> str | None:
    """The known model that a mistyped `name` most likely meant, or None.

    Names are compared without case, and without the organisation, which people leave out.
    """
    by_short_name = {_short(model): model for model in known}
    # Gemma 3's names end in -it or -pt, which people leave out.
    for ending in ("-it", "-pt"):
        if _short(name) + ending in by_short_name:
            return by_short_name[_short(name) + ending]
    close = difflib.get_close_matches(_short(name), by_short_name, n=1, cutoff=0.8)
    return by_short_name[close[0]] if close else None


def _short(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower()
