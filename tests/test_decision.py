"""What is decided where it was left open, and what is refused where it was fixed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_serve.errors import Problem
from gemma_serve.planning.memory.decision import legal_sizes
from gemma_serve.planning.memory.fit import Fit
from gemma_serve.planning.model.facts import FactsReading, ModelFacts, facts_from_config
from gemma_serve.planning.model.weights import HeaderTensor
from gemma_serve.usecases.fit import FitReport
from planned import GIB, chosen, facts, judged


def fit_of(report: FitReport) -> Fit:
    assert report.decision is not None
    assert report.decision.fit is not None
    return report.decision.fit


def reasons(report: FitReport) -> dict[str, str]:
    assert report.decision is not None
    return dict(report.decision.reasons)


def only_problem(report: FitReport) -> Problem:
    [problem] = report.problems
    return problem


@pytest.mark.parametrize(
    ("model", "gpus", "plan"),
    [
        ("google/gemma-7b-it", "h200", (1, "bfloat16", 8192, 1024, 8192)),
        ("google/gemma-7b-it", "b200", (1, "bfloat16", 8192, 1024, 16384)),
        ("google/gemma-7b-it", "a100-80", (1, "bfloat16", 8192, 256, 2048)),
        ("google/gemma-3-12b-it", "l4x4", (2, "bfloat16", 131072, 256, 2048)),
        ("google/gemma-3-27b-it", "l40sx4", (2, "bfloat16", 131072, 256, 2048)),
        ("google/gemma-3-27b-it", "l4x8", (4, "bfloat16", 131072, 256, 2048)),
        ("google/gemma-4-26B-A4B-it", "h200", (1, "bfloat16", 262144, 1024, 8192)),
        # A video of Gemma 4 can't be cut.
        ("google/gemma-4-26B-A4B-it", "l40sx4", (2, "bfloat16", 262144, 256, 2496)),
    ],
)
def test_the_fewest_gpus_and_the_longest_context(
    model: str, gpus: str, plan: tuple[Any, ...]
) -> None:
    report = judged(model, gpus)
    assert report.fits
    assert chosen(report) == plan
    # The plan stands: fixed in every point, it is the same.
    names = ("tensor_parallel_size", "dtype", "max_model_len", "max_num_seqs",
             "max_num_batched_tokens")  # fmt: skip
    fixed = judged(model, gpus, **dict(zip(names, plan, strict=True)))
    assert fit_of(fixed) == fit_of(report)
    assert reasons(fixed) == {}


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("google/gemma-7b-it", (1, 2, 4, 8, 16)),
        ("google/gemma-2b-it", (1, 2, 4, 8)),
        ("google/gemma-3-1b-it", (1, 2, 4)),
        ("google/gemma-3-27b-it", (1, 2, 4, 8, 16, 32)),
        ("google/embeddinggemma-300m", (1,)),
    ],
)
def test_sizes_that_vllm_can_split_a_model_into(model: str, sizes: tuple[int, ...]) -> None:
    assert legal_sizes(facts(model), 32) == sizes


def test_with_too_little_room_the_context_is_as_long_as_it_gets() -> None:
    report = judged("google/gemma-7b-it", "rtx4090")
    length = fit_of(report).settings.max_model_len
    assert report.fits
    assert reasons(report)["max_model_len"] == "the longest that fits"
    assert 2048 <= length < 8192
    assert length % 256 == 0
    assert fit_of(report).longest_model_len >= length
    batch = {"max_num_seqs": 256, "max_num_batched_tokens": 2048}
    margin = fit_of(report).memory.margin_bytes // (448 * 2**10)  # bytes of a token
    longer = length + margin + 512
    assert not judged("google/gemma-7b-it", "rtx4090", max_model_len=longer, **batch).fits


def test_smaller_batches_make_room() -> None:
    report = judged("google/gemma-2-2b-it", "8GiB")
    assert report.fits
    assert reasons(report)["max_num_seqs"] == "smaller than vLLM's default, to make room"
    assert reasons(report)["max_num_batched_tokens"] == reasons(report)["max_num_seqs"]
    planned = fit_of(report).settings
    usual = judged("google/gemma-2-2b-it", "8GiB", max_num_seqs=256, max_num_batched_tokens=2048)
    assert planned.max_num_seqs < 256
    assert not usual.fits or fit_of(usual).settings.max_model_len < planned.max_model_len


def test_a_smaller_batch_still_holds_a_whole_video() -> None:
    """On 73 GiB vLLM's default is 8192 tokens, with which nothing is left for the cache."""
    report = judged("google/gemma-4-31B-it", "73GiB")
    assert report.fits
    assert fit_of(report).settings.max_num_batched_tokens == 2496
    assert reasons(report)["max_num_seqs"] == "smaller than vLLM's default, to make room"


@pytest.mark.parametrize(
    ("model", "fixed", "tokens"),
    [
        # vLLM would cut its default to what the requests can hold, and then not start.
        ("google/gemma-3-4b-it", {"max_num_seqs": 1, "max_model_len": 100}, 256),
        ("google/gemma-4-31B-it", {"max_num_seqs": 1, "max_model_len": 1000}, 2496),
        ("google/gemma-2-2b-it", {"max_num_seqs": 9000}, 9000),
    ],
)
def test_a_batch_that_was_left_open_is_never_one_that_vllm_refuses(
    model: str, fixed: dict[str, int], tokens: int
) -> None:
    report = judged(model, "h200", **fixed)
    assert report.fits
    assert fit_of(report).settings.max_num_batched_tokens == tokens
    assert reasons(report)["max_num_batched_tokens"] == "the fewest that vLLM accepts here"
    assert report.problems == ()


@pytest.mark.parametrize(
    ("model", "gpu", "dtype", "reason"),
    [
        ("google/gemma-7b-it", "a100-40", "bfloat16", None),
        (
            "google/gemma-2b-it",
            "t4",
            "float16",
            "compute capability 7.5 has no bfloat16; this Gemma runs in float16 too",
        ),
        (
            "google/gemma-3-1b-it",
            "t4",
            "float32",
            "compute capability 7.5 has no bfloat16, and this Gemma is not stable in float16",
        ),
        (
            "google/gemma-4-E2B-it",
            "rtx8000",
            "float32",
            "compute capability 7.5 has no bfloat16, and this Gemma is not stable in float16",
        ),
        ("google/gemma-3-1b-it", "cpu", "bfloat16", None),
    ],
)
def test_the_dtype_that_the_device_can_do(
    model: str, gpu: str, dtype: str, reason: str | None
) -> None:
    cache = {"kv_cache_memory_bytes": 2 * GIB} if gpu == "cpu" else {}
    report = judged(model, gpu, **cache)
    assert report.fits
    assert fit_of(report).settings.dtype == dtype
    assert reasons(report).get("dtype") == reason


def test_a_gpu_that_vllm_has_no_kernels_for() -> None:
    report = judged("google/gemma-2b-it", "v100-32")
    assert not report.fits
    assert only_problem(report) == Problem(
        "no-kernel-image",
        "Tesla V100-SXM2-32GB has compute capability 7.0, for which vLLM's wheels hold no kernels",
        "take a GPU with compute capability 7.5 or newer",
    )


FIXED = [
    ("google/gemma-7b-it", "h200", {"max_model_len": 10_000}, "len-over-derived",
     "say `--max-model-len 8192`"),
    ("google/gemma-3-12b-it", "l4x4", {"tensor_parallel_size": 3}, "tp-heads",
     "say `--tensor-parallel-size 2`"),
    ("google/gemma-3-27b-it", "l4x8", {"tensor_parallel_size": 6}, "tp-heads",
     "say `--tensor-parallel-size 4`"),
    ("google/gemma-3-4b-it", "h200", {"max_num_batched_tokens": 128}, "mm-batch-too-small",
     "say `--max-num-batched-tokens 256` or `--language-model-only`"),
    ("google/gemma-2-2b-it", "h200", {"max_num_seqs": 900, "max_num_batched_tokens": 512},
     "plan.batch_too_small",
     "say `--max-num-batched-tokens 900` or `--max-num-seqs 512` or `--max-num-seqs 1024 "
     "--max-num-batched-tokens 8192`"),
    ("google/gemma-2-2b-it", "h200", {"dtype": "float16"}, "fp16-refused",
     "say `--dtype bfloat16`"),
    ("google/gemma-2-2b-it", "t4", {"dtype": "float16"}, "fp16-refused", "say `--dtype float32`"),
    ("google/gemma-3-1b-it", "t4", {"quantization": "fp8_per_tensor"}, "plan.quantization_dtype",
     "leave `--quantization` out"),
    ("google/gemma-3-27b-it", "h100", {"quantization": "fp8"}, "plan.quantization",
     "say `--quantization fp8_per_tensor`"),
    ("google/gemma-3-1b-it", "l4", {"kv_cache_dtype": "fp4"}, "plan.kv_cache_unsupported",
     "say `--kv-cache-dtype auto`"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "gpus", "fixed", "code", "hint"), FIXED)
def test_what_was_fixed_is_kept_and_the_nearest_that_works_is_named(
    model: str, gpus: str, fixed: dict[str, Any], code: str, hint: str
) -> None:
    report = judged(model, gpus, **fixed)
    planned = fit_of(report).settings
    assert not report.fits
    assert {name: getattr(planned, name) for name in fixed} == fixed
    assert (only_problem(report).code, only_problem(report).hint) == (code, hint)


def test_a_hint_that_alone_will_not_do_says_so() -> None:
    report = judged("google/gemma-3-27b-it", "l4", quantization="fp8")
    assert only_problem(report).hint == (
        "say `--quantization fp8_per_tensor`; with the rest as it is, that won't do: take a Gemma "
        "that fits: `--model RedHatAI/gemma-3-27b-it-quantized.w4a16 without --quantization`"
    )


def test_several_settings_at_once_where_no_single_one_would_do() -> None:
    report = judged("google/gemma-7b-it", "h200x4", max_model_len=9000, tensor_parallel_size=3)
    assert [(p.code, p.hint) for p in report.problems] == [
        ("len-over-derived", "say `--max-model-len 8192 --tensor-parallel-size 1`"),
        ("tp-heads", "say `--max-model-len 8192 --tensor-parallel-size 1`"),
    ]


@pytest.mark.parametrize(
    ("version", "name", "accepted"),
    [
        ("0.26.0", "fp8", True),
        ("0.30.0", "fp8", True),
        ("0.30.0", "fp8_per_tensor", True),
        ("0.31.0", "fp8", False),
        ("0.32.0", "fp8", False),
        ("0.33.0", "fp8_per_tensor", True),
        ("0.32.0", "no-such-method", False),
        ("0.32.0", "awq", False),
    ],
)
def test_names_of_what_quantizes_while_loading(version: str, name: str, accepted: bool) -> None:
    report = judged("google/gemma-3-12b-it", "h200", version, quantization=name)
    assert report.fits is accepted
    assert [p.code for p in report.problems] == ([] if accepted else ["plan.quantization"])


def test_without_the_towers_there_is_more_room() -> None:
    whole = fit_of(judged("google/gemma-3-12b-it", "rtx5090"))
    text = fit_of(judged("google/gemma-3-12b-it", "rtx5090", language_model_only=True))
    assert whole.weights.towers_bytes > 0
    assert text.weights.towers_bytes == 0
    assert text.weights.text_bytes == whole.weights.text_bytes
    assert text.weights.total_bytes <= whole.weights.total_bytes - whole.weights.towers_bytes


def test_a_model_that_makes_embeddings_keeps_no_cache() -> None:
    report = judged("google/embeddinggemma-300m", "l4")
    assert report.fits
    assert fit_of(report).kv_cache is not None
    assert fit_of(report).kv_cache.groups == ()  # type: ignore[union-attr]
    assert [(p.code, p.blocking) for p in report.problems] == [("model.embeds", False)]


def unknown(size_bytes: int) -> FactsReading:
    tensor = HeaderTensor("model.weight", "BF16", (size_bytes // 2,), size_bytes)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return facts_from_config("some/llama", config, source="folder", tensors=[tensor])


def unknown_facts(size_bytes: int) -> ModelFacts:
    known = unknown(size_bytes).facts
    assert known is not None
    return known


def test_of_a_model_that_is_no_gemma_only_the_weights_are_known() -> None:
    assert [(p.code, p.blocking) for p in unknown(GIB).problems] == [
        ("model.unknown_architecture", False)
    ]
    report = judged(unknown_facts(16 * GIB), "l4", max_num_seqs=8)
    assert report.fits
    fit = fit_of(report)
    assert (fit.weights.total_bytes, fit.weights.approximate) == (16 * GIB, True)
    assert (fit.kv_cache, fit.capacity, fit.attention, fit.runtime) == (None, None, None, None)
    assert report.decision is not None
    # What vLLM will take is not told, since nobody knows the model.
    assert report.decision.left_open == {"max_model_len", "max_num_batched_tokens"}
    assert reasons(report) == {"tensor_parallel_size": "one is enough"}
    large = judged(unknown_facts(30 * GIB), "l4x4")
    assert chosen(large)[0] == 2
    assert not judged(unknown_facts(100 * GIB), "l4x4").fits


def test_flags_that_are_not_planned_make_a_guess_of_the_verdict() -> None:
    report = judged("google/gemma-3-27b-it", "l4", engine_args={"cpu-offload-gb": "40"})
    assert not report.fits
    assert [(p.code, p.blocking) for p in report.problems] == [
        ("weights-oom", False),
        ("plan.not_planned", False),
    ]
    # What vLLM refuses whatever the memory stays refused.
    wrong = judged(
        "google/gemma-3-27b-it", "l4", engine_args={"cpu-offload-gb": "40"}, dtype="float16"
    )
    assert [(p.code, p.blocking) for p in wrong.problems] == [
        ("fp16-refused", True),
        ("plan.not_planned", False),
    ]


def test_a_number_of_blocks_takes_the_memory_of_that_many() -> None:
    model = "google/gemma-7b-it"
    few = fit_of(judged(model, "h200", engine_args={"num-gpu-blocks-override": "1000"}))
    assert few.kv_cache is not None
    assert few.capacity is not None
    block = few.kv_cache.pool_bytes_per_block
    assert (few.capacity.num_blocks, few.memory.kv_cache_bytes) == (1000, 1000 * block)
    too_many = judged(model, "h200", engine_args={"num-gpu-blocks-override": "1000000"})
    assert not too_many.fits
    assert only_problem(too_many).code == "weights-oom"


def test_more_gpus_than_there_are_do_not_fit() -> None:
    report = judged("google/gemma-7b-it", "h200x2", tensor_parallel_size=4)
    assert not report.fits
    assert fit_of(report).fits
    assert [one.flags for one in report.alternatives if one.kind == "setting"] == [
        "--tensor-parallel-size 2"
    ]


def test_on_a_cpu_all_ranks_live_in_the_same_memory() -> None:
    one = judged("google/gemma-2-2b-it", "cpu", kv_cache_memory_bytes=20 * GIB)
    assert one.fits
    four = {"kv_cache_memory_bytes": 20 * GIB, "tensor_parallel_size": 4}
    assert not judged("google/gemma-2-2b-it", "cpu", **four).fits


MODELS = [
    "google/gemma-2b-it", "google/gemma-7b-it", "google/gemma-2-9b-it", "google/gemma-3-1b-it",
    "google/gemma-3-12b-it", "google/gemma-3n-E4B-it", "google/gemma-4-12B-it",
    "google/gemma-4-31B-it", "google/gemma-4-26B-A4B-it", "google/paligemma2-3b-pt-448",
]  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(MODELS), st.integers(6, 200), st.integers(1, 8), st.integers(1, 200))
def test_with_more_memory_what_fits_goes_on_fitting(
    model: str, size: int, count: int, more: int
) -> None:
    before, after = (judged(model, f"{gib}GiBx{count}") for gib in (size, size + more))
    assert after.fits or not before.fits


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(MODELS), st.integers(6, 200), st.data())
def test_what_fits_goes_on_fitting_with_a_shorter_context(
    model: str, size: int, data: st.DataObject
) -> None:
    report = judged(model, f"{size}GiBx2")
    if not report.fits:
        return
    planned = dataclasses.asdict(fit_of(report).settings)
    fixed = {name: planned[name] for name in ("tensor_parallel_size", "max_num_seqs",
                                               "max_num_batched_tokens")}  # fmt: skip
    length = data.draw(st.integers(1, planned["max_model_len"]))
    assert judged(model, f"{size}GiBx2", max_model_len=length, **fixed).fits
