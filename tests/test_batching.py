"""vLLM's default batch, what it refuses, and how many tokens are then in flight."""

from dataclasses import replace

import pytest

from gemma_serve.adapters.package_data import load_engine_rules
from gemma_serve.planning.memory.batching import Device, default_batching
from gemma_serve.planning.memory.engine_rules import rules_for
from gemma_serve.planning.model.geometry import Tower
from kv_models import MODELS

GIB = 2**30
TABLE = load_engine_rules()
H100 = Device(80 * GIB, "NVIDIA H100 80GB HBM3", (9, 0))
A100 = Device(80 * GIB, "NVIDIA A100-SXM4-80GB", (8, 0))
L4 = Device(23 * GIB, "NVIDIA L4", (8, 9))
B200 = Device(179 * GIB, "NVIDIA B200", (10, 0))
GB10 = Device(119 * GIB, "NVIDIA GB10", (12, 1))
SEES = replace(MODELS["gemma-3-4b"], towers=(Tower("image", 400_000_000, 256),))
SEES_VIDEO = replace(MODELS["gemma-4-31B"], towers=(Tower("video", 0, 9_000),))


def batching(device, model="gemma-7b", version="0.32.0", max_model_len=8192, **settings):
    geometry = MODELS[model] if isinstance(model, str) else model
    return default_batching(
        geometry,
        rules=rules_for(version, TABLE)[0],
        device=device,
        tensor_parallel_size=settings.pop("tensor_parallel_size", 1),
        max_model_len=max_model_len,
        **settings,
    )


@pytest.mark.parametrize(
    ("device", "version", "tokens", "seqs"),
    [
        (H100, "0.26.0", 8192, 1024),
        (A100, "0.32.0", 2048, 256),
        (L4, "0.32.0", 2048, 256),
        (B200, "0.27.1", 8192, 1024),
        (B200, "0.28.0", 16384, 1024),
        (GB10, "0.32.0", 8192, 1024),
        (GB10, "0.33.0", 2048, 256),
        (Device(), "0.32.0", 2048, 128),
    ],
)
def test_the_defaults_follow_the_device(device, version, tokens, seqs):
    found = batching(device, version=version)
    assert (found.max_num_batched_tokens, found.max_num_seqs) == (tokens, seqs)


def test_the_cpu_build_takes_a_share_for_each_rank():
    found = batching(Device(), tensor_parallel_size=2)
    assert (found.max_num_batched_tokens, found.max_num_seqs) == (4096, 256)


def test_the_defaults_are_never_more_than_the_requests_can_fill():
    found = batching(H100, max_model_len=512, max_num_seqs=4)
    assert found.max_num_batched_tokens == 2048
    found = batching(H100, max_num_batched_tokens=100)
    assert found.max_num_seqs == 100


def test_throughput_mode_doubles_only_what_is_not_fixed():
    found = batching(H100, throughput_mode=True, max_num_seqs=64)
    assert (found.max_num_batched_tokens, found.max_num_seqs) == (16384, 64)


@pytest.mark.parametrize(
    ("device", "settings", "asynchronous"),
    [
        (H100, {}, True),
        (H100, {"async_scheduling": False}, False),
        (H100, {"speculative_method": "ngram"}, False),
        (H100, {"speculative_method": "ngram", "version": "0.33.0"}, True),
        (H100, {"speculative_method": "draft_model", "version": "0.27.1"}, False),
        (H100, {"speculative_method": "draft_model"}, True),
        (H100, {"speculative_method": "mtp"}, True),
        (H100, {"model": replace(MODELS["gemma-3-1b"], is_pooling=True)}, False),
        (Device(), {"async_scheduling": True}, False),
    ],
)
def test_async_scheduling_and_the_tokens_in_flight(device, settings, asynchronous):
    found = batching(device, **settings)
    assert found.async_scheduling is asynchronous
    assert found.in_flight_tokens == found.max_num_batched_tokens * (1 + asynchronous)


def test_the_default_batch_holds_the_largest_item_that_can_not_be_cut():
    found = batching(L4, SEES_VIDEO)
    assert (found.max_num_batched_tokens, found.raised_for) == (9000, "video")
    assert batching(L4, SEES).raised_for == ""
    assert batching(L4, SEES_VIDEO, text_only=True).max_num_batched_tokens == 2048
    # Still short requests bound it, and then vLLM does not start.
    found = batching(L4, SEES_VIDEO, max_model_len=1000, max_num_seqs=2)
    assert found.max_num_batched_tokens == 2000
    assert [problem.code for problem in found.problems] == ["mm-batch-too-small"]


def test_a_batch_that_can_not_hold_an_image_is_a_problem():
    (problem,) = batching(H100, SEES, max_num_batched_tokens=200, max_num_seqs=8).problems
    assert problem.code == "mm-batch-too-small"
    assert problem.message == (
        "one image takes up to 256 tokens and can't be cut, but a batch holds 200"
    )
    assert (
        problem.hint
        == "say `--max-num-batched-tokens 256`, or serve text alone with `--language-model-only`"
    )


def test_a_model_whose_images_are_cut_has_no_such_bound():
    geometry = replace(MODELS["gemma-4-E4B"], towers=(Tower("image", 1, 280),))
    assert batching(H100, geometry, max_num_batched_tokens=200, max_num_seqs=8).problems == ()


def test_without_chunked_prefill_a_batch_holds_a_whole_request():
    assert batching(L4, chunked_prefill=False).max_num_batched_tokens == 8192
    (problem,) = batching(L4, chunked_prefill=False, max_num_batched_tokens=4096).problems
    assert problem.message == (
        "without chunked prefill a batch of 4096 tokens can't hold a request of 8192"
    )


def test_more_requests_than_tokens_is_a_problem():
    (problem,) = batching(H100, max_num_batched_tokens=64, max_num_seqs=128).problems
    assert problem.code == "plan.batch_too_small"
    assert problem.hint == "say `--max-num-batched-tokens 128` or `--max-num-seqs 64`"
