"""What to run: everything that was left open, decided so that it fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gemma_serve.errors import Problem
from gemma_serve.planning.memory.batching import (
    Batching,
    Device,
    default_batching,
    largest_item,
)
from gemma_serve.planning.memory.budget import judge
from gemma_serve.planning.memory.engine_rules import EngineRules
from gemma_serve.planning.memory.fit import DeviceMemory, EngineSettings, Fit
from gemma_serve.planning.memory.request import EngineKnowledge, Machine, Wishes
from gemma_serve.planning.memory.tensor_parallel import illegal_tensor_parallel_reason
from gemma_serve.planning.model.dtypes import ChosenDtype, choose_dtype, has_bfloat16
from gemma_serve.planning.model.facts import ModelFacts

# A context that most uses can live with: the fewest GPUs that reach it are taken.
DECENT_MODEL_LEN = 8192
# With less than this, smaller batches are tried first.
_USEFUL_MODEL_LEN = 2048
# Batches to fall back on where the default one leaves no room, as (sequences, tokens).
_SMALLER_BATCHES = ((256, 2048), (64, 2048), (16, 1024))
_LEN_STEP = 256
# With less than this nobody is served, though vLLM would start.
_LEAST_MODEL_LEN = 512
# Of a model whose own length nobody knows.
_UNKNOWN_MODEL_LEN = 4096


@dataclass(frozen=True)
class Decision:
    """The plan: every setting with a value, judged.

    `reasons` says for a setting that was left open why it has its value. `fit` is None where
    nobody knows how large the weights are. `problems` that are blocking stand against a start.
    `gpus_suffice` is False where there are fewer GPUs than were asked for, or they can't compute
    in the dtype. `left_open` names settings that stay the engine's choice, since nobody knows the
    model; the plan's values of them are guesses.
    """

    fit: Fit | None
    reasons: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    gpus_suffice: bool = True
    left_open: frozenset[str] = frozenset()

    @property
    def fits(self) -> bool:
        """Whether the engine would start: there is room, and vLLM refuses nothing of it."""
        refused = any(problem.blocking for problem in self.problems) or not self.gpus_suffice
        return self.fit is not None and self.fit.fits and not refused


@dataclass(frozen=True)
class _Candidate:
    """One way to run it.

    `shrunk` says whether the batch was made smaller to make room, `raised` whether it was made
    larger than vLLM's default, with which vLLM would not start.
    """

    fit: Fit
    batching: Batching | None
    shrunk: bool = False
    raised: bool = False


def decide(
    facts: ModelFacts, wishes: Wishes, machine: Machine, knowledge: EngineKnowledge
) -> Decision:
    """Choose what was left open: the fewest GPUs, the longest context, the default batch.

    What was fixed stays as it is, whether it fits or not.
    """
    usual = list(_each_size(facts, wishes, machine, knowledge))
    if not usual:
        return Decision(None)
    best = _first(usual, facts, wishes, DECENT_MODEL_LEN) or _longest(usual, facts, wishes)
    if best is None:
        smaller = list(_smaller(usual, facts, wishes, machine, knowledge))
        best = _first(smaller, facts, wishes, _USEFUL_MODEL_LEN)
        best = best or _longest([*usual, *smaller], facts, wishes, least=1) or usual[-1]
    return Decision(
        best.fit,
        _reasons(best, facts, wishes, machine),
        best.batching.problems if best.batching else (),
        gpus_suffice=_gpus_suffice(best.fit.settings, machine),
        left_open=_left_open(facts, wishes),
    )


def own_model_len(facts: ModelFacts) -> int:
    """The longest context that the model was made for, in tokens."""
    return facts.geometry.max_model_len if facts.geometry else _UNKNOWN_MODEL_LEN


def legal_sizes(facts: ModelFacts, most_gpus: int) -> tuple[int, ...]:
    """The tensor parallel sizes that vLLM accepts for the model, up to `most_gpus`."""
    geometry = facts.geometry
    if geometry is None:
        return tuple(1 << power for power in range(most_gpus.bit_length()))
    # No head can be split, so there are no more parts than heads.
    sizes = range(1, min(most_gpus, geometry.query_heads) + 1)
    return tuple(n for n in sizes if illegal_tensor_parallel_reason(geometry, n) is None)


def least_batch(facts: ModelFacts, wishes: Wishes, knowledge: EngineKnowledge) -> int:
    """The fewest tokens of a batch that vLLM accepts: a whole image, one of each request."""
    item = None
    if facts.geometry is not None:
        item = largest_item(facts.geometry, knowledge.rules, wishes.text_only)
    return max(wishes.max_num_seqs or 0, item[0] if item else 0)


def _each_size(
    facts: ModelFacts, wishes: Wishes, machine: Machine, knowledge: EngineKnowledge
) -> Iterator[_Candidate]:
    """The wishes on ever more GPUs, with vLLM's default batch, until a decent context fits."""
    sizes: Sequence[int] = legal_sizes(facts, max(1, machine.most_gpus))
    if wishes.tensor_parallel_size is not None:
        sizes = (wishes.tensor_parallel_size,)
    for size in sizes:
        found = _candidate(facts, wishes, size, machine.device(size), knowledge)
        if found is not None:
            yield found
            if _reaches(found, facts, wishes, DECENT_MODEL_LEN):
                return


def _smaller(
    usual: Sequence[_Candidate],
    facts: ModelFacts,
    wishes: Wishes,
    machine: Machine,
    knowledge: EngineKnowledge,
) -> Iterator[_Candidate]:
    """The same on as many GPUs with smaller batches, where the batch was left open."""
    for candidate in usual:
        size = candidate.fit.settings.tensor_parallel_size
        least = least_batch(facts, wishes, knowledge)
        for batch in _smaller_batches(candidate, wishes, least):
            found = _candidate(facts, batch, size, machine.device(size), knowledge)
            if found is not None:
                yield replace(found, shrunk=True)


def _smaller_batches(usual: _Candidate, wishes: Wishes, least_tokens: int) -> Iterator[Wishes]:
    settings = usual.fit.settings
    for sequences, tokens in _SMALLER_BATCHES:
        sequences = wishes.max_num_seqs or min(sequences, settings.max_num_seqs)
        tokens = max(least_tokens, sequences, min(tokens, settings.max_num_batched_tokens))
        tokens = wishes.max_num_batched_tokens or tokens
        smaller = replace(wishes, max_num_seqs=sequences, max_num_batched_tokens=tokens)
        if (sequences, tokens) != (settings.max_num_seqs, settings.max_num_batched_tokens):
            yield smaller


def _candidate(
    facts: ModelFacts,
    wishes: Wishes,
    size: int,
    device: DeviceMemory,
    knowledge: EngineKnowledge,
) -> _Candidate | None:
    """The wishes on so many GPUs, with the longest context where none was fixed."""
    length = wishes.max_model_len or own_model_len(facts)
    first = _at_length(facts, wishes, size, length, device, knowledge)
    if first is None or wishes.max_model_len is not None or facts.geometry is None:
        return first
    longest = first.fit.longest_model_len
    if longest >= length or longest < min(length, _LEAST_MODEL_LEN):
        return first
    return _at_length(facts, wishes, size, _rounded(longest), device, knowledge)


def _rounded(length: int) -> int:
    """A length that people can read, and that leaves a little room."""
    return length // _LEN_STEP * _LEN_STEP if length >= 2 * _LEN_STEP else length


def _at_length(
    facts: ModelFacts,
    wishes: Wishes,
    size: int,
    length: int,
    device: DeviceMemory,
    knowledge: EngineKnowledge,
) -> _Candidate | None:
    batching = _batching(facts, wishes, size, length, device, knowledge.rules)
    least = least_batch(facts, wishes, knowledge)
    raised = wishes.max_num_batched_tokens is None and batching.max_num_batched_tokens < least
    if raised:
        larger = replace(wishes, max_num_batched_tokens=least)
        batching = _batching(facts, larger, size, length, device, knowledge.rules)
    settings = EngineSettings(
        tensor_parallel_size=size,
        dtype=_dtype(facts, wishes, device).dtype,
        quantization=wishes.quantization,
        kv_cache_dtype=wishes.kv_cache_dtype,
        max_model_len=length,
        max_num_seqs=batching.max_num_seqs,
        max_num_batched_tokens=batching.max_num_batched_tokens,
        gpu_memory_utilization=wishes.gpu_memory_utilization,
        kv_cache_memory_bytes=wishes.kv_cache_memory_bytes,
        enforce_eager=wishes.enforce_eager,
        language_model_only=wishes.text_only,
        block_size=wishes.flags.block_size,
        attention_backend=wishes.flags.attention_backend,
        async_scheduling=batching.async_scheduling,
        hybrid_kv_cache_manager=wishes.flags.hybrid_kv_cache_manager,
        num_gpu_blocks_override=wishes.flags.num_gpu_blocks_override,
    )
    fit = judge(facts, settings, device, rules=knowledge.rules, constants=knowledge.constants)
    return None if fit is None else _Candidate(fit, batching, raised=raised)


def _dtype(facts: ModelFacts, wishes: Wishes, device: DeviceMemory) -> ChosenDtype:
    return choose_dtype(wishes.dtype, facts, device.compute_capability)


def _batching(
    facts: ModelFacts,
    wishes: Wishes,
    size: int,
    length: int,
    device: DeviceMemory,
    rules: EngineRules,
) -> Batching:
    if facts.geometry is None:
        return Batching(
            wishes.max_num_batched_tokens or 2048, wishes.max_num_seqs or 256, True, True
        )
    return default_batching(
        facts.geometry,
        rules=rules,
        device=Device(device.total_bytes, device.name, device.compute_capability),
        tensor_parallel_size=size,
        max_model_len=length,
        max_num_batched_tokens=wishes.max_num_batched_tokens,
        max_num_seqs=wishes.max_num_seqs,
        async_scheduling=wishes.flags.async_scheduling,
        chunked_prefill=wishes.flags.chunked_prefill,
        speculative_method=wishes.flags.speculative_method,
        throughput_mode=wishes.flags.throughput_mode,
        text_only=wishes.text_only,
    )


def _left_open(facts: ModelFacts, wishes: Wishes) -> frozenset[str]:
    if facts.geometry is not None:
        return frozenset()
    names = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")
    return frozenset(name for name in names if getattr(wishes, name) is None)


def _gpus_suffice(settings: EngineSettings, machine: Machine) -> bool:
    device = machine.device(settings.tensor_parallel_size)
    if device.kind == "cpu":
        return True
    computes = settings.dtype != "bfloat16" or has_bfloat16(device.compute_capability)
    return computes and settings.tensor_parallel_size <= machine.most_gpus


def _reaches(candidate: _Candidate, facts: ModelFacts, wishes: Wishes, length: int) -> bool:
    """Whether it starts with the length that was fixed, else with at least `length` tokens."""
    problems = candidate.batching.problems if candidate.batching else ()
    if not candidate.fit.fits or any(problem.blocking for problem in problems):
        return False
    if wishes.max_model_len is not None:
        return True
    return candidate.fit.settings.max_model_len >= min(own_model_len(facts), length)


def _first(
    candidates: Iterable[_Candidate], facts: ModelFacts, wishes: Wishes, length: int
) -> _Candidate | None:
    return next((c for c in candidates if _reaches(c, facts, wishes, length)), None)


def _longest(
    candidates: Iterable[_Candidate],
    facts: ModelFacts,
    wishes: Wishes,
    least: int = _USEFUL_MODEL_LEN,
) -> _Candidate | None:
    """The one with the longest context of those that have at least so many tokens."""
    useful = [c for c in candidates if _reaches(c, facts, wishes, least)]
    return max(useful, key=lambda c: c.fit.settings.max_model_len, default=None)


def _reasons(
    chosen: _Candidate, facts: ModelFacts, wishes: Wishes, machine: Machine
) -> dict[str, str]:
    """Why the settings that were left open have their values."""
    settings, batching = chosen.fit.settings, chosen.batching
    device = machine.device(settings.tensor_parallel_size)
    reasons: dict[str, Any] = {}
    if wishes.tensor_parallel_size is None:
        several = settings.tensor_parallel_size > 1
        reasons["tensor_parallel_size"] = (
            "the fewest GPUs on which it fits" if several else "one is enough"
        )
        if not chosen.fit.fits:
            reasons["tensor_parallel_size"] = "the most that can be used here"
    if wishes.max_model_len is None and facts.geometry is not None:
        whole = settings.max_model_len == own_model_len(facts)
        reasons["max_model_len"] = "the model's own" if whole else "the longest that fits"
    if batching is not None and facts.geometry is not None:
        usual = "vLLM's default here"
        if chosen.shrunk:
            usual = "smaller than vLLM's default, to make room"
        if wishes.max_num_seqs is None:
            reasons["max_num_seqs"] = usual
        if wishes.max_num_batched_tokens is None:
            raised = f"as many as one {batching.raised_for} may take"
            reasons["max_num_batched_tokens"] = raised if batching.raised_for else usual
            if chosen.raised:
                reasons["max_num_batched_tokens"] = "the fewest that vLLM accepts here"
    dtype = _dtype(facts, wishes, device)
    if dtype.reason:
        reasons["dtype"] = dtype.reason
    return reasons
