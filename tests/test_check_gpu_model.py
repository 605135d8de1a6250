"""`gemma-serve check-gpu --model M`: does it fit, how, and what else could be done."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_serve.adapters.package_data import data_path, load_catalogue
from gemma_serve.cli import main
from machines import (
    GIB,
    H200,
    L4,
    MIB,
    NO_LIBRARY,
    T4,
    Check,
    engine_python,
    run_program,
    runner,
    several,
)

TEMPLATE = str(data_path("chat_templates", "system-in-first-turn.jinja"))
KEYS_OF_A_PART = {"name", "counted_as", "bytes", "margin_bytes", "explanation"}
KEYS_OF_AN_ALTERNATIVE = {
    "kind", "flags", "settings", "gpu", "model", "changes_answers", "tensor_parallel_size",
    "max_model_len", "tokens", "max_concurrency",
}  # fmt: skip
SEVEN = {
    "id": "google/gemma-7b-it",
    "architecture": "GemmaForCausalLM",
    "model_type": "gemma",
    "parameters": 8_537_680_896,
    "dtype": "bfloat16",
    "quantization": None,
    "weights_stored_bytes": None,
    "max_model_len": 8192,
    "num_layers": 28,
    "modalities": ["text"],
    "in_catalogue": True,
    "gated": True,
    "license": "gemma",
    "system_role": "refused",
    "chat": True,
    "min_vllm": "0.3.2",
    "tool_call_parser": None,
    "reasoning_parser": None,
}
# What one rank of gemma-7b holds; the parts of it that are no more than the geometry.
SEVEN_WEIGHTS = {
    "text_bytes": 15_502_497_792,
    "embeddings_bytes": 256_000 * 3072 * 2,
    "rope_bytes": 8192 * 256 * 2,
    "towers_bytes": 0,
    "buffers_bytes": 450,
    "staging_bytes": 0,
    "approximate": False,
}
SEVEN_TOKEN = 28 * 2 * 16 * 256 * 2  # bytes of KV cache for one token


@pytest.fixture
def check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Check:
    return runner(monkeypatch, capsys, tmp_path)


def check_sums(plan: dict[str, Any]) -> None:
    """The budget adds up: nothing is counted twice, and nothing is left out."""
    memory = plan["memory"]
    used = sum(
        memory[name]
        for name in ("weights_bytes", "runtime_bytes", "activation_bytes", "kv_cache_bytes")
    )
    assert memory["unused_bytes"] == max(0, memory["total_bytes"] - used)
    assert memory["weights_bytes"] == sum(
        size for name, size in memory["weights"].items() if name != "approximate"
    )
    for place, name in (("runtime", "runtime_bytes"), ("activation", "activation_bytes")):
        parts = [part for part in memory["parts"] if part["counted_as"] == place]
        assert sum(part["bytes"] for part in parts) == memory[name] > 0
        assert all(set(part) == KEYS_OF_A_PART for part in parts)
        assert sum(part["margin_bytes"] for part in parts) <= memory["margin_bytes"]


def test_an_idle_card_in_full(tmp_path: Path) -> None:
    engine = str(engine_python(tmp_path))
    argv = ["--json", "--model", "google/gemma-7b-it", "--engine-python", engine]
    run = run_program(*argv, gpus=[H200])
    total = 143_155 * MIB
    requested = math.ceil(total * 0.9)
    plan, alternatives = run.data["plan"], run.data["alternatives"]
    memory = plan["memory"]
    kv_cache_bytes, num_blocks = memory["kv_cache_bytes"], plan["kv_cache"]["num_blocks"]
    assert run.code == 0
    assert run.answer == {
        "schema": 1,
        "command": "check-gpu",
        "ok": True,
        "data": {
            "device": "cuda",
            "driver_version": "580.95.05",
            "cuda_version": "13.0",
            "engine_version": "0.32.0",
            "gpus": [
                {
                    "index": 0,
                    "uuid": "GPU-11111111-2222-3333-4444-555555555555",
                    "pci_bus_id": "00000000:3B:00.0",
                    "name": "NVIDIA H200",
                    "compute_capability": "9.0",
                    "supports_bf16": True,
                    "mig_enabled": False,
                    "total_bytes": total,
                    "used_bytes": 0,
                    "free_bytes": total,
                    "visible": True,
                    "chosen": True,
                    "processes": [],
                }
            ],
            "fit": "fits",
            "facts_source": "catalogue",
            "model": SEVEN,
            "plan": {
                "tensor_parallel_size": 1,
                "dtype": "bfloat16",
                "quantization": None,
                "kv_cache_dtype": "auto",
                "max_model_len": 8192,
                "max_num_seqs": 1024,
                "max_num_batched_tokens": 8192,
                "attention_backends": ["FLASH_ATTN"],
                "planned_vllm_version": "0.32",
                "reasons": {
                    "tensor_parallel_size": "one is enough",
                    "max_model_len": "the model's own",
                    "max_num_seqs": "vLLM's default here",
                    "max_num_batched_tokens": "vLLM's default here",
                },
                "argv": [
                    engine, "-m", "vllm.entrypoints.openai.api_server",
                    "--model", "google/gemma-7b-it", "--served-model-name", "google/gemma-7b-it",
                    "--host", "127.0.0.1", "--port", "8000", "--tensor-parallel-size", "1",
                    "--gpu-memory-utilization", "0.9", "--max-model-len", "8192",
                    "--max-num-seqs", "1024", "--max-num-batched-tokens", "8192",
                    "--shutdown-timeout", "60", "--chat-template", TEMPLATE,
                ],
                # What is estimated is held by its sums, below.
                "memory": {
                    "total_bytes": total,
                    "requested_bytes": requested,
                    "weights_bytes": 17_079_556_546,
                    "runtime_bytes": memory["runtime_bytes"],
                    "activation_bytes": memory["activation_bytes"],
                    "kv_cache_bytes": kv_cache_bytes,
                    "unused_bytes": total - requested,
                    "margin_bytes": memory["margin_bytes"],
                    "weights": SEVEN_WEIGHTS,
                    "parts": memory["parts"],
                },
                "kv_cache": {
                    "block_size": 16,
                    "num_blocks": kv_cache_bytes // (16 * SEVEN_TOKEN),
                    "bytes_per_token": SEVEN_TOKEN,
                    "bytes_per_sequence": 8192 * SEVEN_TOKEN,
                    "bytes_per_block": 16 * SEVEN_TOKEN,
                    "groups": [{"kind": "full", "layers": 28, "block_size": 16, "window": None}],
                    "tokens": 16 * num_blocks,
                    "max_concurrency": num_blocks / 512,
                },
            },
            "alternatives": alternatives,
        },
        "problems": [],
    }  # fmt: skip
    check_sums(plan)
    others = sum(memory[name] for name in ("weights_bytes", "runtime_bytes", "activation_bytes"))
    assert kv_cache_bytes == requested - others
    assert {part["counted_as"] for part in memory["parts"]} <= {
        "runtime", "activation", "outside", "after_sizing",
    }  # fmt: skip
    assert [(one["flags"], one["settings"], one["changes_answers"]) for one in alternatives] == [
        ("--gpu-memory-utilization 0.95", {"gpu_memory_utilization": 0.95}, False),
        ("--enforce-eager", {"enforce_eager": True}, False),
        ("--kv-cache-dtype fp8", {"kv_cache_dtype": "fp8"}, True),
        ("--quantization fp8_per_tensor", {"quantization": "fp8_per_tensor"}, True),
        (
            "--quantization fp8_per_tensor --kv-cache-dtype fp8",
            {"quantization": "fp8_per_tensor", "kv_cache_dtype": "fp8"},
            True,
        ),
    ]
    for one in alternatives:
        assert set(one) == KEYS_OF_AN_ALTERNATIVE
        assert (one["kind"], one["gpu"], one["model"]) == ("setting", None, None)
        assert one["tokens"] > plan["kv_cache"]["tokens"]


def test_for_people() -> None:
    first = {**H200, "used": 2 * GIB, "graphics": [[999_999_999, 2 * GIB]]}
    run = run_program("-m", "google/gemma-2-2b-it", gpus=[first, T4])
    assert (run.code, run.err) == (0, "")
    lines = [" ".join(line.split()) for line in run.out.splitlines()]
    table = "\n".join(lines)
    assert "0 NVIDIA H200 139.80 GiB 2.00 GiB 137.80 GiB 9.0 yes chosen" in table
    assert "1 Tesla T4 14.57 GiB 0.00 GiB 14.57 GiB 7.5 no visible -" in lines
    assert "(pid 999999999) 2.00 GiB" in run.out
    start = lines.index("Driver 580.95.05, which runs CUDA up to 13.0.")
    told = [line for line in lines[start + 1 :] if line]
    assert told[0] == "Chosen: GPU 0 has the most free memory: 137.8 of 139.8 GiB."
    assert told[1] == (
        "google/gemma-2-2b-it: Gemma2ForCausalLM, 2.6 B parameters (by gemma-serve's own catalogue)"
    )
    bar, legend = told[2], told[3]
    assert (len(bar), set(bar)) == (60, set("█▓▒░·"))
    assert bar == "".join(sorted(bar, key="█▓▒░·".index))
    # The first part of the bar is the weights, as wide as they are large.
    assert bar.count("█") == round(60 * 4.87 / 139.8)
    names = ["weights", "runtime", "activations", "KV cache", "free"]
    assert [legend.index(name) for name in names] == sorted(legend.index(name) for name in names)
    assert legend.startswith("█ weights 4.87 GiB ▓ runtime ")
    assert told[4] == "vLLM may use 125.82 GiB of 139.80 GiB (gpu_memory_utilization 0.9)."
    assert told[5].startswith("KV cache: ")
    assert told[5].endswith(" requests of 8,192 tokens at once.")
    assert told[6:10] == [
        "tensor_parallel_size 1: one is enough.",
        "max_model_len 8192: the model's own.",
        "max_num_seqs 1024: vLLM's default here.",
        "max_num_batched_tokens 8192: vLLM's default here.",
    ]
    assert told[10].startswith("The estimates may be off by ")
    assert told[11] == "to hold more GPUs context at once"
    assert told[12].startswith("--gpu-memory-utilization 0.95 1 8,192 ")
    assert told[-1].endswith("changes the answers a little")


@pytest.mark.parametrize("kv_cache_bytes", [4 * GIB, 10 * GIB, 10 * GIB + 1])
@pytest.mark.parametrize("length", [1024, 8192, 1000])
def test_a_fixed_cache_holds_just_so_many_tokens(
    check: Check, kv_cache_bytes: int, length: int
) -> None:
    flags = ["--kv-cache-memory-bytes", str(kv_cache_bytes), "--max-model-len", str(length)]
    run = check("--json", "-m", "google/gemma-7b-it", *flags, gpus=[H200])
    plan = run.data["plan"]
    num_blocks = kv_cache_bytes // (16 * SEVEN_TOKEN)
    per_sequence = math.ceil(length / 16)
    assert (run.code, run.data["fit"]) == (0, "fits")
    assert plan["memory"]["kv_cache_bytes"] == kv_cache_bytes
    assert plan["kv_cache"] == {
        "block_size": 16,
        "num_blocks": num_blocks,
        "bytes_per_token": SEVEN_TOKEN,
        "bytes_per_sequence": per_sequence * 16 * SEVEN_TOKEN,
        "bytes_per_block": 16 * SEVEN_TOKEN,
        "groups": [{"kind": "full", "layers": 28, "block_size": 16, "window": None}],
        "tokens": int(num_blocks / per_sequence * length),
        "max_concurrency": num_blocks / per_sequence,
    }
    check_sums(plan)
    argv = plan["argv"]
    assert argv[argv.index("--kv-cache-memory-bytes") + 1] == str(kv_cache_bytes)
    # The share must be free all the same.
    assert plan["memory"]["requested_bytes"] == math.ceil(143_155 * MIB * 0.9)


def test_a_fixed_cache_may_go_beyond_the_share_and_not_beyond_the_card(check: Check) -> None:
    more = ["--json", "-m", "google/gemma-7b-it", "--gpu-memory-utilization", "0.2"]
    beyond = check(*more, "--kv-cache-memory-bytes", "64G", gpus=[H200])
    memory = beyond.data["plan"]["memory"]
    assert (beyond.code, beyond.data["fit"]) == (0, "fits")
    assert memory["requested_bytes"] == memory["total_bytes"] - memory["unused_bytes"]
    too_much = check(*more, "--kv-cache-memory-bytes", "150G", gpus=[H200])
    [problem] = too_much.answer["problems"]
    assert (too_much.code, problem["code"]) == (1, "weights-oom")
    assert "KV cache 150.00 GiB) of 139.80 GiB" in problem["message"]
    # Every way out is one that can be typed.
    assert problem["hint"].startswith("say `--kv-cache-memory-bytes ")
    advised = problem["hint"].split("`")[1].split()
    assert check(*more, *advised, gpus=[H200]).code == 0
    assert all(one["flags"] for one in too_much.data["alternatives"])


def test_what_does_not_fit_says_what_would(check: Check) -> None:
    run = check("--json", "-m", "google/gemma-3-27b-it", gpus=several(L4, 1))
    plan, alternatives = run.data["plan"], run.data["alternatives"]
    assert (run.code, run.data["fit"], run.codes) == (1, "does_not_fit", ["weights-oom"])
    assert not run.answer["ok"]
    memory = plan["memory"]
    assert memory["weights_bytes"] > memory["requested_bytes"] == math.ceil(22_555 * MIB * 0.9)
    assert (memory["kv_cache_bytes"], memory["unused_bytes"]) == (0, 0)
    check_sums(plan)
    assert set(plan["kv_cache"]) == {
        "block_size", "num_blocks", "bytes_per_token", "bytes_per_sequence", "bytes_per_block",
        "groups",
    }  # fmt: skip
    assert {one["kind"] for one in alternatives} >= {"gpu", "model"}
    catalogue = {entry.id for entry in load_catalogue()}
    for one in alternatives:
        assert set(one) == KEYS_OF_AN_ALTERNATIVE
        assert one["tokens"] >= one["max_model_len"]
        assert one["max_concurrency"] >= 1
        if one["kind"] == "model":
            assert one["model"] in catalogue
            assert one["flags"] == f"--model {one['model']}"
            assert check("--json", *one["flags"].split(), gpus=several(L4, 1)).code == 0
        if one["kind"] == "gpu":
            assert one["flags"] == f"--for-gpu {one['gpu']}"
            there = check("--json", "-m", "google/gemma-3-27b-it", *one["flags"].split())
            assert there.code == 0
    [problem] = run.answer["problems"]
    assert problem["message"].startswith(
        "the weights and activations do not fit into the GPU's memory: "
        "google/gemma-3-27b-it does not fit NVIDIA L4: it takes "
    )
    assert problem["message"].endswith(" of 19.82 GiB (--gpu-memory-utilization 0.9)")
    nearest = next(one["flags"] for one in alternatives if one["kind"] == "model")
    assert f"take a Gemma that fits: `{nearest}`" in problem["hint"]


def test_what_does_not_fit_for_people(check: Check) -> None:
    run = check("-m", "google/gemma-3-27b-it", gpus=several(L4, 1))
    assert run.code == 1
    assert " GiB too much\n" in run.out
    assert "what would fit" in run.out
    assert "KV cache: " not in run.out
    assert run.err.startswith(
        "error: the weights and activations do not fit into the GPU's memory: "
        "google/gemma-3-27b-it does not fit NVIDIA L4: it takes "
    )


def test_a_context_for_which_the_cache_is_too_small(check: Check) -> None:
    fixed = ["--kv-cache-memory-bytes", "1G"]
    run = check("--json", "-m", "google/gemma-7b-it", *fixed, "--max-model-len", "4096", gpus=[L4])
    [problem] = run.answer["problems"]
    assert (run.code, problem["code"]) == (1, "kv-too-small")
    assert problem["message"].startswith(
        "the KV cache is too small for one request of this length: "
        "one request of 4096 tokens needs 1.76 GiB of KV cache, and 1.00 GiB is left for it on "
        "NVIDIA L4 (weights 15.91 GiB, "
    )
    # 1 GiB is 146 blocks of 16 tokens, one of which vLLM holds back.
    assert problem["hint"] == "say `--max-model-len 2320`"
    met = check("--json", "-m", "google/gemma-7b-it", *fixed, "--max-model-len", "2320", gpus=[L4])
    assert (met.code, met.data["plan"]["kv_cache"]["max_concurrency"]) == (0, 146 / 145)
    over = check("--json", "-m", "google/gemma-7b-it", *fixed, "--max-model-len", "2321", gpus=[L4])
    assert over.codes == ["kv-too-small"]
    left = check("--json", "-m", "google/gemma-7b-it", *fixed, gpus=[L4])
    assert (left.code, left.data["plan"]["max_model_len"]) == (0, 2304)
    assert left.data["plan"]["reasons"]["max_model_len"] == "the longest that fits"


def test_a_context_beyond_the_models_own(check: Check) -> None:
    run = check("--json", "-m", "google/gemma-7b-it", "--max-model-len", "8193", gpus=[H200])
    assert (run.code, run.data["fit"]) == (1, "does_not_fit")
    assert run.answer["problems"] == [
        {
            "code": "len-over-derived",
            "message": "the context is longer than the model was made for: "
            "--max-model-len 8193 is longer than google/gemma-7b-it was made for, "
            "which is 8192 tokens",
            "hint": "say `--max-model-len 8192`",
        }
    ]
    assert run.data["plan"]["max_model_len"] == 8193
    assert not {"tokens", "max_concurrency"} & set(run.data["plan"]["kv_cache"])
    check_sums(run.data["plan"])


def test_a_split_that_the_heads_do_not_allow(check: Check) -> None:
    split = ["--json", "-m", "google/gemma-7b-it", "--tensor-parallel-size"]
    run = check(*split, "3", gpus=several(H200, 4))
    assert (run.code, run.data["fit"]) == (1, "does_not_fit")
    assert run.answer["problems"] == [
        {
            "code": "tp-heads",
            "message": "the attention heads can't be split over so many GPUs: "
            "--tensor-parallel-size 3 can't be: the model's 16 attention heads can't "
            "be split over 3",
            "hint": "say `--tensor-parallel-size 2`",
        }
    ]
    assert run.data["plan"]["tensor_parallel_size"] == 3
    assert "tokens" not in run.data["plan"]["kv_cache"]
    assert check(*split, "2", gpus=several(H200, 4)).code == 0


def test_too_few_gpus_for_the_split(check: Check) -> None:
    argv = ["--json", "-m", "google/gemma-7b-it", "--tensor-parallel-size", "4"]
    run = check(*argv, gpus=several(H200, 2))
    assert (run.code, run.codes) == (1, ["tp-too-big"])


def test_the_fewest_gpus_on_which_it_fits_are_taken(check: Check) -> None:
    one = check("--json", "-m", "google/gemma-3-4b-it", gpus=several(L4, 4))
    assert [gpu["chosen"] for gpu in one.data["gpus"]] == [True, False, False, False]
    two = check("--json", "-m", "google/gemma-3-12b-it", gpus=several(L4, 4))
    plan = two.data["plan"]
    assert (two.code, plan["tensor_parallel_size"]) == (0, 2)
    assert plan["reasons"]["tensor_parallel_size"] == "the fewest GPUs on which it fits"
    assert [gpu["chosen"] for gpu in two.data["gpus"]] == [True, True, False, False]
    argv = plan["argv"]
    assert argv[argv.index("--tensor-parallel-size") + 1] == "2"
    check_sums(plan)
    # Three GPUs are not better than two: 16 heads can't be split over them.
    many = check("--json", "-m", "google/gemma-3-27b-it", gpus=several(L4, 3))
    assert many.data["plan"]["tensor_parallel_size"] == 2


def test_more_gpus_are_advised_where_one_was_fixed(check: Check) -> None:
    argv = ["--json", "-m", "google/gemma-3-27b-it", "--tensor-parallel-size"]
    run = check(*argv, "1", gpus=several(L4, 8))
    [problem] = run.answer["problems"]
    assert (run.code, problem["code"]) == (1, "weights-oom")
    assert problem["hint"].startswith("say `--tensor-parallel-size 4`")
    assert check(*argv, "4", gpus=several(L4, 8)).code == 0


def test_gpus_that_are_named_are_all_used(check: Check) -> None:
    run = check("--json", "-m", "google/gemma-7b-it", "--gpus", "0,2", gpus=several(H200, 3))
    plan = run.data["plan"]
    assert (run.code, plan["tensor_parallel_size"]) == (0, 2)
    assert [gpu["chosen"] for gpu in run.data["gpus"]] == [True, False, True]
    argv = plan["argv"]
    assert argv[argv.index("--tensor-parallel-size") + 1] == "2"
    assert plan["memory"]["weights"]["embeddings_bytes"] == 256_000 * 3072
    assert plan["kv_cache"]["bytes_per_token"] == SEVEN_TOKEN // 2
    without = check("--json", "--gpus", "0,2", gpus=several(H200, 3))
    assert [gpu["chosen"] for gpu in without.data["gpus"]] == [True, False, True]


def test_the_smallest_of_mixed_gpus_sets_the_pace(check: Check) -> None:
    argv = ["--json", "-m", "google/gemma-2-2b-it", "--gpus", "0,1"]
    run = check(*argv, gpus=[{**L4, "bus": "00000000:01:00.0"}, T4])
    plan = run.data["plan"]
    assert run.codes == ["gpu.mixed", "bf16-unsupported"]
    assert plan["memory"]["total_bytes"] == 14_917 * MIB
    assert plan["dtype"] == "float32"


def test_an_old_card_computes_gemma_3_in_float32_and_says_so(check: Check) -> None:
    run = check("--json", "-m", "google/gemma-3-4b-it", gpus=[T4])
    plan = run.data["plan"]
    assert (run.code, run.codes) == (1, ["bf16-unsupported", "weights-oom"])
    assert run.answer["problems"][0]["hint"] == (
        "it will be computed in float32, which takes twice the memory; a newer GPU needs half"
    )
    assert (run.data["fit"], plan["dtype"]) == ("does_not_fit", "float32")
    assert plan["memory"]["weights"]["embeddings_bytes"] == 262_208 * 2560 * 4
    assert plan["memory"]["weights_bytes"] == 18_408_310_756 > 4 * 4_300_079_472
    small = check("--json", "-m", "google/gemma-3-1b-it", gpus=[T4])
    assert (small.code, small.codes, small.data["fit"]) == (0, ["bf16-unsupported"], "fits")
    assert small.data["plan"]["dtype"] == "float32"
    assert small.data["plan"]["reasons"]["dtype"] == (
        "compute capability 7.5 has no bfloat16, and this Gemma is not stable in float16"
    )
    argv = small.data["plan"]["argv"]
    assert argv[argv.index("--dtype") + 1] == "float32"
    asked = check("--json", "-m", "google/gemma-3-1b-it", "--dtype", "float32", gpus=[T4])
    assert (asked.code, asked.codes) == (0, [])
    first = check("--json", "-m", "google/gemma-2b-it", gpus=[T4])
    assert (first.code, first.data["plan"]["dtype"]) == (0, "float16")


@pytest.mark.parametrize(
    ("model", "dtype", "gpu", "code"),
    [
        ("google/gemma-3-1b-it", "float16", H200, "fp16-refused"),
        ("google/gemma-2-2b-it", "half", H200, "fp16-refused"),
        ("google/gemma-2b-it", "bfloat16", T4, "bf16-unsupported"),
    ],
)
def test_a_dtype_that_cannot_be(
    check: Check, model: str, dtype: str, gpu: dict[str, Any], code: str
) -> None:
    run = check("--json", "-m", model, "--dtype", dtype, gpus=[gpu])
    assert (run.code, run.codes) == (1, [code])


def test_names_of_quantizations_are_those_of_the_version(check: Check) -> None:
    argv = ["--json", "-m", "google/gemma-7b-it", "--quantization"]
    for version, fits in (("0.30.0", True), ("0.31.0", False), ("0.32.0", False)):
        run = check(*argv, "fp8", "--engine-version", version, gpus=[H200])
        assert (run.code == 0) is fits, version
    [problem] = run.answer["problems"]
    assert problem["code"] == "plan.quantization"
    assert problem["hint"] == "say `--quantization fp8_per_tensor`"
    online = check(*argv, "fp8_per_tensor", gpus=[H200])
    assert (online.code, online.data["plan"]["quantization"]) == (0, "fp8_per_tensor")
    assert online.data["plan"]["memory"]["weights_bytes"] < 17_079_556_546 * 0.6


def test_a_busy_card_stands_against_a_start(check: Check) -> None:
    run = check("--json", "-m", "google/gemma-7b-it", gpus=[{**H200, "used": 100 * GIB}])
    assert (run.code, run.codes) == (1, ["gpu-busy"])
    [problem] = run.answer["problems"]
    beside = problem["hint"].split("`")[-2]
    assert beside == "--gpu-memory-utilization 0.28"
    argv = ["--json", "-m", "google/gemma-7b-it", *beside.split()]
    assert check(*argv, gpus=[{**H200, "used": 100 * GIB}]).code == 0
    # Where the model would not fit beside it, that is not advised.
    full = check("--json", "-m", "google/gemma-7b-it", gpus=[{**H200, "used": 122 * GIB}])
    assert "utilization" not in full.answer["problems"][0]["hint"]


@pytest.mark.parametrize("machine", [{"gpus": []}, {"errors": {"nvmlInit": NO_LIBRARY}}])
def test_without_a_gpu_it_is_said_which_would_do(check: Check, machine: dict[str, Any]) -> None:
    run = check("--json", "-m", "google/gemma-3-4b-it", **machine)
    assert run.code == 1
    assert run.codes[0] in ("no-gpu-visible", "no-gpu-visible")
    assert (run.data["fit"], run.data["plan"], run.data["gpus"]) == (None, None, [])
    assert run.data["model"]["parameters"] == 4_300_079_472
    kinds = [one["kind"] for one in run.data["alternatives"]]
    assert kinds
    assert set(kinds) == {"gpu"}
    for one in run.data["alternatives"]:
        assert check("--json", "-m", "google/gemma-3-4b-it", *one["flags"].split()).code == 0


@pytest.mark.parametrize(
    ("card", "name", "count", "total", "codes"),
    [
        ("h200", "NVIDIA H200", 1, 143_156 * MIB, []),
        ("l4x2", "NVIDIA L4", 2, 22_563 * MIB, []),
        ("24GiB", "24 GiB GPU", 1, 24 * GIB, ["gpu.card_assumed"]),
        ("80GiBx4", "80 GiB GPU", 4, 80 * GIB, ["gpu.card_assumed"]),
    ],
)
def test_gpus_that_are_not_here(
    check: Check, card: str, name: str, count: int, total: int, codes: list[str]
) -> None:
    run = check("--json", "-m", "google/gemma-3-4b-it", "--for-gpu", card, gpus=[T4])
    assert (run.code, run.codes, run.data["fit"]) == (0, codes, "fits")
    assert [gpu["name"] for gpu in run.data["gpus"]] == [name] * count
    assert [gpu["index"] for gpu in run.data["gpus"]] == list(range(count))
    assert (run.data["driver_version"], run.data["cuda_version"]) == (None, None)
    assert abs(run.data["plan"]["memory"]["total_bytes"] - total) <= 8 * MIB
    check_sums(run.data["plan"])
    told = check("-m", "google/gemma-3-4b-it", "--for-gpu", card, gpus=[T4])
    assert told.out.startswith("Planned for ")
    assert name in told.out.splitlines()[0]


@pytest.mark.parametrize("card", ["", "h999", "24", "0GiB", "2TiB", "h200x0", "h200x999", "x", "é"])
def test_a_gpu_that_nobody_knows_is_wrong_usage(check: Check, card: str) -> None:
    run = check("--json", "-m", "google/gemma-3-4b-it", "--for-gpu", card)
    assert run.code == 2
    assert run.codes[0] in ("gpu.card_unknown", "gpu.card_size", "gpu.card_count")
    assert run.answer["problems"][0]["hint"]


def test_on_the_cpu(check: Check) -> None:
    argv = ["--json", "-m", "google/gemma-3-1b-it", "--device", "cpu"]
    run = check(*argv, "--kv-cache-memory-bytes", "512M", errors={"nvmlInit": NO_LIBRARY})
    plan = run.data["plan"]
    assert (run.code, run.codes, run.data["device"]) == (0, [], "cpu")
    assert (run.data["gpus"], run.data["driver_version"]) == ([], None)
    assert (plan["attention_backends"], plan["kv_cache"]["block_size"]) == (["CPU_ATTN"], 128)
    memory = plan["memory"]
    assert memory["kv_cache_bytes"] == 512 * MIB
    assert memory["requested_bytes"] + memory["unused_bytes"] == memory["total_bytes"]
    check_sums(plan)
    assert "--gpu-memory-utilization" not in plan["argv"]
    assert "--enforce-eager" in plan["argv"]
    environ = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    space = check(*argv, environ=environ).data["plan"]
    assert space["memory"]["kv_cache_bytes"] == GIB
    assert "--kv-cache-memory-bytes" not in space["argv"]


def test_on_the_cpu_all_ranks_share_the_memory(check: Check) -> None:
    argv = ["--json", "-m", "google/gemma-3-27b-it", "--device", "cpu", "--dtype", "float32"]
    run = check(*argv, "--tensor-parallel-size", "8", "--kv-cache-memory-bytes", "900G")
    [problem] = run.answer["problems"]
    assert (run.code, problem["code"]) == (1, "plan.does_not_fit")
    assert "does not fit this machine's free memory: it takes 7" in problem["message"]
    assert "KV cache 900.00 GiB for each of 8 ranks) of " in problem["message"]


def test_gpus_named_for_a_cpu_engine_do_not_split_the_model(check: Check) -> None:
    argv = ["--json", "-m", "demo", "--device", "cpu", "--gpus", "0,1"]
    assert check(*argv, gpus=several(H200, 2)).data["plan"]["tensor_parallel_size"] == 1


@pytest.mark.parametrize(
    ("version", "planned", "known"),
    [
        ("0.26.0", "0.26", True),
        ("0.32.0", "0.32", True),
        ("0.33.0rc1", "0.33", True),
        ("0.32.0+cpu", "0.32", True),
        ("0.25.1", "0.26", False),
        ("0.99.0", "0.33", False),
    ],
)
def test_another_version_of_vllm(check: Check, version: str, planned: str, known: bool) -> None:
    argv = ["--json", "-m", "google/gemma-7b-it", "--engine-version", version]
    run = check(*argv, gpus=[H200])
    assert (run.code, run.data["engine_version"]) == (0, version)
    assert run.data["plan"]["planned_vllm_version"] == planned
    assert run.codes == ([] if known else ["engine_version_unknown"])
    if not known:
        [problem] = run.answer["problems"]
        assert f"planned as for vLLM {planned}" in problem["message"]


def test_an_engine_that_is_too_old_for_the_model(check: Check) -> None:
    argv = ["--json", "-m", "google/vaultgemma-1b", "--engine-version"]
    run = check(*argv, "0.26.0", gpus=[H200])
    assert (run.code, run.data["fit"]) == (1, "does_not_fit")
    assert run.answer["problems"] == [
        {
            "code": "arch-unsupported",
            "message": "the installed vLLM has no such model architecture: vLLM 0.26.0 does not "
            "know the architecture VaultGemmaForCausalLM of google/vaultgemma-1b",
            "hint": "install vLLM 0.27.1 or later",
        }
    ]
    assert check(*argv, "0.27.1", gpus=[H200]).code == 0


def test_a_model_without_text(check: Check) -> None:
    run = check("--json", "-m", "google/embeddinggemma-300m", gpus=[H200])
    assert (run.code, run.codes, run.data["fit"]) == (0, ["model.embeds"], "fits")
    not_served = check("--json", "-m", "google/t5gemma-2-4b-4b", gpus=[H200])
    assert not_served.code == 1
    assert "model.not_served" in not_served.codes


def test_an_unknown_name(check: Check) -> None:
    run = check("--json", "-m", "google/gemma-7b-its", gpus=[H200])
    assert (run.code, run.codes) == (1, ["hub.offline", "model.size_unknown"])
    assert (run.data["fit"], run.data["model"], run.data["plan"]) == (None, None, None)
    told = check("-m", "google/gemma-7b-its", gpus=[H200])
    assert "did you mean `--model google/gemma-7b-it`?" in told.err


def test_flags_whose_memory_is_not_planned_make_the_verdict_a_guess(
    check: Check, tmp_path: Path
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: google/gemma-3-27b-it\nengine_args: {cpu-offload-gb: 40}\n")
    run = check("--json", "--config", str(file), gpus=several(L4, 1))
    assert (run.code, run.codes) == (1, ["weights-oom", "plan.not_planned"])
    told = check("--config", str(file), gpus=several(L4, 1))
    assert told.err.startswith(
        "warning: the weights and activations do not fit into the GPU's memory: "
        "google/gemma-3-27b-it does not fit NVIDIA L4"
    )
    # `up` may try: the plan is no more than warned of.
    assert check("--json", "--config", str(file), command="plan", gpus=[L4]).code == 0


def test_the_answer_comes_within_a_second() -> None:
    began = time.monotonic()
    run = run_program("--json", "-m", "google/gemma-3-27b-it", "--for-gpu", "h200")
    took = time.monotonic() - began
    assert (run.code, run.data["fit"], run.data["facts_source"]) == (0, "fits", "catalogue")
    # Twice over, for a machine that does other things beside.
    assert took < 2


FLAGS = {
    "--max-model-len": ["16", "1000", "8192", "128K"],
    "--max-num-seqs": ["1", "7", "256", "4096"],
    "--max-num-batched-tokens": ["16", "2048", "8192"],
    "--tensor-parallel-size": ["1", "2", "3", "8"],
    "--dtype": ["float16", "bfloat16", "float32"],
    "--kv-cache-dtype": ["fp8", "bogus"],
    "--quantization": ["fp8", "fp8_per_tensor", "awq", "bogus"],
    "--gpu-memory-utilization": ["0.01", "0.5", "1"],
    "--kv-cache-memory-bytes": ["1", "512M", "8G", "1T"],
    "--engine-version": ["0.26.0", "0.30.1", "0.99"],
}
KEPT = {
    "--max-model-len": "max_model_len",
    "--max-num-seqs": "max_num_seqs",
    "--max-num-batched-tokens": "max_num_batched_tokens",
    "--tensor-parallel-size": "tensor_parallel_size",
    "--dtype": "dtype",
    "--kv-cache-dtype": "kv_cache_dtype",
    "--quantization": "quantization",
}
CARDS = ["t4", "l4", "l4x4", "a100-40x8", "h200", "1GiB", "24GiBx2", "v100", "b200"]


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    model=st.sampled_from(["demo", *(entry.id for entry in load_catalogue())]),
    card=st.sampled_from(CARDS),
    given_flags=st.fixed_dictionaries(
        {}, optional={flag: st.sampled_from(values) for flag, values in FLAGS.items()}
    ),
)
def test_no_flags_give_a_plan_that_contradicts_itself(
    check: Check, model: str, card: str, given_flags: dict[str, str]
) -> None:
    flags = [word for flag in given_flags.items() for word in flag]
    run = check("--json", "-m", model, "--for-gpu", card, *flags)
    data, plan = run.data, run.data["plan"]
    assert run.code == (0 if data["fit"] == "fits" and run.answer["ok"] else 1)
    assert run.code == 0 or run.codes
    assert all(one["flags"] for one in data["alternatives"])
    if plan is None:
        return
    for flag, name in KEPT.items():
        if flag in given_flags:
            assert str(plan[name]) == given_flags[flag].replace("128K", "131072")
    memory, kv_cache = plan["memory"], plan["kv_cache"]
    used = memory["total_bytes"] - memory["unused_bytes"]
    if data["fit"] == "fits":
        assert used <= memory["requested_bytes"] <= memory["total_bytes"]
        if kv_cache.get("groups"):
            assert kv_cache["max_concurrency"] >= 1
            assert kv_cache["tokens"] >= plan["max_model_len"]
            assert kv_cache["num_blocks"] * kv_cache["bytes_per_block"] <= memory["kv_cache_bytes"]
    else:
        assert not {"tokens", "max_concurrency"} & set(kv_cache)


@pytest.mark.parametrize("version", ["dev", "", "latest", "0"])
def test_what_is_no_version_of_vllm_is_wrong_usage(check: Check, version: str) -> None:
    run = check("--json", "-m", "google/gemma-7b-it", "--engine-version", version, gpus=[H200])
    assert (run.code, run.codes) == (2, ["usage"])


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["-m", "google/gemma-3-12b-it", "--kv-cache-dtype", "fp8", "--for-gpu", "a100-40"],
         "plan.kv_cache_unsupported"),
        (["-m", "google/gemma-7b-it", "--kv-cache-dtype", "bfloat16", "--for-gpu", "t4x2"],
         "plan.kv_cache_unsupported"),
        (["-m", "RedHatAI/gemma-3-27b-it-quantized.w4a16", "--quantization", "fp8_per_tensor",
          "--for-gpu", "h200"], "plan.quantization"),
        (["-m", "google/gemma-4-26B-A4B-it", "--quantization", "fp8_per_channel",
          "--for-gpu", "a100-80"], "quant-capability"),
        (["-m", "google/gemma-4-26B-A4B-it", "--quantization", "nvfp4_per_token",
          "--for-gpu", "h200"], "quant-capability"),
        (["-m", "google/gemma-7b-it", "--gpu-memory-utilization", "1", "--for-gpu", "h200"],
         "weights-oom"),
    ],
)  # fmt: skip
def test_what_vllm_would_die_of_after_it_was_started_does_not_fit(
    check: Check, argv: list[str], code: str
) -> None:
    run = check("--json", *argv)
    assert (run.code, run.data["fit"]) == (1, "does_not_fit")
    assert code in run.codes


def test_a_share_that_leaves_little_for_the_rest_is_a_warning_with_the_share_that_does(
    check: Check,
) -> None:
    argv = ["--json", "-m", "google/gemma-3-1b-it", "--engine-version", "0.28.0"]
    run = check(*argv, "--for-gpu", "8GiB")
    assert (run.code, run.data["fit"]) == (0, "fits")
    [problem] = [p for p in run.answer["problems"] if p["code"] == "plan.little_left"]
    share = problem["hint"].split()[-1].rstrip("`")
    again = check(*argv, "--for-gpu", "8GiB", "--gpu-memory-utilization", share)
    assert "plan.little_left" not in again.codes


def test_a_config_alone_is_enough_for_a_plan_but_not_to_start(check: Check, tmp_path: Path) -> None:
    folder = tmp_path / "gemma-2b"
    folder.mkdir()
    config = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_size": 2048,
              "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8,
              "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000,
              "max_position_embeddings": 8192, "torch_dtype": "bfloat16"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    run = check("--json", "-m", str(folder), "--for-gpu", "l4", "--engine-version", "0.32.0")
    assert (run.code, run.codes) == (0, ["weights-missing"])
    assert run.data["plan"]["memory"]["weights_bytes"] == 5_016_539_426
    assert main(["plan", "--model", str(folder), "--for-gpu", "l4", "--json"]) == 1
