"""The figures about memory that no formula gives, and what each release of vLLM counts.

The values are data (`data/runtime_constants.yaml`); this is their shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MIB = 2**20


@dataclass(frozen=True)
class RuntimeRules:
    """What a release of vLLM, from `since` on, counts as used before it sizes the KV cache.

    `peak_margin` is the share of the activation peak that the formulas leave open: small where
    the tensors of the peak were traced, larger where only the sources tell.
    """

    since: tuple[int, int]
    counts_tables: bool
    estimates_graphs: bool
    profiles_encoder: bool
    profiles_sampling_parameters: bool
    experts_and_pooling_on_v1: bool
    peak_margin: float


@dataclass(frozen=True)
class Estimate:
    """A measured figure and how far it may be off, in bytes."""

    bytes: int
    margin_bytes: int


@dataclass(frozen=True)
class GpuConstants:
    """What depends on the GPU's class alone: memory of CUDA itself and of cuBLAS, in bytes, and
    the share of the CUDA graphs' memory that is open there.
    """

    context: Estimate
    non_torch: Estimate
    cublas_workspace: Estimate
    multiprocessors: int
    graph_margin: float


@dataclass(frozen=True)
class RuntimeConstants:
    """The figures that no formula gives, and what each release counts, oldest first."""

    releases: tuple[RuntimeRules, ...]
    gpus: Mapping[tuple[int, int], GpuConstants]
    other_gpu: GpuConstants
    graph_piece_bytes: int
    graph_layer_bytes: int
    graph_pools_bytes: int
    tensor_parallel: Estimate
    cpu_server: Estimate
    cpu_worker: Estimate
    flashinfer_workspace: int
    reasoned_margin: float

    def rules(self, release: tuple[int, int]) -> RuntimeRules:
        """The rules of a release of vLLM, like (0, 32); the oldest known for an older one."""
        older = [rules for rules in self.releases if rules.since <= release]
        return older[-1] if older else self.releases[0]

    def gpu(self, compute_capability: tuple[int, int] | None) -> GpuConstants:
        """The figures of a class of GPUs; wider ones for a class that wasn't measured."""
        return self.gpus.get(compute_capability or (0, 0), self.other_gpu)


def parse_runtime_constants(data: Mapping[str, Any]) -> RuntimeConstants:
    """The constants from the mapping of the data file. Raises KeyError or TypeError for a
    mapping that lacks a figure or names one that doesn't exist.
    """
    releases: list[RuntimeRules] = []
    known: dict[str, Any] = {}
    for entry in data["releases"]:
        change = dict(entry)
        since = _version(change.pop("since"))
        known = {**known, **change}
        releases.append(RuntimeRules(since=since, **known))
    gpus = {name: _gpu(entry) for name, entry in data["gpus"].items()}
    other = gpus.pop("other")
    measured = data["measured"]
    return RuntimeConstants(
        releases=tuple(releases),
        gpus={_version(name): gpu for name, gpu in gpus.items()},
        other_gpu=other,
        graph_piece_bytes=measured["graph_piece_kib"] * 1024,
        graph_layer_bytes=measured["graph_layer_kib"] * 1024,
        graph_pools_bytes=measured["graph_pools_mib"] * MIB,
        tensor_parallel=_estimate(measured["tensor_parallel_mib"]),
        cpu_server=_estimate(data["cpu_server_mib"]),
        cpu_worker=_estimate(data["cpu_worker_mib"]),
        flashinfer_workspace=measured["flashinfer_workspace_mib"] * MIB,
        reasoned_margin=measured["reasoned_margin"],
    )


def _version(text: Any) -> tuple[int, int]:
    major, minor = str(text).split(".")
    return int(major), int(minor)


def _gpu(entry: Mapping[str, Any]) -> GpuConstants:
    return GpuConstants(
        context=_estimate(entry["context_mib"]),
        non_torch=_estimate(entry["non_torch_mib"]),
        cublas_workspace=_estimate(entry["cublas_workspace_mib"]),
        multiprocessors=int(entry["multiprocessors"]),
        graph_margin=float(entry["graph_margin"]),
    )


def _estimate(entry: Mapping[str, float]) -> Estimate:
    return Estimate(int(entry["value"] * MIB), int(entry["margin"] * MIB))
