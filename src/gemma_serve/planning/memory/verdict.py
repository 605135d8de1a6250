"""What stands between a plan and a running engine, each with the nearest way that works."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from gemma_serve.errors import Problem
from gemma_serve.planning.memory.decision import Decision, legal_sizes, own_model_len
from gemma_serve.planning.memory.engine_rules import (
    EngineRules,
    EngineRulesTable,
    is_older,
    least_version,
)
from gemma_serve.planning.memory.fit import DeviceMemory, Fit
from gemma_serve.planning.memory.quantization_rules import (
    capability_refusal,
    quantization_conflict,
    quantization_refusal,
    stored_method,
)
from gemma_serve.planning.memory.request import Machine, Wishes
from gemma_serve.planning.memory.tensor_parallel import illegal_tensor_parallel_reason
from gemma_serve.planning.model.dtypes import REFUSES_FLOAT16, choose_dtype
from gemma_serve.planning.model.facts import ModelFacts
from gemma_serve.planning.sizes import gib

# What says that there is too little memory, whichever part of it breaks the budget.
DOES_NOT_FIT = frozenset(
    {"weights-oom", "kv-none", "kv-too-small", "cpu-memory-busy", "plan.does_not_fit"}
)

# Turing: CUDA 13, for which vLLM's wheels are built, has dropped what is older.
_OLDEST_CAPABILITY = (7, 5)


def plan_problems(
    facts: ModelFacts, wishes: Wishes, decision: Decision, machine: Machine, rules: EngineRules
) -> tuple[Problem, ...]:
    """Everything that vLLM would refuse, and everything worth knowing about the plan.

    Where flags were given whose memory isn't planned, a plan that does not fit is a warning.
    """
    refused = (
        _too_long(facts, wishes),
        _illegal_split(facts, wishes, machine),
        _quantization(wishes, facts, rules, machine.device(1)),
        _no_float16(facts, wishes, machine.device(1)),
        _quantized_in_float32(facts, decision),
        _too_old(machine.device(1)),
        *decision.problems,
    )
    found = [problem for problem in refused if problem is not None]
    if decision.fit is not None and not any(problem.blocking for problem in found):
        device = machine.device(decision.fit.settings.tensor_parallel_size)
        found += _fit_problems(facts, wishes, decision.fit, device)
    if wishes.flags.not_planned:
        found = [_soften(problem) for problem in found]
        found.append(_not_planned(wishes.flags.not_planned))
    return tuple(found)


def model_problems(
    facts: ModelFacts, rules: EngineRules, table: EngineRulesTable, version: str | None = None
) -> tuple[Problem, ...]:
    """What is wrong with the model itself, on this `version` of vLLM or on any."""
    entry = facts.entry
    if entry is not None and not entry.served:
        return (
            Problem(
                "model.not_served",
                f"vLLM does not serve {facts.model}: {entry.reason.rstrip('.')}",
                "choose another with `gemma-serve models`",
            ),
        )
    found = []
    if entry is not None and entry.note:
        found.append(Problem("model.note", f"{entry.id}: {entry.note}", blocking=False))
    architecture = facts.architecture or (entry.architecture if entry else None)
    since = least_version(architecture, table) if architecture else None
    too_old = bool(architecture) and architecture not in rules.architectures
    if entry is not None and version and entry.min_vllm and is_older(version, entry.min_vllm):
        too_old, since = True, entry.min_vllm
    if facts.geometry is not None and too_old:
        found.append(
            Problem(
                "arch-unsupported" if since else "model.not_served",
                f"vLLM {version or rules.version} does not know the architecture {architecture} "
                f"of {facts.model}",
                f"install vLLM {since} or later" if since else "choose another model",
            )
        )
    if facts.geometry is not None and facts.geometry.is_pooling:
        found.append(
            Problem(
                "model.embeds",
                f"{facts.model} makes embeddings and generates no text, for which `up` waits",
                f"serve it with vLLM itself: `vllm serve {facts.model} --runner pooling`",
                blocking=False,
            )
        )
    return tuple(found)


def engine_version_problem(version: str | None, rules: EngineRules) -> Problem:
    """The warning that another version is planned for than the one that would run."""
    what = f"vLLM {version}" if version else "the installed vLLM, whose version can't be told,"
    return Problem(
        "engine_version_unknown",
        f"how {what} lays out its memory is not known here; planned as for vLLM {rules.version}",
        "plan for a known one with `--engine-version 0.32.0`, or see what a newer gemma-serve says",
        blocking=False,
    )


def _too_long(facts: ModelFacts, wishes: Wishes) -> Problem | None:
    longest = own_model_len(facts)
    wanted = wishes.max_model_len
    if facts.geometry is None or wanted is None or wanted <= longest:
        return None
    return Problem(
        "len-over-derived",
        f"--max-model-len {wanted} is longer than {facts.model} was made for, "
        f"which is {longest} tokens",
        f"say `--max-model-len {longest}`, or leave it out",
        settings={"max_model_len": str(longest)},
    )


def _illegal_split(facts: ModelFacts, wishes: Wishes, machine: Machine) -> Problem | None:
    size = wishes.tensor_parallel_size
    if facts.geometry is None or size is None:
        return None
    reason = illegal_tensor_parallel_reason(facts.geometry, size)
    if reason is None:
        return None
    legal = legal_sizes(facts, max(1, machine.most_gpus))
    nearest = min(legal, key=lambda n: (abs(n - size), n))
    return Problem(
        "tp-heads",
        f"--tensor-parallel-size {size} can't be: {_sentence(reason)}",
        f"say `--tensor-parallel-size {nearest}`",
    )


def _unknown_quantization(wishes: Wishes, facts: ModelFacts, rules: EngineRules) -> Problem | None:
    """Names change: what quantizes while loading is `fp8` until 0.31, then `fp8_per_tensor`."""
    name = wishes.quantization
    if name is None or name in rules.online_quantization_methods:
        return None
    online = ", ".join(rules.online_quantization_methods)
    if name not in rules.checkpoint_quantization_methods:
        found = f"vLLM {rules.version} has no quantization method `{name}`"
        return Problem("plan.quantization", found, f"methods that quantize while loading: {online}")
    if facts.quantization_config is not None or facts.geometry is None:
        return None
    found = (
        f"under vLLM {rules.version} `--quantization {name}` is for checkpoints that are stored in "
        f"it, and {facts.model} is not"
    )
    best = online_fp8(rules)
    return Problem("plan.quantization", found, f"say `--quantization {best}`" if best else "")


def _quantization(
    wishes: Wishes, facts: ModelFacts, rules: EngineRules, device: DeviceMemory
) -> Problem | None:
    """The first of the reasons why vLLM would not take the weights that way."""
    unknown = _unknown_quantization(wishes, facts, rules)
    if unknown is not None:
        return unknown
    wanted, stored = wishes.quantization, facts.quantization
    conflict = quantization_conflict(wanted, stored, rules) if wanted else None
    if conflict is not None:
        return Problem("plan.quantization", conflict, "leave `--quantization` out")
    method = stored_method(facts.quantization_config) or wanted
    if method is None or facts.geometry is None:
        return None
    refusal = quantization_refusal(
        method,
        device.compute_capability,
        rules,
        has_experts=any(layer.experts for layer in facts.geometry.layers),
        while_loading=stored is None,
    )
    if refusal is None:
        return None
    hint = "leave `--quantization` out" if stored is None else "take weights that are not quantized"
    capability = device.compute_capability
    by_gpu = capability is not None and refusal == capability_refusal(method, capability, rules)
    return Problem("quant-capability" if by_gpu else "plan.quantization", refusal, hint)


def online_fp8(rules: EngineRules) -> str | None:
    """What vLLM calls "weights to 8 bits while loading", a scale for each tensor."""
    names = ("fp8_per_tensor", "fp8")
    return next((name for name in names if name in rules.online_quantization_methods), None)


def _no_float16(facts: ModelFacts, wishes: Wishes, device: DeviceMemory) -> Problem | None:
    if wishes.dtype != "float16" or facts.model_type not in REFUSES_FLOAT16:
        return None
    stable = choose_dtype("auto", facts, device.compute_capability).dtype
    return Problem(
        "fp16-refused",
        f"--dtype float16 is refused by vLLM for a `{facts.model_type}`, which is numerically "
        "unstable in it; bfloat16 or float32 is wanted",
        hint=f"say `--dtype {stable}`",
    )


def _too_old(device: DeviceMemory) -> Problem | None:
    capability = device.compute_capability
    if capability is None or capability >= _OLDEST_CAPABILITY:
        return None
    return Problem(
        "no-kernel-image",
        f"{device.name} has compute capability {capability[0]}.{capability[1]}, for which vLLM's "
        "wheels hold no kernels",
        "take a GPU with compute capability 7.5 or newer",
    )


def _quantized_in_float32(facts: ModelFacts, decision: Decision) -> Problem | None:
    """Source: get_supported_act_dtypes of vLLM's quantization methods, config/vllm.py."""
    if decision.fit is None or decision.fit.settings.dtype != "float32":
        return None
    name = decision.fit.settings.quantization or facts.quantization
    if name is None:
        return None
    return Problem(
        "plan.quantization_dtype",
        f"vLLM computes weights quantized with `{name}` in 16 bits only, and {facts.model} would "
        "have to run in float32",
        "take a GPU with bfloat16 (compute capability 8.0 or newer), or weights that are not "
        "quantized",
    )


def _fit_problems(
    facts: ModelFacts, wishes: Wishes, fit: Fit, device: DeviceMemory
) -> list[Problem]:
    if fit.refusal is not None:
        return [fit.refusal]
    if not fit.fits:
        return [_does_not_fit(facts, wishes, fit, device)]
    found = [_tight(wishes, fit)] if fit.tight else []
    return [*found, _spills(fit, device)] if fit.spills else found


def _does_not_fit(facts: ModelFacts, wishes: Wishes, fit: Fit, device: DeviceMemory) -> Problem:
    """The sentence for the part that breaks the budget: all but the KV cache, or that."""
    memory, room = fit.memory, _room(fit, device)
    fixed = memory.kv_cache_bytes if fit.settings.fixes_kv_cache else 0
    # On a CPU all ranks live in the same memory.
    ranks = fit.settings.tensor_parallel_size if device.kind == "cpu" else 1
    of_each = memory.weights_bytes + memory.activation_bytes + fixed
    needed = memory.runtime_bytes + ranks * of_each
    parts = (
        f"weights {gib(memory.weights_bytes)}, runtime {gib(memory.runtime_bytes)}, "
        f"activations {gib(memory.activation_bytes)}"
    )
    of = f"of {gib(room)}{_share(fit, device)}"
    if fit.capacity is not None and fit.capacity.fits and needed <= room and device.kind == "cuda":
        return replace(_spills(fit, device), code="weights-oom", blocking=True)
    if fit.kv_cache is None or needed >= room:
        cache = f", KV cache {gib(fixed)}" if fixed else ""
        cache += f" for each of {ranks} ranks" if ranks > 1 else ""
        return Problem(
            _too_large(needed, device),
            f"{facts.model} does not fit {_where(device, fit)}: it takes {gib(needed)} "
            f"({parts}{cache}) {of}",
        )
    if device.kind == "cpu" and not fit.settings.fixes_kv_cache and memory.requested_bytes > room:
        return _share_is_taken(fit, device)
    longest = fit.longest_model_len
    return Problem(
        "kv-too-small",
        f"one request of {fit.settings.max_model_len} tokens needs "
        f"{gib(fit.kv_cache.smallest_memory)} of KV cache, and {gib(memory.kv_cache_bytes)} is "
        f"left for it on {_where(device, fit)} ({parts}, {of})",
        f"say `--max-model-len {longest}`" if longest else "",
        settings={"max_model_len": str(longest)} if longest else {},
    )


def _share_is_taken(fit: Fit, device: DeviceMemory) -> Problem:
    """vLLM's share of a machine whose memory others use."""
    share = f"--gpu-memory-utilization {fit.settings.gpu_memory_utilization:g}"
    return Problem(
        "cpu-memory-busy",
        f"vLLM wants {gib(fit.memory.requested_bytes)} of main memory ({share}), and "
        f"{gib(device.free_bytes)} of {gib(device.total_bytes)} are free",
        "fix the size of the cache instead: `--kv-cache-memory-bytes 1G`",
    )


def _too_large(needed: int, device: DeviceMemory) -> str:
    """What the engine would fail of that needs so much without a cache that vLLM sizes."""
    if device.kind == "cpu":
        return "cpu-memory-busy" if needed <= device.total_bytes else "plan.does_not_fit"
    # vLLM keeps to its share only when it sizes the cache: until then it takes what there is.
    return "weights-oom" if needed > device.total_bytes else "kv-none"


def _room(fit: Fit, device: DeviceMemory) -> int:
    if device.kind == "cpu":
        return device.free_bytes
    if fit.settings.fixes_kv_cache:
        return device.total_bytes
    return fit.memory.requested_bytes


def _where(device: DeviceMemory, fit: Fit) -> str:
    if device.kind == "cpu":
        return "this machine's free memory"
    count = fit.settings.tensor_parallel_size
    return f"{count} x {device.name}" if count > 1 else device.name


def _share(fit: Fit, device: DeviceMemory) -> str:
    if device.kind == "cpu" or fit.settings.fixes_kv_cache:
        return ""
    return f" (--gpu-memory-utilization {fit.settings.gpu_memory_utilization:g})"


def _tight(wishes: Wishes, fit: Fit) -> Problem:
    sure = fit.longest_model_len
    return Problem(
        "plan.tight",
        f"it fits by less than the estimate may be wrong ({gib(fit.memory.margin_bytes)})",
        f"`--max-model-len {sure}` is sure to fit" if sure else "",
        blocking=False,
    )


def _spills(fit: Fit, device: DeviceMemory) -> Problem:
    """What the driver holds before vLLM counts, and what vLLM allocates after it shared out."""
    left = max(0, device.total_bytes - fit.memory.requested_bytes)
    return Problem(
        "plan.little_left",
        f"beside its {gib(fit.memory.requested_bytes)} of {_where(device, fit)} the engine takes "
        f"about {gib(fit.beside_bytes)}, and {gib(left)} are left",
        f"say `--gpu-memory-utilization {fit.largest_share:g}`"
        if not fit.settings.fixes_kv_cache
        else "give the KV cache less",
        blocking=False,
    )


def _not_planned(names: Iterable[str]) -> Problem:
    flags = ", ".join(f"`{name}`" for name in names)
    return Problem(
        "plan.not_planned",
        f"what {flags} does to the memory is not planned, so the verdict is a guess",
        blocking=False,
    )


def _soften(problem: Problem) -> Problem:
    """A verdict on memory that may be wrong is no reason to refuse."""
    return replace(problem, blocking=False) if problem.code in DOES_NOT_FIT else problem


def _sentence(text: str) -> str:
    """A sentence of its own as the end of another."""
    return text[:1].lower() + text[1:].rstrip(".")
