"""The GPUs that `--for-gpu` names: cards by name, by size, and how many."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_serve.adapters.package_data import load_gpu_cards
from gemma_serve.errors import UsageError
from gemma_serve.planning.hardware.gpu_cards import ForGpu, parse_for_gpu
from gemma_serve.planning.hardware.gpus import Gpu

CARDS = load_gpu_cards()
BY_KEY = {card.key: card for card in CARDS}
GIB = 2**30


def named(key: str, count: int = 1, *notes: str) -> ForGpu:
    card = BY_KEY[key]
    return ForGpu(card.name, count, card.total_bytes, card.compute_capability, card, notes)


def of_size(gib: int, count: int = 1) -> ForGpu:
    note = (
        f"all of {gib} GiB is taken as free to use, and compute capability 8.0 as the card's; "
        "a real one keeps some memory to itself, so name it if you can"
    )
    return ForGpu(f"{gib} GiB GPU", count, gib * GIB, (8, 0), notes=(note,))


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("h200", named("h200")),
        (" H200 ", named("h200")),
        ("NVIDIA H200", named("h200")),
        ("l4x2", named("l4", 2)),
        ("2xl4", named("l4", 2)),
        ("L4 x 2", named("l4", 2)),
        ("h100-pcie x8", named("h100-pcie", 8)),
        ("NVIDIA H100 80GB HBM3", named("h100")),
        ("A100-SXM4-80GB", named("a100-80")),
        ("a100_40", named("a100-40")),
        # An x of its own, before and beside the one that counts.
        ("rtx4090", named("rtx4090")),
        ("GeForce RTX 4090", named("rtx4090")),
        ("4090x2", named("rtx4090", 2)),
        ("rtx4090x2", named("rtx4090", 2)),
        ("2xrtx4090", named("rtx4090", 2)),
        ("Tesla T4", named("t4")),
        ("b200x64", named("b200", 64)),
        ("24GiB", of_size(24)),
        ("24gb", of_size(24)),
        ("16g", of_size(16)),
        ("80 GiB x4", of_size(80, 4)),
        ("4x80GiB", of_size(80, 4)),
        ("24576MiB", of_size(24)),
    ],
)
def test_names_and_sizes_mean_the_gpus_that_people_mean(text: str, meant: ForGpu) -> None:
    assert parse_for_gpu(text, CARDS) == meant


@pytest.mark.parametrize(
    ("text", "key", "note"),
    [
        ("h100", "h100", "h100 comes in several kinds, and NVIDIA H100 80GB HBM3 is taken"),
        ("A100", "a100-80", "A100 comes in several kinds, and NVIDIA A100-SXM4-80GB is taken"),
        ("gb10", "gb10", "NVIDIA GB10 shares its memory with the CPU, which takes some of it too"),
        (
            "v100-32",
            "v100-32",
            "vLLM won't run on Tesla V100-SXM2-32GB: its CUDA 13 builds have no code for Volta",
        ),
    ],
)
def test_what_had_to_be_assumed_is_said(text: str, key: str, note: str) -> None:
    assert parse_for_gpu(text, CARDS) == named(key, 1, note)


@pytest.mark.parametrize(
    ("text", "code", "message", "hint"),
    [
        (
            "h20o",
            "gpu.card_unknown",
            "--for-gpu names `h20o`, which is no card that gemma-serve knows and no size of one",
            "did you mean `h20`, `h200`, `gh200`? Or give its memory: `--for-gpu 24GiB`",
        ),
        (
            "24",
            "gpu.card_unknown",
            "--for-gpu names `24`, which is no card that gemma-serve knows and no size of one",
            "a size wants its unit: `--for-gpu 24GiB`",
        ),
        (
            "",
            "gpu.card_unknown",
            "--for-gpu names nothing, which is no card that gemma-serve knows and no size of one",
            "say `--for-gpu h200`, `--for-gpu l4x2` or `--for-gpu 24GiB`",
        ),
        (
            "l4x65",
            "gpu.card_count",
            "--for-gpu asks for 65 of NVIDIA L4, but one engine runs on 1 to 64 GPUs",
            "say `--for-gpu h200`, `--for-gpu l4x2` or `--for-gpu 24GiB`",
        ),
        (
            "9000GiB",
            "gpu.card_size",
            "--for-gpu names a GPU of 9000GiB, but cards have 1 to 1024 GiB",
            "say `--for-gpu h200`, `--for-gpu l4x2` or `--for-gpu 24GiB`",
        ),
    ],
)
def test_what_names_no_gpus_is_refused_with_a_way_out(
    text: str, code: str, message: str, hint: str
) -> None:
    with pytest.raises(UsageError) as refused:
        parse_for_gpu(text, CARDS)
    (problem,) = refused.value.problems
    assert (problem.code, problem.message, problem.hint) == (code, message, hint)


@pytest.mark.parametrize(
    "text", ["l4x0", "0xl4", "-24GiB", "0.5GiB", "x", "x2", "l4,h100", "rtx6000"]
)
def test_half_names_and_impossible_numbers_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_for_gpu(text, CARDS)


pieces = st.sampled_from(
    [
        *BY_KEY,
        "x",
        "2",
        "0",
        "64",
        "65",
        "9" * 5000,
        "GiB",
        "g",
        "MB",
        ".",
        "-",
        " ",
        "nvidia",
        "\n",
    ]
)


@given(st.one_of(st.text(max_size=30), st.lists(pieces, max_size=6).map("".join)))
def test_any_text_gives_gpus_or_a_usage_error(text: str) -> None:
    try:
        meant = parse_for_gpu(text, CARDS)
    except UsageError as error:
        (problem,) = error.problems
        assert problem.code.startswith("gpu.card_")
        assert problem.hint
        assert len(problem.message) < 200
    else:
        assert 1 <= meant.count <= 64
        assert GIB <= meant.total_bytes <= 1024 * GIB


@given(st.sampled_from(CARDS), st.integers(1, 64))
def test_every_spelling_of_a_card_with_a_count_means_that_card(card, count) -> None:
    for spelling in (card.key, card.name, *card.aliases, *card.common_for):
        for text in (f"{spelling}x{count}", f"{count}x{spelling}"):
            meant = parse_for_gpu(text, CARDS)
            assert replace(meant, notes=()) == named(card.key, count)


def test_the_gpus_are_empty_and_alike() -> None:
    l4 = BY_KEY["l4"]
    assert parse_for_gpu("l4x2", CARDS).gpus == tuple(
        Gpu(index, "", "", "NVIDIA L4", l4.total_bytes, 0, l4.total_bytes, (8, 9))
        for index in range(2)
    )


def test_no_spelling_means_two_cards() -> None:
    spellings = [spelling for card in CARDS for spelling in card.spellings]
    assert sorted(spellings) == sorted(set(spellings))


def test_cards_from_t4_to_b200_are_there() -> None:
    assert {
        *("t4", "a10", "a10g", "a30", "a40", "a100-40", "a100-80", "a6000", "l4", "l40", "l40s"),
        *("rtx3090", "rtx4090", "rtx5090", "rtx6000-ada", "rtx-pro-6000"),
        *("h100", "h100-pcie", "h100-nvl", "h200", "h20", "gh200", "b200", "gb200", "gb10"),
    } <= set(BY_KEY)


@pytest.mark.parametrize(
    ("key", "gib"),
    # As vLLM prints it ("Free memory on device (…/139.8 GiB)") or PyTorch in its errors.
    [
        ("h200", 139.8),
        ("h100", 79.18),
        ("l4", 22.03),
        ("l40s", 44.39),
        ("t4", 14.56),
        ("b200", 178.35),
    ],
)
def test_the_memory_is_what_cuda_gives_out(key: str, gib: float) -> None:
    assert round(BY_KEY[key].total_bytes / GIB, 2) == gib


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.key)
def test_every_card_has_figures_that_can_be(card) -> None:
    assert 8 * GIB < card.total_bytes < 300 * GIB
    assert (7, 0) <= card.compute_capability < (13, 0)
    assert card.source in ("measured", "nominal")
    assert card.bandwidth is None or 1e11 < card.bandwidth < 1e13
    assert card.bf16_flops is None or 1e13 < card.bf16_flops < 3e15
    # Only cards that have bfloat16 have a speed in it.
    assert card.bf16_flops is None or card.compute_capability >= (8, 0)
    assert bool(card.refused) == (card.compute_capability < (7, 5))
