"""No flags of `check-gpu` give a traceback, or a plan that contradicts itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gemma_serve.adapters.package_data import load_catalogue, load_engine_rules, load_gpu_cards
from planned import asked, changed, nobody_to_ask

SIZES = ("total_bytes", "requested_bytes", "weights_bytes", "runtime_bytes", "activation_bytes",
         "kv_cache_bytes", "unused_bytes", "margin_bytes")  # fmt: skip
PARTS = SIZES[2:6]
PLANNED = ("tensor_parallel_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
KEPT = {**dict.fromkeys(PLANNED, int), "quantization": str, "kv_cache_dtype": str, "dtype": str}
SHORT = {"half": "float16", "float": "float32"}

VERSIONS = ("0.1", "0.25.9", "0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0",
            "0.32.0+cpu", "0.33.0rc1", "0.34.0", "9.9", "garbage")  # fmt: skip
QUANTIZATIONS = sorted(
    {
        name
        for rules in load_engine_rules()
        for name in (*rules.online_quantization_methods, *rules.checkpoint_quantization_methods)
    }
    | {"garbage"}
)
KV_DTYPES = sorted({name for rules in load_engine_rules() for name in rules.kv_cache_dtypes})
ENGINE_ARGS = (
    "block-size=16", "block-size=64", "block-size=7", "block-size=many", "enable-lora",
    "attention-backend=FLASH_ATTN", "attention-backend=TRITON_ATTN", "attention-backend=FLASHINFER",
    "attention-backend=NONE_SUCH", "disable-hybrid-kv-cache-manager", "no-async-scheduling",
    "async-scheduling", "num-gpu-blocks-override=1", "num-gpu-blocks-override=5000",
    "num-gpu-blocks-override=100000000", "no-enable-chunked-prefill", "performance-mode=throughput",
    'speculative-config={"method": "ngram"}', 'limit-mm-per-prompt={"image": 0}', "seed=7",
)  # fmt: skip


def numbers(most: int) -> st.SearchStrategy[str]:
    """Numbers of every size: small ones are as likely as large ones."""
    digits = st.integers(0, len(str(most)) - 1)
    return digits.flatmap(lambda n: st.integers(1, min(most, 10 ** (n + 1)))).map(str)


def cards() -> st.SearchStrategy[str]:
    named = st.sampled_from([card.key for card in load_gpu_cards()])
    sizes = st.integers(4, 200).map(lambda gib: f"{gib}GiB")
    count = st.sampled_from(["", "", "x2", "x3", "x4", "x8"])
    return st.tuples(st.one_of(named, sizes), count).map("".join)


VALUES = {
    "--tensor-parallel-size": st.integers(1, 16).map(str),
    "--max-model-len": numbers(10**7),
    "--max-num-seqs": numbers(10**5),
    "--max-num-batched-tokens": numbers(10**6),
    "--kv-cache-dtype": st.sampled_from([*KV_DTYPES, "garbage"]),
    "--quantization": st.sampled_from(QUANTIZATIONS),
    "--dtype": st.sampled_from(["auto", "bfloat16", "float16", "float32", "half", "float"]),
    "--gpu-memory-utilization": st.integers(1, 100).map(lambda percent: str(percent / 100)),
    "--kv-cache-memory-bytes": numbers(10**12),
    "--engine-version": st.sampled_from(VERSIONS),
}


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    """A command line: each option in about a third of them."""
    argv = ["--model", draw(st.sampled_from([entry.id for entry in load_catalogue()]))]
    where = ["--device", "cpu"] if draw(st.integers(0, 9)) == 9 else ["--for-gpu", draw(cards())]
    argv += where
    for name, values in VALUES.items():
        if draw(st.integers(0, 2)) == 2:
            argv += [name, draw(values)]
    for switch in ("--enforce-eager", "--language-model-only"):
        if draw(st.integers(0, 5)) == 5:
            argv.append(switch)
    for arg in draw(st.lists(st.sampled_from(ENGINE_ARGS), max_size=2)):
        argv += ["--engine-arg", arg]
    return argv


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    with nobody_to_ask():
        yield


def value_of(argv: list[str], name: str) -> str | None:
    return argv[argv.index(name) + 1] if name in argv else None


def check(argv: list[str]) -> tuple[int, dict[str, Any]]:
    """The answer, after what must hold of every one."""
    code, answer = asked("check-gpu", *argv)
    assert set(answer) == {"schema", "command", "ok", "data", "problems"}
    assert code in (0, 1, 2)
    assert answer["ok"] is (code == 0)
    assert all(p["message"] for p in answer["problems"])
    codes = [p["code"] for p in answer["problems"]]
    assert "internal" not in codes
    if code == 2:
        assert answer["data"] == {}
        return code, answer["data"]
    data = answer["data"]
    assert data["fit"] in ("fits", "does_not_fit", None)
    assert (data["fit"] == "fits") is (code == 0)
    assert code == 0 or codes
    assert (data["fit"] is None) is (data["plan"] is None)
    return code, data


def hold_together(argv: list[str], data: dict[str, Any]) -> None:
    """What must hold of every plan: it keeps what was said, and its sums are right."""
    plan, memory, cache = data["plan"], data["plan"]["memory"], data["plan"]["kv_cache"]
    override = any("num-gpu-blocks-override" in word for word in argv)
    used = sum(memory[name] for name in PARTS)
    assert all(isinstance(memory[name], int) and memory[name] >= 0 for name in SIZES)
    for name, kind in KEPT.items():
        given = value_of(argv, "--" + name.replace("_", "-"))
        if given not in (None, "auto"):
            assert plan[name] == kind(SHORT.get(given, given))
    for name in PLANNED:
        assert value_of(plan["argv"], "--" + name.replace("_", "-")) == str(plan[name])
    fixed = value_of(argv, "--kv-cache-memory-bytes")
    # A model that makes embeddings has no KV cache, whatever was given for it.
    if fixed is not None and not override and (not cache or cache["groups"]):
        assert memory["kv_cache_bytes"] == int(fixed)
    if cache and cache["groups"] and (data["fit"] == "fits" or not override):
        assert cache["num_blocks"] * cache["bytes_per_block"] <= memory["kv_cache_bytes"]
    if data["fit"] == "does_not_fit":
        assert not {"tokens", "max_concurrency"} & set(cache)
        return
    assert used <= memory["requested_bytes"] <= memory["total_bytes"]
    if fixed is None and not override and data["device"] == "cuda" and cache["groups"]:
        assert used == memory["requested_bytes"]
    if cache["groups"]:
        assert cache["tokens"] >= plan["max_model_len"] >= 1
        assert cache["max_concurrency"] >= 1
        assert memory["kv_cache_bytes"] >= cache["bytes_per_sequence"]


def line(text: str) -> list[str]:
    return text.split()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lines())
@example(line("--model google/gemma-4-E2B-it --for-gpu t4x4 --dtype bfloat16 --kv-cache-dtype fp8"))
@example(line("--model google/gemma-7b-it --for-gpu h200x2 --tensor-parallel-size 4"))
@example(line("--model google/gemma-2b-it --for-gpu v100-32"))
@example(line("--model google/gemma-7b-it --for-gpu h200 "
              "--engine-arg num-gpu-blocks-override=100000000"))  # fmt: skip
@example(line("--model google/gemma-2-27b-it --for-gpu h100 --kv-cache-memory-bytes 84144408751 "
              "--engine-arg spec-method=ngram"))  # fmt: skip
@example(line("--model google/gemma-4-31B-it --for-gpu 71GiB"))
@example(line("--model google/embeddinggemma-300m --for-gpu h200"))
def test_no_flags_give_a_plan_that_contradicts_itself(argv: list[str]) -> None:
    _, data = check(argv)
    if data.get("plan"):
        hold_together(argv, data)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lines())
@example(line("--model google/gemma-7b-it --for-gpu h200 --kv-cache-memory-bytes 200000000000"))
@example(line("--model google/gemma-3n-E4B --for-gpu rtx3060-12x8 --max-model-len 10000000 "
              "--max-num-batched-tokens 95616 --language-model-only"))  # fmt: skip
@example(line("--model google/gemma-4-26B-A4B --for-gpu rtx2080tix4 --dtype bfloat16 "
              "--max-model-len 27"))  # fmt: skip
@example(line("--model google/gemma-2b --for-gpu h200 --engine-version 0.1"))
def test_every_way_out_fits(argv: list[str]) -> None:
    _, data = check(argv)
    for one in data.get("alternatives", ()):
        code, other = check(changed(argv, one["flags"]))
        assert code == 0, one["flags"]
        if one["kind"] != "gpu":
            planned = {name: other["plan"][name] for name in PLANNED[:2]}
            assert planned == {name: one[name] for name in PLANNED[:2]}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lines(), st.data())
def test_a_plan_that_fits_does_so_when_typed_out_and_with_shorter_contexts(
    argv: list[str], data: st.DataObject
) -> None:
    code, found = check(argv)
    if code:
        return
    plan = found["plan"]
    for name in PLANNED:
        argv = changed(argv, f"--{name.replace('_', '-')} {plan[name]}")
    again, same = check(argv)
    assert again == 0
    if found["device"] == "cuda":  # other programs use main memory meanwhile
        assert same["plan"]["memory"] == plan["memory"]
    shorter = data.draw(st.integers(1, plan["max_model_len"]))
    assert check(changed(argv, f"--max-model-len {shorter}"))[0] == 0


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lines(), st.integers(4, 200), st.integers(1, 200))
def test_more_memory_never_makes_what_fits_a_misfit(argv: list[str], size: int, more: int) -> None:
    if "--for-gpu" not in argv:
        return
    code, _ = check(changed(argv, f"--for-gpu {size}GiBx2"))
    if code == 0:
        assert check(changed(argv, f"--for-gpu {size + more}GiBx2"))[0] == 0


def test_without_a_number_the_cards_are_as_many_as_the_split_wants() -> None:
    model = "--model google/gemma-7b-it --tensor-parallel-size 4"
    code, data = check(line(f"{model} --for-gpu h200"))
    assert (code, len(data["gpus"]), data["plan"]["tensor_parallel_size"]) == (0, 4, 4)
    code, data = check(line(f"{model} --for-gpu h200x2"))
    assert (code, len(data["gpus"]), data["fit"]) == (1, 2, "does_not_fit")


def test_flags_whose_memory_is_not_planned_leave_the_answer_a_no() -> None:
    argv = line("--model google/gemma-3-27b-it --for-gpu l4 --engine-arg cpu-offload-gb=40")
    code, answer = asked("check-gpu", *argv)
    assert (code, answer["ok"], answer["data"]["fit"]) == (1, False, "does_not_fit")
    assert [p["code"] for p in answer["problems"]] == ["weights-oom", "plan.not_planned"]
    # For `up` it is a warning: the flag may be what makes it fit.
    code, answer = asked("plan", *argv)
    assert (code, answer["ok"], answer["data"]["fit"]) == (0, True, "does_not_fit")
