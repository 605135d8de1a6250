"""Does this Gemma fit these GPUs, how, and what else could be done? Starts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gemma_serve.adapters.package_data import (
    load_catalogue,
    load_engine_rules,
    load_gpu_cards,
    load_runtime_constants,
)
from gemma_serve.errors import Problem
from gemma_serve.planning.config import ServeConfig
from gemma_serve.planning.memory.alternatives import (
    Alternative,
    flag_of,
    gains,
    other_gpus,
    other_models,
    other_settings,
)
from gemma_serve.planning.memory.decision import Decision, decide
from gemma_serve.planning.memory.engine_flags import read_engine_flags
from gemma_serve.planning.memory.engine_rules import rules_for
from gemma_serve.planning.memory.request import EngineKnowledge, Machine, Wishes
from gemma_serve.planning.memory.verdict import (
    DOES_NOT_FIT,
    engine_version_problem,
    model_problems,
    plan_problems,
)
from gemma_serve.planning.model.facts import FactsReading, ModelFacts

# Which settings are to blame for a problem.
_MENDED_BY = {
    "bf16-unsupported": frozenset({"dtype"}),
    "tp-too-big": frozenset({"tensor_parallel_size"}),
    "tp-heads": frozenset({"tensor_parallel_size"}),
    "plan.little_left": frozenset({"gpu_memory_utilization"}),
    "len-over-derived": frozenset({"max_model_len"}),
    "plan.quantization": frozenset({"quantization"}),
    "quant-capability": frozenset({"quantization"}),
    "plan.quantization_dtype": frozenset({"dtype", "quantization"}),
    "plan.kv_cache_unsupported": frozenset({"kv_cache_dtype", "dtype"}),
    "mm-batch-too-small": frozenset({"max_num_batched_tokens", "language_model_only"}),
    "plan.batch_too_small": frozenset({"max_num_batched_tokens", "max_num_seqs"}),
    "fp16-refused": frozenset({"dtype"}),
}
# Problems whose own hint is all that is wrong, unless no alternative mends it.
_NOT_ALONE = _MENDED_BY.keys() - {"plan.kv_cache_unsupported", "plan.quantization_dtype"}


@dataclass(frozen=True)
class FitReport:
    """One model on one machine, decided and judged.

    `engine_version` is the vLLM that was asked for or found, `planned_version` the one whose rules
    were used. `alternatives` are other ways: what would fit where this does not, or what would
    hold more where it does.
    """

    facts: ModelFacts | None
    decision: Decision | None
    engine_version: str | None
    planned_version: str
    alternatives: tuple[Alternative, ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the engine would find room, and take the settings."""
        return self.decision is not None and self.decision.fits and not self._blocked

    @property
    def _blocked(self) -> bool:
        return any(problem.blocking for problem in self.problems)


def judge_fit(
    reading: FactsReading,
    config: ServeConfig,
    machine: Machine | None,
    engine_version: str | None,
    *,
    look_for_more: bool = True,
) -> FitReport:
    """Decide how to run the model on `machine`, for this version of vLLM.

    Args:
        config: what is None in it (or "auto") is left to the planner.
        machine: where it would run; None where there is nothing to run on.
        engine_version: None is taken as the newest that is known.
        look_for_more: whether to look for alternatives too.
    """
    table = load_engine_rules()
    rules, known = rules_for(engine_version or table[-1].version, table)
    problems: tuple[Problem, ...] = ()
    if not known:
        problems = (engine_version_problem(engine_version, rules),)
    facts = reading.facts
    if facts is None:
        return FitReport(None, None, engine_version, rules.version, (), problems)
    knowledge = EngineKnowledge(rules, load_runtime_constants())
    wishes = wishes_of(config, facts)
    of_model = model_problems(facts, rules, table, engine_version)
    problems += of_model
    # No setting and no GPU helps a model that this vLLM does not know.
    look_for_more = look_for_more and not any(p.code == "arch-unsupported" for p in of_model)
    if machine is None:
        found = other_gpus(facts, wishes, knowledge, load_gpu_cards()) if look_for_more else ()
        return FitReport(facts, None, engine_version, rules.version, found, problems)
    decision = decide(facts, wishes, machine, knowledge)
    problems += plan_problems(facts, wishes, decision, machine, rules)
    report = FitReport(facts, decision, engine_version, rules.version, (), problems)
    if not look_for_more or decision.fit is None:
        return report
    return _with_alternatives(report, facts, wishes, machine, knowledge)


def wishes_of(config: ServeConfig, facts: ModelFacts) -> Wishes:
    """What of the configuration the planner must keep to."""
    towers = facts.geometry.towers if facts.geometry else ()
    return Wishes(
        tensor_parallel_size=config.tensor_parallel_size,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        dtype=config.dtype,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        gpu_memory_utilization=config.gpu_memory_utilization,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        enforce_eager=config.enforce_eager,
        language_model_only=config.language_model_only,
        flags=read_engine_flags(config.engine_args, [tower.modality for tower in towers]),
    )


def planned_values(report: FitReport | None) -> dict[str, object]:
    """The settings that the planner gave a value, by name; empty where it could not plan.

    vLLM's own defaults are among them: they depend on the card, and the plan rests on them.
    """
    if report is None or report.decision is None or report.decision.fit is None:
        return {}
    settings = report.decision.fit.settings
    return {name: getattr(settings, name) for name in report.decision.reasons}


def _with_alternatives(
    report: FitReport,
    facts: ModelFacts,
    wishes: Wishes,
    machine: Machine,
    knowledge: EngineKnowledge,
) -> FitReport:
    assert report.decision is not None
    if report.fits:
        more = gains(facts, wishes, machine, knowledge, report.decision)
        return replace(report, alternatives=more)
    settings = other_settings(facts, wishes, machine, knowledge)
    models = other_models(facts, wishes, machine, knowledge, load_catalogue())
    gpus: tuple[Alternative, ...] = ()
    if machine.device(1).kind == "cuda":
        gpus = other_gpus(facts, wishes, knowledge, load_gpu_cards())
    found = (*settings, *gpus, *models)
    problems = tuple(with_a_way_out(problem, found) for problem in report.problems)
    return replace(report, alternatives=found, problems=problems)


def with_a_way_out(problem: Problem, found: Sequence[Alternative]) -> Problem:
    """The problem with the nearest setting that was shown to work as its hint, if one was found.

    Where no setting helps, another model or other GPUs may.
    """
    to_blame = _MENDED_BY.get(problem.code, frozenset())
    settings = [one for one in found if one.kind == "setting"]
    mending = [one for one in settings if one.settings.keys() <= to_blame]
    mending = mending or [one for one in settings if one.settings.keys() & to_blame][:1]
    if mending:
        return replace(problem, hint=_said(mending))
    if problem.code in DOES_NOT_FIT and not problem.hint:
        return replace(
            problem,
            hint=_other_ways(found) or "no Gemma that is known fits here with these settings",
        )
    if problem.code in _NOT_ALONE and problem.blocking:
        others = _other_ways([one for one in found if one.kind != "setting"])
        hint = f"{problem.hint}; with the rest as it is, that won't do"
        return replace(problem, hint=f"{hint}: {others}" if others else hint)
    return problem


def _said(changes: Sequence[Alternative]) -> str:
    """Changes of settings as advice."""
    left_out = [c for c in changes if all(value is None for value in c.settings.values())]
    said = [f"`{change.flags}`" for change in changes if change not in left_out]
    parts = ["say " + " or ".join(said)] if said else []
    names = [" and ".join(f"`{flag_of(name)}`" for name in c.settings) for c in left_out]
    return ", or ".join([*parts, *(f"leave {name} out" for name in names)])


def _other_ways(found: Sequence[Alternative]) -> str:
    """The nearest alternative of each kind, as a hint."""
    ways = []
    for kind, say in (
        ("setting", "say `{}`"),
        ("model", "take a Gemma that fits: `{}`"),
        ("gpu", "it fits on other GPUs: `{}`"),
    ):
        nearest = next((one for one in found if one.kind == kind), None)
        if nearest is not None:
            ways.append(say.format(nearest.flags))
    return ", or ".join(ways)
