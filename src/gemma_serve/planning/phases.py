"""The phases of an engine's start, and how long each may take."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# In the order of a start.
PHASES: tuple[str, ...] = (
    "imports",
    "configuration",
    "engine core",
    "weights",
    "compilation",
    "KV cache",
    "CUDA graphs",
    "warm-up",
    "API server",
    "first token",
)

# Seconds since the phase began or last made progress. Weights may come from a slow disk one
# shard at a time; a warm-up compiles kernels for minutes and says nothing.
PHASE_TIMEOUTS_S: Mapping[str, float] = MappingProxyType(
    {
        "imports": 300.0,
        "configuration": 300.0,
        "engine core": 300.0,
        "weights": 3600.0,
        "compilation": 1800.0,
        "KV cache": 600.0,
        "CUDA graphs": 1200.0,
        "warm-up": 1800.0,
        "API server": 120.0,
        "first token": 600.0,
    }
)
