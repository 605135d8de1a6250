"""What else could be done: other settings, other GPUs, other Gemmas, each of them shown to fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

from gemma_serve.planning.hardware.gpu_cards import GpuCard
from gemma_serve.planning.memory.decision import (
    DECENT_MODEL_LEN,
    Decision,
    decide,
    least_batch,
    legal_sizes,
    own_model_len,
)
from gemma_serve.planning.memory.fit import DeviceMemory, Fit
from gemma_serve.planning.memory.request import EngineKnowledge, Machine, Wishes
from gemma_serve.planning.memory.verdict import online_fp8, plan_problems
from gemma_serve.planning.model.catalogue import CatalogueEntry
from gemma_serve.planning.model.facts import ModelFacts, facts_from_config

_MOST_OF_A_KIND = 3
_COUNTS = (2, 4, 8)
# Cards that differ by less are one size to a person who looks for one.
_SIZE_STEP = 2 * 2**30
# Shares of a GPU that may be said, in the order of their size. Which of them leave enough for the
# driver and the CUDA graphs is judged for each.
_SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.95)
# Parts of a CPU's free memory that a KV cache may be given.
_CPU_PARTS = (2, 4, 8, 16)

_MIB, _GIB = 2**20, 2**30

# Settings to change, and whether that alters the answers.
_Change = tuple[dict[str, Any], bool]


@dataclass(frozen=True)
class Alternative:
    """Something that fits: what to change, and what that gives.

    `settings` are values by the settings' names, None for one to leave out; `gpu` is a name for
    `--for-gpu`, `model` one for `--model`; what does not apply is empty. `costs_answers` marks
    changes that alter the answers.
    """

    kind: Literal["setting", "gpu", "model"]
    decision: Decision
    settings: Mapping[str, object] = field(default_factory=dict)
    gpu: str = ""
    model: str = ""
    costs_answers: bool = False

    @property
    def flags(self) -> str:
        """The change as it is typed: `--kv-cache-dtype fp8`."""
        spelled = [f"--for-gpu {self.gpu}"] if self.gpu else []
        spelled += [f"--model {self.model}"] if self.model else []
        spelled += [_flag(name, value) for name, value in self.settings.items()]
        return " ".join(spelled)


def other_settings(
    facts: ModelFacts, wishes: Wishes, machine: Machine, knowledge: EngineKnowledge
) -> tuple[Alternative, ...]:
    """Changes of the settings with which the model fits, those that keep the answers first."""
    freed = list(_freed(facts, wishes, machine, knowledge))
    found = _first_of_each(freed, facts, wishes, machine, knowledge)
    larger = [share for share in _SHARES if share > wishes.gpu_memory_utilization]
    savings = _savings(facts, wishes, machine, knowledge, larger)
    found += _first_of_each(savings, facts, wishes, machine, knowledge)
    if not found and len(freed) > 1:
        everything = {name: value for ways in freed for name, value in ways[-1][0].items()}
        found = _first_of_each([[(everything, False)]], facts, wishes, machine, knowledge)
    return tuple(found)


def gains(
    facts: ModelFacts,
    wishes: Wishes,
    machine: Machine,
    knowledge: EngineKnowledge,
    decision: Decision,
) -> tuple[Alternative, ...]:
    """Changes with which a model that fits would hold more tokens: text only, an fp8 cache."""
    if decision.fit is None or decision.fit.capacity is None:
        return ()
    have, size = decision.fit.capacity.tokens, decision.fit.settings.tensor_parallel_size
    better = []
    # The most that is to be had goes first, since it fits already.
    larger = [share for share in reversed(_SHARES) if share > wishes.gpu_memory_utilization]
    for changes in _savings(facts, wishes, machine, knowledge, larger):
        # With less memory to find it might be put on fewer GPUs, where it would hold less.
        as_many = [({**change, "tensor_parallel_size": size}, costs) for change, costs in changes]
        ways = [[way for pair in zip(changes, as_many, strict=True) for way in pair]]
        for found in _first_of_each(ways, facts, wishes, machine, knowledge, size=size):
            fit = found.decision.fit
            if fit is not None and fit.capacity is not None and fit.capacity.tokens > have:
                better.append(found)
    return tuple(better)


def other_gpus(
    facts: ModelFacts, wishes: Wishes, knowledge: EngineKnowledge, cards: Sequence[GpuCard]
) -> tuple[Alternative, ...]:
    """The smallest named cards on which the model fits: alone, and then in numbers."""
    usable = _one_of_each_size(card for card in cards if not card.refused and not card.unified)
    if wishes.tensor_parallel_size is not None:
        found = _on_cards(facts, wishes, knowledge, usable, wishes.tensor_parallel_size)
        return tuple(islice(found, _MOST_OF_A_KIND))
    alone = islice(_on_cards(facts, wishes, knowledge, usable, 1), _MOST_OF_A_KIND)
    several = (
        found
        for count in _COUNTS
        for found in islice(_on_cards(facts, wishes, knowledge, usable, count), 1)
    )
    return (*alone, *islice(several, 1))


def other_models(
    facts: ModelFacts,
    wishes: Wishes,
    machine: Machine,
    knowledge: EngineKnowledge,
    catalogue: Iterable[CatalogueEntry],
) -> tuple[Alternative, ...]:
    """The largest Gemmas that fit where this one does not: the same one quantized goes first."""
    entry = facts.entry
    similar = [
        other
        for other in catalogue
        if other.served and not other.pooling and other.shape and other.id != facts.model
        and (entry is None or (other.variant, other.chat) == (entry.variant, entry.chat))
        and (other.family == entry.family if entry else other.chat)
    ]  # fmt: skip
    fitting = []
    for other in similar:
        alternative = _model(other, wishes, machine, knowledge)
        if alternative is not None:
            fitting.append((other, alternative))
    shape = entry.shape if entry else None
    fitting.sort(key=lambda pair: (pair[0].shape != shape, -(pair[0].parameters or 0)))
    return tuple(alternative for _, alternative in fitting[:_MOST_OF_A_KIND])


def _freed(
    facts: ModelFacts, wishes: Wishes, machine: Machine, knowledge: EngineKnowledge
) -> Iterator[list[_Change]]:
    """For each thing that was fixed, other values, the nearest first; the last is "left open"."""
    if wishes.max_model_len is not None:
        yield [({"max_model_len": None}, False)]
    if wishes.tensor_parallel_size is not None:
        wanted = wishes.tensor_parallel_size
        legal = legal_sizes(facts, max(1, machine.most_gpus))
        nearest = sorted(legal, key=lambda size: (abs(size - wanted), size))
        yield [*(({"tensor_parallel_size": size}, False) for size in nearest),
               ({"tensor_parallel_size": None}, False)]  # fmt: skip
    if wishes.max_num_batched_tokens is not None:
        least = least_batch(facts, wishes, knowledge)
        ways: list[_Change] = [({"max_num_batched_tokens": None}, False)]
        if wishes.max_num_batched_tokens < least:
            ways.insert(0, ({"max_num_batched_tokens": least}, False))
        yield ways
    if wishes.max_num_seqs is not None:
        yield [({"max_num_seqs": None}, False)]
    if wishes.max_num_seqs is not None and wishes.max_num_batched_tokens is not None:
        yield [({"max_num_seqs": None, "max_num_batched_tokens": None}, False)]
    device = machine.device(1)
    if wishes.kv_cache_memory_bytes is not None and device.kind == "cuda":
        yield [({"kv_cache_memory_bytes": None}, False)]
    elif wishes.kv_cache_memory_bytes is not None:
        sizes = (device.free_bytes // part // _MIB * _MIB for part in _CPU_PARTS)
        yield [({"kv_cache_memory_bytes": size}, False) for size in sizes if size]
    # More than this may be more than the driver leaves.
    usual = Wishes.gpu_memory_utilization
    smaller = [s for s in reversed(_SHARES) if usual <= s < wishes.gpu_memory_utilization]
    if device.kind == "cuda" and smaller:
        yield [({"gpu_memory_utilization": share}, False) for share in smaller]
    if wishes.dtype != "auto":
        yield [({"dtype": "auto"}, False)]
    if wishes.kv_cache_dtype != "auto":
        yield [({"kv_cache_dtype": "auto"}, False)]
    if wishes.quantization is not None:
        fp8 = online_fp8(knowledge.rules)
        yield [({"quantization": fp8}, False), ({"quantization": None}, False)]


def _savings(
    facts: ModelFacts,
    wishes: Wishes,
    machine: Machine,
    knowledge: EngineKnowledge,
    shares: Sequence[float],
) -> Iterator[list[_Change]]:
    """What takes less memory, or gives vLLM more of it (one of the `shares`), than was said."""
    on_gpu = machine.device(1).kind == "cuda"
    if on_gpu and shares and wishes.kv_cache_memory_bytes is None:
        yield [({"gpu_memory_utilization": share}, False) for share in shares]
    towers = facts.geometry is not None and any(t.optional for t in facts.geometry.towers)
    if towers and not wishes.text_only:
        yield [({"language_model_only": True}, False)]
    if not on_gpu:
        return
    if not wishes.enforce_eager:
        yield [({"enforce_eager": True}, False)]
    if wishes.kv_cache_dtype == "auto":
        yield [({"kv_cache_dtype": "fp8"}, True)]
    fp8 = online_fp8(knowledge.rules)
    if fp8 and wishes.quantization is None and facts.quantization_config is None:
        yield [({"quantization": fp8}, True)]
        if wishes.kv_cache_dtype == "auto":
            yield [({"quantization": fp8, "kv_cache_dtype": "fp8"}, True)]


def _first_of_each(
    groups: Iterable[Iterable[_Change]],
    facts: ModelFacts,
    wishes: Wishes,
    machine: Machine,
    knowledge: EngineKnowledge,
    *,
    size: int | None = None,
) -> list[Alternative]:
    """Of each group of changes the first with which the model fits (on `size` GPUs if given)."""
    found = []
    for group in groups:
        tried = (_changed(change, facts, wishes, machine, knowledge) for change in group)
        fitting = (one for one in tried if one is not None and size in (None, _size(one)))
        found += list(islice(fitting, 1))
    return found


def _changed(
    change: _Change,
    facts: ModelFacts,
    wishes: Wishes,
    machine: Machine,
    knowledge: EngineKnowledge,
) -> Alternative | None:
    """The change as an alternative, if it fits; what it leaves open is shown with its value."""
    settings, costs_answers = change
    decision = _fitting(facts, replace(wishes, **settings), machine, knowledge)
    if decision is None or decision.fit is None:
        return None
    shown = {name: _shown(name, value, decision.fit) for name, value in settings.items()}
    if shown != settings:
        # With that value said, other things that were left open may be decided otherwise.
        decision = _fitting(facts, replace(wishes, **shown), machine, knowledge)
    if decision is None:
        return None
    return Alternative("setting", decision, shown, costs_answers=costs_answers)


def _shown(name: str, value: object, fit: Fit) -> Any:
    if name == "kv_cache_memory_bytes":
        size = fit.memory.kv_cache_bytes
        return size // _GIB * _GIB if size >= 2 * _GIB else size // _MIB * _MIB
    return getattr(fit.settings, name) if value in (None, "auto") else value


def _size(alternative: Alternative) -> int | None:
    fit = alternative.decision.fit
    return None if fit is None else fit.settings.tensor_parallel_size


def _one_of_each_size(cards: Iterable[GpuCard]) -> list[GpuCard]:
    """The cards by size, and of those of one size the newest."""
    by_size: dict[int, GpuCard] = {}
    for card in sorted(cards, key=lambda card: card.compute_capability, reverse=True):
        by_size.setdefault(round(card.total_bytes / _SIZE_STEP), card)
    return sorted(by_size.values(), key=lambda card: card.total_bytes)


def _on_cards(
    facts: ModelFacts,
    wishes: Wishes,
    knowledge: EngineKnowledge,
    cards: Iterable[GpuCard],
    count: int,
) -> Iterator[Alternative]:
    for card in cards:
        memory = DeviceMemory(
            "cuda", card.name, card.total_bytes, card.total_bytes, card.compute_capability
        )
        machine = Machine(count, lambda _, memory=memory: memory)  # type: ignore[misc]
        fixed = replace(wishes, tensor_parallel_size=count)
        decision = _fitting(facts, fixed, machine, knowledge)
        if decision is not None and _is_decent(decision, facts, wishes):
            name = card.key if count == 1 else f"{card.key}x{count}"
            yield Alternative("gpu", decision, gpu=name)


def _is_decent(decision: Decision, facts: ModelFacts, wishes: Wishes) -> bool:
    if wishes.max_model_len is not None or decision.fit is None:
        return True
    return decision.fit.settings.max_model_len >= min(own_model_len(facts), DECENT_MODEL_LEN)


def _model(
    entry: CatalogueEntry, wishes: Wishes, machine: Machine, knowledge: EngineKnowledge
) -> Alternative | None:
    reading = facts_from_config(entry.id, entry.config, source="catalogue", entry=entry)
    if reading.facts is None:
        return None
    decision = _fitting(reading.facts, wishes, machine, knowledge)
    if decision is not None:
        return Alternative("model", decision, model=entry.id)
    if wishes.quantization is None:
        return None
    # What was meant for this model needn't suit the other, least of all a quantized one.
    decision = _fitting(reading.facts, replace(wishes, quantization=None), machine, knowledge)
    if decision is None:
        return None
    return Alternative("model", decision, {"quantization": None}, model=entry.id)


def _fitting(
    facts: ModelFacts, wishes: Wishes, machine: Machine, knowledge: EngineKnowledge
) -> Decision | None:
    """The decision, if it is sure to fit and vLLM refuses nothing of it."""
    known = facts.architecture is None or facts.architecture in knowledge.rules.architectures
    decision = decide(facts, wishes, machine, knowledge)
    if not decision.fits or decision.fit is None or not known:
        return None
    if decision.fit.tight or decision.fit.spills:
        return None
    device = machine.device(decision.fit.settings.tensor_parallel_size)
    if device.kind == "cuda" and decision.fit.memory.requested_bytes > device.free_bytes:
        return None
    problems = plan_problems(facts, wishes, decision, machine, knowledge.rules)
    return None if any(problem.blocking for problem in problems) else decision


def flag_of(name: str) -> str:
    """The flag of a setting: `max_model_len` is `--max-model-len`."""
    return "--" + name.replace("_", "-")


def _flag(name: str, value: object) -> str:
    flag = flag_of(name)
    if value is None:
        return f"without {flag}"
    if name == "kv_cache_memory_bytes" and isinstance(value, int) and value % _MIB == 0:
        # As vLLM reads sizes: capital letters are powers of 1024.
        value = f"{value // _GIB}G" if value % _GIB == 0 else f"{value // _MIB}M"
    return flag if value is True else f"{flag} {value}"
