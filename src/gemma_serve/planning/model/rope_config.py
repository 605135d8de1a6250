"""The tables of rotary positions that a config.json asks for, as vLLM builds them.

Source: transformers' modeling_rope_utils.py and the configuration files of each Gemma for what
the keys mean, old ones (`rope_theta`, `rope_scaling`, `rope_local_base_freq`) and new ones
(`rope_parameters`); vLLM's layers/rotary_embedding/ for the tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gemma_serve.planning.model.config_reader import LARGEST_SIZE, ConfigReader
from gemma_serve.planning.model.geometry import Rope

FULL = "full_attention"
SLIDING = "sliding_attention"

# Scalings of which `max_position_embeddings` already is the scaled length (vLLM's config/model.py).
_LENGTH_IS_SCALED = frozenset({"su", "longrope", "llama3", "yarn"})

_GEMMA_4_ROPE: Mapping[str, Mapping[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}

RopeParameters = Mapping[str, Any]


def flat_rope(text: ConfigReader) -> dict[str, RopeParameters]:
    """One set of parameters for all layers (Gemma 1 and 2, VaultGemma)."""
    given = text.section("rope_scaling") or text.section("rope_parameters")
    parameters = dict(given.values) if given else {}
    parameters.setdefault("rope_theta", text.number("rope_theta"))
    if text.has("partial_rotary_factor"):
        parameters.setdefault("partial_rotary_factor", text.get("partial_rotary_factor"))
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    return {FULL: parameters, SLIDING: parameters}


def local_and_global_rope(text: ConfigReader) -> dict[str, RopeParameters]:
    """Parameters of their own for sliding and for full layers (Gemma 3 and 3n)."""
    given = text.section("rope_parameters")
    nested = {kind: _nested(given, kind) for kind in (SLIDING, FULL)}
    scaling = text.section("rope_scaling")
    if scaling:
        nested[FULL] |= scaling.values
    for parameters in nested.values():
        parameters.setdefault("rope_type", parameters.get("type", "default"))
    nested[FULL].setdefault("rope_theta", text.number("rope_theta"))
    nested[SLIDING].setdefault("rope_theta", text.number("rope_local_base_freq"))
    return {SLIDING: nested[SLIDING], FULL: nested[FULL]}


def gemma4_rope(text: ConfigReader) -> dict[str, RopeParameters]:
    """Gemma 4's parameters, which have no older form."""
    given = text.section("rope_parameters")
    if given is None:
        return dict(_GEMMA_4_ROPE)
    if FULL in given.values or SLIDING in given.values:
        return {kind: _nested(given, kind) for kind in (SLIDING, FULL)}
    return {FULL: given.values, SLIDING: {**given.values, "rope_theta": 10_000.0}}


def length_factor(parameters: Mapping[str, RopeParameters]) -> float:
    """By what vLLM multiplies `max_position_embeddings` for the longest context.

    Not asked for Gemma 3, whose length is a scaled one already.
    """
    factor = 1.0
    for kind, values in parameters.items():
        reader = ConfigReader(values, f"rope_parameters.{kind}.", {"factor": factor})
        if values.get("rope_type") not in _LENGTH_IS_SCALED and reader.has("factor"):
            factor = reader.number("factor")
    return factor


def rope_table(parameters: RopeParameters, *, head_size: int, positions: int) -> Rope:
    """The table for layers of one head size.

    Raises:
        ModelConfigError: the scaling is unknown, or its values make no sense.
    """
    reader = ConfigReader(parameters, "rope_parameters.", {"partial_rotary_factor": 1.0})
    kind = parameters.get("rope_type", "default")
    part = reader.number("partial_rotary_factor")
    if part > 1:
        raise reader.error("partial_rotary_factor", "a number up to 1")
    rotary = int(head_size * part)
    return Rope(
        key=(head_size, rotary, positions, *((k, _comparable(parameters[k])) for k in parameters)),
        positions=_table_positions(reader, kind, positions),
        # Cosines and sines, of half of the head each.
        rotary_size=2 * (head_size // 2 if kind == "proportional" else -(-rotary // 2)),
    )


def _table_positions(reader: ConfigReader, kind: Any, positions: int) -> int:
    if kind in ("default", "proportional", "dynamic", "llama3"):
        return positions
    original = reader.with_defaults({"original_max_position_embeddings": positions})
    if kind == "linear":
        length = positions * reader.number("factor")
    elif kind == "yarn":
        length = original.whole("original_max_position_embeddings") * reader.number("factor")
    else:
        raise reader.error("rope_type", "default, proportional, linear, dynamic, yarn or llama3")
    if length > LARGEST_SIZE:
        raise reader.error("factor", "a smaller number")
    return math.ceil(length)


def _nested(given: ConfigReader | None, kind: str) -> dict[str, Any]:
    section = given.section(kind) if given else None
    return dict(section.values) if section else {}


def _comparable(value: Any) -> object:
    """As vLLM compares it: 10000 and 10000.0 are one."""
    return value if isinstance(value, int | float | str) else repr(value)
