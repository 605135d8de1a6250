"""In which number type a Gemma is to be computed on what there is."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_serve.planning.model.facts import ModelFacts

# vLLM refuses float16 for these ("Numerical instability").
REFUSES_FLOAT16 = frozenset({"gemma2", "gemma3", "gemma3_text"})

_BFLOAT16_SINCE = (8, 0)
_ALIASES = {"half": "float16", "float": "float32"}


@dataclass(frozen=True)
class ChosenDtype:
    """The dtype, and the reason where it isn't what vLLM's `auto` would take anyway."""

    dtype: str
    reason: str = ""


def has_bfloat16(compute_capability: tuple[int, int] | None) -> bool:
    """Whether the device computes in bfloat16; `compute_capability` is None on a CPU."""
    return compute_capability is None or compute_capability >= _BFLOAT16_SINCE


def choose_dtype(
    wanted: str, facts: ModelFacts, compute_capability: tuple[int, int] | None
) -> ChosenDtype:
    """What `--dtype` comes to; "auto" is resolved, anything else stays as it is.

    vLLM's `auto` keeps 16 bits as they are and turns float32 into 16 bits. On a GPU that can't do
    bfloat16 it would take float16, in which only the first Gemmas are known to answer well: the
    others get float32, at twice the memory. `compute_capability` is None on a CPU.
    """
    if wanted != "auto":
        return ChosenDtype(_ALIASES.get(wanted, wanted))
    name = facts.model_type or ""
    is_gemma = facts.geometry is not None or name.startswith("gemma")
    if facts.dtype == "float16" and facts.model_type not in REFUSES_FLOAT16:
        return ChosenDtype("float16")
    if has_bfloat16(compute_capability):
        return ChosenDtype("bfloat16")
    assert compute_capability is not None
    old = f"compute capability {compute_capability[0]}.{compute_capability[1]} has no bfloat16"
    if not is_gemma:
        return ChosenDtype("float16", f"{old}, and vLLM takes float16 instead")
    if name != "gemma":
        return ChosenDtype("float32", f"{old}, and this Gemma is not stable in float16")
    return ChosenDtype("float16", f"{old}; this Gemma runs in float16 too")
