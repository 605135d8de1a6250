"""Memory beside weights and KV cache: against measured starts, and what must hold for any Gemma."""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_configs import PUBLIC
from gemma_serve.adapters.package_data import load_engine_rules, load_runtime_constants
from gemma_serve.planning.memory.activation_memory import ProfileRun, forward_peak
from gemma_serve.planning.memory.attention_backend import choose_attention
from gemma_serve.planning.memory.engine_rules import rules_for
from gemma_serve.planning.memory.kv_cache import KvCacheLayout, plan_kv_cache
from gemma_serve.planning.memory.runtime_memory import (
    RuntimeMemory,
    RuntimeSettings,
    capture_sizes,
    runtime_memory,
)
from gemma_serve.planning.model.geometry import (
    Attention,
    Experts,
    Geometry,
    Layer,
    Parameter,
    Tower,
)
from gemma_serve.planning.model.model_config import read_geometry
from gemma_serve.planning.model.parameters import allocation_rules, text_parameters
from gemma_serve.planning.model.torch_allocator import allocated_bytes
from gemma_serve.planning.model.weights import weights_bytes

MIB = 2**20
CONSTANTS = load_runtime_constants()

GEMMA_7B = Geometry(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    hidden_size=3072,
    vocab_size=256000,
    layers=(Layer(Attention(16, 16, 256), 24576),) * 28,
    ropes=(),
    max_model_len=8192,
)
H200_SERVE = RuntimeSettings(
    device="cuda",
    release=(0, 26),
    dtype="bfloat16",
    tensor_parallel_size=1,
    max_num_seqs=1024,
    max_num_batched_tokens=8192,
    max_model_len=8192,
    group_block_sizes=(16,),
    compute_capability=(9, 0),
)
H200_BYTES = 150_109_880_320
MEASURED = json.loads((Path(__file__).parent / "data/h200_memory.json").read_text())
CASES = [pytest.param(case, id=case["name"]) for case in MEASURED["cases"]]


def names(memory: RuntimeMemory) -> dict[str, list[str]]:
    return {
        "runtime": [part.name for part in memory.runtime],
        "outside": [part.name for part in memory.outside],
        "after_sizing": [part.name for part in memory.after_sizing],
    }


def parts(memory: RuntimeMemory) -> dict[str, tuple[int, int]]:
    """Bytes and margin of every part."""
    every = (*memory.runtime, memory.activation, *memory.outside, *memory.after_sizing)
    return {part.name: (part.bytes, part.margin_bytes) for part in every}


def kv_layout(case: dict[str, Any]) -> KvCacheLayout:
    geometry = read_geometry(case["config"])
    rules, _ = rules_for(MEASURED["vllm"], load_engine_rules())
    attention = choose_attention(geometry, rules=rules, capability=(9, 0), dtype="bfloat16")
    return plan_kv_cache(
        geometry,
        rules=rules,
        attention=attention,
        tensor_parallel_size=1,
        max_model_len=case["max_model_len"],
        max_num_batched_tokens=case["max_num_batched_tokens"],
        async_scheduling=True,
    )


def predicted(case: dict[str, Any]) -> RuntimeMemory:
    settings = replace(
        H200_SERVE,
        max_num_seqs=case["max_num_seqs"],
        max_num_batched_tokens=case["max_num_batched_tokens"],
        max_model_len=case["max_model_len"],
        group_block_sizes=tuple(group.block_size for group in kv_layout(case).groups),
        enforce_eager=case["enforce_eager"],
        quantization=case["quantization"],
        attention_backend=case["attention_backend"],
    )
    return runtime_memory(read_geometry(case["config"]), settings, CONSTANTS)


def planned_forward(case: dict[str, Any], tokens: int) -> int:
    run = ProfileRun(
        tokens,
        rows=1,
        element_bytes=2,
        eager=case["enforce_eager"],
        quantized=case["quantization"] is not None,
    )
    return forward_peak(read_geometry(case["config"]), run)


def loaded_bytes(case: dict[str, Any]) -> int:
    """The model's tensors as torch's allocator rounds them."""
    geometry, tokens = read_geometry(case["config"]), case["max_num_batched_tokens"]
    if case["quantization"] is not None:  # this one's are whole steps of the allocator
        quantized = weights_bytes(
            geometry,
            dtype="bfloat16",
            quantization=case["quantization"],
            max_num_batched_tokens=tokens,
            release=(0, 26),
        )
        assert quantized is not None
        return quantized.total_bytes

    def each(parameter: Parameter) -> int:
        size = parameter.rank_rows(1) * parameter.rank_columns(1)
        return allocated_bytes(size * (parameter.bytes_per_element or 2)) * parameter.count

    parameters = text_parameters(geometry, allocation_rules((0, 26)), max_num_batched_tokens=tokens)
    return sum(each(parameter) for parameter in parameters)


@pytest.mark.parametrize("case", CASES)
def test_every_measured_part_is_within_its_margin(case: dict[str, Any]) -> None:
    found = parts(predicted(case))
    for name, measured in (
        ("activations", case["peak_activation_bytes"]),
        ("kernels", case["non_torch_bytes"]),
        ("CUDA context", case["context_bytes"]),
    ):
        size, margin = found[name]
        assert abs(size - measured) <= margin, name


@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_activations_is_within_four_mib_of_what_was_traced(
    case: dict[str, Any],
) -> None:
    size, _ = parts(predicted(case))["activations"]
    assert 0 <= size - case["peak_activation_bytes"] < 4 * MIB


@pytest.mark.parametrize("case", CASES)
def test_the_kv_cache_is_within_a_tenth_of_a_percent_of_the_engines(case: dict[str, Any]) -> None:
    memory = predicted(case)
    requested = ceil(MEASURED["total_bytes"] * MEASURED["gpu_memory_utilization"])
    assert requested == case["requested_bytes"]
    available = requested - loaded_bytes(case) - memory.runtime_bytes - memory.activation_bytes
    measured = case["available_kv_cache_bytes"]
    assert available == pytest.approx(measured, rel=0.001)
    if case["kv_tokens"] is not None:
        assert kv_layout(case).with_memory(measured).tokens == case["kv_tokens"]
        tokens = kv_layout(case).with_memory(available).tokens
        assert tokens == pytest.approx(case["kv_tokens"], rel=0.001)


@pytest.mark.parametrize("case", CASES)
def test_loaded_tensors_are_rounded_as_torch_rounds_them(case: dict[str, Any]) -> None:
    # Tensors below 10 MiB share memory in ways that depend on their order.
    assert abs(loaded_bytes(case) - case["weights_bytes"]) < 16 * MIB


@pytest.mark.parametrize(
    ("case", "tokens"),
    [
        pytest.param(case, int(tokens), id=f"{case['name']}-{tokens}")
        for case in MEASURED["cases"]
        for tokens in case["forward_peaks"]
    ],
)
def test_a_forward_of_fewer_tokens_peaks_where_it_was_measured(
    case: dict[str, Any], tokens: int
) -> None:
    found = planned_forward(case, tokens)
    # A block of the allocator's pool may be up to a MiB larger than what is asked for.
    assert abs(found - case["forward_peaks"][str(tokens)]) < 4 * MIB


def test_the_cuda_graphs_are_within_their_margin() -> None:
    measured = {
        case["name"]: case["cuda_graphs_bytes"] or case["estimated_cuda_graphs_bytes"]
        for case in MEASURED["cases"]
    }
    graphs = {
        case["name"]: parts(predicted(case))["CUDA graphs"]
        for case in MEASURED["cases"]
        if measured[case["name"]] is not None
    }
    assert sorted(graphs) == [
        "gemma-2-9b-compiled",
        "gemma-3-1b-compiled",
        "gemma-4-26B-A4B-compiled",
        "gemma-7b-2048-256-compiled",
        "gemma-7b-compiled",
        "gemma-7b-fp8-compiled",
    ]
    for name, (size, margin) in graphs.items():
        assert abs(size - measured[name]) <= margin, name
        assert margin < size / 3, name


# Gemma 7B with fp8 weights and an fp8 KV cache, as the logs of other starts have them.
@pytest.mark.parametrize(("backend", "log_gib"), [("FLASH_ATTN", 0.67), ("TRITON_ATTN", 0.45)])
def test_the_cuda_graphs_of_the_logs_are_within_their_margin(backend: str, log_gib: float) -> None:
    settings = replace(H200_SERVE, quantization="fp8", attention_backend=backend)
    size, margin = parts(runtime_memory(GEMMA_7B, settings, CONSTANTS))["CUDA graphs"]
    assert abs(size - log_gib * 1024 * MIB) <= margin


def test_flash_attention_3_splits_cost_room_in_whole_graphs_alone() -> None:
    def size(**changes: Any) -> int:
        settings = replace(H200_SERVE, **changes)
        return parts(runtime_memory(GEMMA_7B, settings, CONSTANTS))["CUDA graphs"][0]

    # 32 parts of 512 tokens of 16 heads of 256 in float32, once or twice.
    assert size() - size(attention_backend="TRITON_ATTN") == 32 * 512 * 16 * 256 * 4 * 3 // 2
    fewer = size(max_num_seqs=256) - size(max_num_seqs=256, attention_backend="TRITON_ATTN")
    assert fewer == 32 * 256 * 16 * 256 * 4 * 3 // 2


def test_a_tensor_of_its_own_memory_takes_whole_steps_of_two_mib() -> None:
    assert [allocated_bytes(size) for size in (1, 512, 513)] == [512, 512, 1024]
    assert allocated_bytes(10 * MIB - 1) == 10 * MIB
    assert allocated_bytes(11 * MIB) == 12 * MIB  # the rest is too small for another
    assert allocated_bytes(21 * MIB // 2) == 21 * MIB // 2  # the rest goes to another
    assert allocated_bytes(441 * MIB // 2) == 222 * MIB


@pytest.mark.parametrize("case", CASES)
def test_the_runners_tables_are_within_their_margin(case: dict[str, Any]) -> None:
    found = parts(predicted(case))
    tables = [found[name] for name in ("sampling tables", "input buffers") if name in found]
    size, margin = (sum(each) for each in zip(*tables, strict=True))
    # The first runner's count has its block tables, too.
    block_tables = 0 if "sampling tables" in found else found["block tables"][0]
    assert abs(size + block_tables - case["tables_bytes"]) <= margin + block_tables


# What the logs of other starts give, of Gemma 7B's shape on the same kind of GPU, by vLLM's count
# of the weights: vLLM 0.26.0, utilization 0.9.
@pytest.mark.parametrize(
    ("first_start", "quantization", "weights_bytes", "kv_bytes_per_block", "measured_tokens"),
    [
        pytest.param(False, None, 17_079_614_464, 7_340_032, 253_648, id="bf16, second start"),
        pytest.param(True, "fp8", 9_328_482_754, 7_340_032, 269_920, id="fp8"),
        pytest.param(True, "fp8", 9_328_482_754, 3_670_016, 539_856, id="fp8 with fp8 KV"),
    ],
)
def test_the_kv_cache_of_gemma_7b_is_that_of_the_logs(
    first_start: bool,
    quantization: str | None,
    weights_bytes: int,
    kv_bytes_per_block: int,
    measured_tokens: int,
) -> None:
    settings = replace(H200_SERVE, first_start=first_start, quantization=quantization)
    memory = runtime_memory(GEMMA_7B, settings, CONSTANTS)
    requested = ceil(H200_BYTES * 0.9)
    available = requested - weights_bytes - memory.runtime_bytes - memory.activation_bytes
    tokens = available // kv_bytes_per_block * 16
    assert tokens == pytest.approx(measured_tokens, rel=0.0002)


def test_a_first_start_is_planned_for_and_a_later_one_needs_no_more() -> None:
    first = runtime_memory(GEMMA_7B, H200_SERVE, CONSTANTS).activation
    later = runtime_memory(GEMMA_7B, replace(H200_SERVE, first_start=False), CONSTANTS).activation
    assert first.bytes - later.bytes == 252 * MIB
    assert "a later start takes 252 MiB less" in first.explanation


def test_capture_sizes_are_those_that_the_engine_logs() -> None:
    assert capture_sizes(H200_SERVE) == (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
    assert capture_sizes(replace(H200_SERVE, max_num_seqs=4)) == (1, 2, 4, 8)
    assert capture_sizes(replace(H200_SERVE, compute_capability=(10, 0)))[-1] == 1024
    assert capture_sizes(replace(H200_SERVE, enforce_eager=True)) == ()


def test_each_release_counts_what_it_counts() -> None:
    sampling = ["sampling tables", "input buffers"]
    assert names(runtime_memory(GEMMA_7B, H200_SERVE, CONSTANTS)) == {
        "runtime": ["kernels"],
        "outside": ["CUDA context"],
        "after_sizing": ["block tables", *sampling, "CUDA graphs"],
    }
    assert names(runtime_memory(GEMMA_7B, replace(H200_SERVE, release=(0, 28)), CONSTANTS)) == {
        "runtime": ["kernels", *sampling],
        "outside": ["CUDA context"],
        "after_sizing": ["block tables", "CUDA graphs"],
    }
    later = replace(H200_SERVE, release=(0, 32), tensor_parallel_size=2)
    assert names(runtime_memory(GEMMA_7B, later, CONSTANTS)) == {
        "runtime": ["kernels", *sampling, "CUDA graphs"],
        "outside": ["CUDA context", "NCCL and all-reduce buffers"],
        "after_sizing": ["block tables"],
    }


def test_mixtures_of_experts_run_on_the_first_runner_until_0_29() -> None:
    experts = replace(
        GEMMA_7B, layers=(Layer(Attention(16, 8, 256), 2112, Experts(128, 8, 704)),) * 30
    )
    old = runtime_memory(experts, H200_SERVE, CONSTANTS)
    new = runtime_memory(experts, replace(H200_SERVE, release=(0, 29)), CONSTANTS)
    assert "sampling tables" not in names(old)["runtime"] + names(old)["after_sizing"]
    assert "CUDA graphs" in names(old)["runtime"]
    assert "sampling tables" in names(new)["runtime"]


def test_the_penalty_table_has_a_row_of_the_vocabulary_for_each_sequence() -> None:
    settings = replace(H200_SERVE, release=(0, 32))
    counts, masks, lists = 256000 * 4, 2 * 256000 // 8, (4 * 1024 + 129 + 128 + 128) * 4
    size, _ = parts(runtime_memory(GEMMA_7B, settings, CONSTANTS))["sampling tables"]
    assert size == 1024 * (counts + masks + lists)


def test_block_tables_follow_the_groups_and_the_length() -> None:
    settings = replace(H200_SERVE, max_model_len=8200, group_block_sizes=(16, 32))
    blocks = 520 + 260  # rounded up to 128 tokens
    sizes = {
        part.name: part.bytes for part in runtime_memory(GEMMA_7B, settings, CONSTANTS).after_sizing
    }
    assert sizes["block tables"] == 2 * 1024 * blocks * 4 + 2 * 8192 * 8


def test_a_small_batch_peaks_in_the_sampler_and_a_large_one_in_the_forward() -> None:
    small = replace(H200_SERVE, max_num_batched_tokens=1024, enforce_eager=True)
    assert "sampling" in runtime_memory(GEMMA_7B, small, CONSTANTS).activation.explanation
    large = replace(H200_SERVE, enforce_eager=True)
    assert "forward" in runtime_memory(GEMMA_7B, large, CONSTANTS).activation.explanation


def test_squashed_logits_are_held_twice() -> None:
    small = replace(H200_SERVE, max_num_batched_tokens=1024, enforce_eager=True)
    plain = runtime_memory(GEMMA_7B, small, CONSTANTS).activation_bytes
    squashed = runtime_memory(replace(GEMMA_7B, softcaps_logits=True), small, CONSTANTS)
    best_of_each_block = 1024 * 250 * 12
    assert squashed.activation_bytes - plain == 1024 * 256000 * 2 - best_of_each_block


SIGLIP = (
    Parameter("patch_embedding", "towers", (1152,), 588),
    Parameter("position_embedding", "towers", (4096,), 1152),
    Parameter("fc1", "towers", (4304,), 1152, 27),
)
SEEING = replace(GEMMA_7B, towers=(Tower("image", 400_000_000, 256, SIGLIP),))


def test_a_tower_costs_nothing_in_a_text_only_engine() -> None:
    settings = replace(H200_SERVE, release=(0, 32), language_model_only=True)
    assert runtime_memory(SEEING, settings, CONSTANTS) == runtime_memory(
        GEMMA_7B, settings, CONSTANTS
    )


def test_from_0_27_on_the_encoder_is_profiled_with_all_images_that_a_batch_can_hold() -> None:
    settings = replace(H200_SERVE, release=(0, 28), enforce_eager=True)
    memory = runtime_memory(SEEING, settings, CONSTANTS)
    text = runtime_memory(GEMMA_7B, settings, CONSTANTS)
    patches = 8192 // 256 * 4096
    elements = patches * (588 + 4 * 1152 + 2 * 4304)
    assert memory.activation_bytes == elements * 2 + 32 * MIB + 64 * 1024
    assert "encoder" in memory.activation.explanation
    assert memory.activation.margin_bytes > memory.activation_bytes // 4
    assert memory.runtime_bytes - text.runtime_bytes == 8192 * 3072 * 2
    unseen = runtime_memory(SEEING, replace(settings, release=(0, 26)), CONSTANTS)
    assert unseen.activation_bytes < text.activation_bytes + MIB


def test_the_encoders_output_is_kept_beside_the_forward() -> None:
    small = replace(SIGLIP[1], rows=(16,))
    geometry = replace(SEEING, towers=(replace(SEEING.towers[0], contents=(SIGLIP[0], small)),))
    settings = replace(H200_SERVE, release=(0, 28), enforce_eager=True)
    kept = runtime_memory(geometry, settings, CONSTANTS).activation_bytes
    text = runtime_memory(GEMMA_7B, settings, CONSTANTS).activation_bytes
    assert kept - text == 8192 * 3072 * 2


def test_what_was_only_read_has_a_wider_margin_than_what_was_traced() -> None:
    def share(**changes: Any) -> float:
        part = runtime_memory(GEMMA_7B, replace(H200_SERVE, **changes), CONSTANTS).activation
        return part.margin_bytes / part.bytes

    traced = share(enforce_eager=True)
    assert traced < 0.02
    assert share(enforce_eager=True, release=(0, 28)) > 5 * traced
    assert share(enforce_eager=True, tensor_parallel_size=2) > 5 * traced
    assert share(enforce_eager=True, quantization="fp8") > 5 * traced


def test_another_gpu_than_the_measured_one_has_wider_margins() -> None:
    def margins(capability: tuple[int, int] | None) -> list[int]:
        settings = replace(H200_SERVE, compute_capability=capability)
        found = parts(runtime_memory(GEMMA_7B, settings, CONSTANTS))
        return [found[name][1] for name in ("kernels", "CUDA context")]

    measured = margins((9, 0))
    for other in ((8, 0), (8, 9), (12, 0), None):
        assert all(wide > narrow for wide, narrow in zip(margins(other), measured, strict=True))


def test_on_the_cpu_there_are_processes_and_tensors_only() -> None:
    memory = runtime_memory(GEMMA_7B, replace(H200_SERVE, device="cpu"), CONSTANTS)
    assert names(memory) == {"runtime": ["processes"], "outside": [], "after_sizing": []}


settings_of_any_engine = st.builds(
    RuntimeSettings,
    device=st.sampled_from(["cuda", "cpu"]),
    release=st.sampled_from([(0, minor) for minor in range(25, 35)]),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    quantization=st.sampled_from([None, "fp8"]),
    tensor_parallel_size=st.sampled_from([1, 2, 4, 8]),
    max_num_seqs=st.integers(1, 2048),
    max_num_batched_tokens=st.integers(1, 32768),
    max_model_len=st.integers(1, 1 << 20),
    group_block_sizes=st.lists(st.sampled_from([16, 32, 64, 128, 256]), min_size=1).map(tuple),
    compute_capability=st.sampled_from([None, (7, 5), (8, 0), (9, 0), (10, 0)]),
    enforce_eager=st.booleans(),
    language_model_only=st.booleans(),
    attention_backend=st.sampled_from([None, "FLASH_ATTN", "FLASHINFER"]),
    first_start=st.booleans(),
)


geometries = st.sampled_from([read_geometry(config) for config in PUBLIC.values()])


@st.composite
def any_geometry(draw: st.DrawFn) -> Geometry:
    """A public Gemma, or one of any sizes at all."""
    geometry = draw(geometries)
    if draw(st.booleans()):
        return geometry
    heads, experts = draw(st.integers(1, 64)), draw(st.integers(1, 128))
    attention = Attention(heads, draw(st.integers(1, heads)), draw(st.integers(1, 512)))
    mixture = Experts(experts, draw(st.integers(1, experts)), draw(st.integers(1, 8192)))
    layer = Layer(attention, draw(st.integers(1, 65536)), draw(st.sampled_from([None, mixture])))
    return replace(
        geometry,
        hidden_size=draw(st.integers(1, 16384)),
        vocab_size=draw(st.integers(1, 300_000)),
        layers=(layer,) * draw(st.integers(1, 100)),
        is_pooling=draw(st.booleans()),
    )


@given(any_geometry(), settings_of_any_engine)
def test_every_part_of_any_gemma_is_positive_and_explained(
    geometry: Geometry, settings: RuntimeSettings
) -> None:
    memory = runtime_memory(geometry, settings, CONSTANTS)
    for part in (*memory.runtime, memory.activation, *memory.outside, *memory.after_sizing):
        assert part.bytes > 0
        assert part.margin_bytes >= 0
        assert part.explanation.endswith(".")
    assert memory.margin_bytes > 0


@given(any_geometry(), settings_of_any_engine, st.integers(1, 5000))
def test_more_tokens_or_sequences_never_need_less(
    geometry: Geometry, settings: RuntimeSettings, more: int
) -> None:
    def amounts(changed: RuntimeSettings) -> tuple[int, int]:
        memory = runtime_memory(geometry, changed, CONSTANTS)
        counted = memory.runtime_bytes + memory.activation_bytes
        return counted, counted + memory.after_sizing_bytes

    here = amounts(settings)
    sequences = amounts(replace(settings, max_num_seqs=settings.max_num_seqs + more))
    batched = settings.max_num_batched_tokens + more
    tokens = amounts(replace(settings, max_num_batched_tokens=batched))
    assert min(sequences[0], tokens[0]) >= here[0]
    assert min(sequences[1], tokens[1]) >= here[1]
