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
_WANTED = (_RUNNING, _WAITING, _USAGE, _USAGE_BEFORE, _PROMPT, _GENERATION, _QUERIES, _HITS)


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
    values = _values(text)
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
    )


def _values(text: str) -> Mapping[str, Sequence[float]]:
    """The values of each wanted series, one for each engine; none where it is absent."""
    from prometheus_client.parser import text_string_to_metric_families

    values: dict[str, list[float]] = {name: [] for name in _WANTED}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name in values:
                    values[sample.name].append(_finite(sample.value))
    except (ValueError, IndexError, OverflowError) as error:  # IndexError: older parsers
        message = f"the metrics can't be read: {shorten(str(error), 80)}"
        raise EndpointError(message, kind="invalid") from None
    return values


def _finite(value: float) -> float:
    if not isfinite(value):
        raise ValueError(f"{value} is no count")
    return value
