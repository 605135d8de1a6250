"""What a vLLM server reports at `/metrics`: its load and its token counters.

prometheus_client is imported where it is used: no other command should wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from gemma_serve.adapters.openai_answers import EndpointError, shorten
from gemma_serve.adapters.openai_api import read_text

_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_USAGE = "vllm:kv_cache_usage_perc"
_USAGE_BEFORE = "vllm:gpu_cache_usage_perc"  # its older name
_PROMPT = "vllm:prompt_tokens_total"
_GENERATION = "vllm:generation_tokens_total"
_QUERIES = "vllm:prefix_cache_queries_total"
_HITS = "vllm:prefix_cache_hits_total"
_NUMBERS = (_RUNNING, _WAITING, _USAGE, _USAGE_BEFORE, _PROMPT, _GENERATION, _QUERIES, _HITS)
_CONFIG = "vllm:cache_config_info"


@dataclass(frozen=True)
class CacheConfig:
    """The KV cache as the engine set it up: tokens in a block, and whether prefixes are kept."""

    block_size: int
    prefix_caching: bool


@dataclass(frozen=True)
class EngineMetrics:
    """One reading, over all engines of the server; a series that it lacks is 0.

    `kv_cache_usage` is that of the fullest engine, from 0 to 1. The tokens are counted since
    the start, and so is `prefix_cache_hit_rate`, from 0 to 1: the share of prompt tokens found
    in the prefix cache, None where none was looked up.
    """

    requests_running: int
    requests_waiting: int
    kv_cache_usage: float
    prompt_tokens: float
    generation_tokens: float
    prefix_cache_hit_rate: float | None
    prefix_cache_hits: float = 0.0
    cache: CacheConfig | None = None


def read_metrics(url: str, *, timeout_s: float = 2.0) -> EngineMetrics:
    """What the server at `url` reports now.

    Raises:
        EndpointError: it can't be had, can't be read, or holds none of vLLM's series.
    """
    return parse_metrics(read_text(url, "/metrics", timeout_s=timeout_s))


def parse_metrics(text: str) -> EngineMetrics:
    """Read a Prometheus exposition.

    Raises:
        EndpointError: it is none, or it holds none of vLLM's series.
    """
    samples = _samples(text)
    values = {name: [s.value for s in samples if s.name == name] for name in _NUMBERS}
    if not any(values.values()):
        raise EndpointError(
            "the metrics hold none of vLLM's series",
            kind="invalid",
            hint="is this vLLM's own address? An engine with --disable-log-stats reports none",
        )
    queries = sum(values[_QUERIES])
    return EngineMetrics(
        requests_running=int(sum(values[_RUNNING])),
        requests_waiting=int(sum(values[_WAITING])),
        kv_cache_usage=max(values[_USAGE] or values[_USAGE_BEFORE], default=0.0),
        prompt_tokens=sum(values[_PROMPT]),
        generation_tokens=sum(values[_GENERATION]),
        prefix_cache_hit_rate=sum(values[_HITS]) / queries if queries else None,
        prefix_cache_hits=sum(values[_HITS]),
        cache=_cache_config(samples),
    )


@dataclass(frozen=True)
class _Sample:
    name: str
    labels: Mapping[str, str]
    value: float


def _samples(text: str) -> Sequence[_Sample]:
    """The samples of the wanted series, one for each engine and set of labels."""
    from prometheus_client.parser import text_string_to_metric_families

    wanted = {*_NUMBERS, _CONFIG}
    # Of 650 lines these are a few; the parser takes 30 ms for all, in which no event is read.
    lines = [line for line in text.splitlines() if line.startswith((*wanted, "# EOF"))]
    read = "\n".join(lines) + "\n" if lines else text
    try:
        return [
            _Sample(sample.name, sample.labels, _finite(sample.value))
            for family in text_string_to_metric_families(read)
            for sample in family.samples
            if sample.name in wanted
        ]
    except (ValueError, IndexError, OverflowError) as error:  # IndexError: older parsers
        message = f"the metrics can't be read: {shorten(str(error), 80)}"
        raise EndpointError(message, kind="invalid") from None


def _cache_config(samples: Sequence[_Sample]) -> CacheConfig | None:
    for sample in samples:
        size = sample.labels.get("block_size", "")
        if sample.name == _CONFIG and size.isdigit():
            return CacheConfig(int(size), sample.labels.get("enable_prefix_caching") == "True")
    return None


def _finite(value: float) -> float:
    if not isfinite(value):
        raise ValueError(f"{value} is no count")
    return value
