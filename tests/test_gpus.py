"""Which GPUs CUDA sees and which are chosen: pure decisions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_serve.errors import Problem, UsageError
from gemma_serve.planning.hardware.gpus import (
    Chosen,
    VisibleGpus,
    choose_gpus,
    cuda_environment,
    name_gpus,
    visible_gpus,
)
from gpu_samples import make_gpu, make_t4

FOUR = tuple(make_gpu(i) for i in range(4))
TWINS = (make_gpu(0, uuid="GPU-89aa0000"), make_gpu(1, uuid="GPU-89bb0000"))


@pytest.mark.parametrize(
    ("value", "indices"),
    [
        (None, [0, 1, 2, 3]),
        ("0,1,2,3", [0, 1, 2, 3]),
        ("2,1", [2, 1]),
        (" 3 , 0 ", [3, 0]),
        ("GPU-2a2b3c4d", [2]),
        ("GPU-3a,GPU-0", [3, 0]),
        ("1gpu,2", [1, 2]),  # as C's strtoul
    ],
)
def test_usual_choices_are_seen_without_a_word(value: str | None, indices: list[int]) -> None:
    assert visible_gpus(FOUR, value) == VisibleGpus(tuple(FOUR[i] for i in indices))


@pytest.mark.parametrize(
    ("value", "indices", "code", "blocking"),
    [
        ("", [], "no-gpu-visible", True),
        ("-1", [], "no-gpu-visible", True),
        ("-1,0", [], "no-gpu-visible", True),
        ("0,2,-1,1", [0, 2], "gpu.visible_unknown", False),
        ("0,7,1", [0], "gpu.visible_unknown", False),
        ("7", [], "no-gpu-visible", True),
        ("0,", [0], "gpu.visible_unknown", False),
        ("NoDevFiles", [], "no-gpu-visible", True),
        ("0,GPU-1a", [0], "visible-devices", False),  # kinds don't mix
        ("GPU-1a,0", [1], "gpu.visible_unknown", False),
        ("GPU-ffff", [], "visible-devices", True),
        ("1,1", [], "no-gpu-visible", True),
        ("GPU-1a,GPU-1a2b", [], "no-gpu-visible", True),
        ("GPU-", [], "visible-devices", True),
        ("MIG-4a5b6c7d", [], "visible-devices", True),
        ("1,MIG-4a5b6c7d", [1], "visible-devices", False),
    ],
)
def test_odd_choices_are_seen_as_cuda_does_and_explained(
    value: str, indices: list[int], code: str, blocking: bool
) -> None:
    seen = visible_gpus(FOUR, value)
    assert [gpu.index for gpu in seen.gpus] == indices
    [problem] = seen.problems
    assert (problem.code, problem.blocking) == (code, blocking)
    assert f'CUDA_VISIBLE_DEVICES="{value}"' in problem.message
    assert problem.hint


def test_an_odd_choice_in_full() -> None:
    assert visible_gpus(TWINS, "GPU-89").problems == (
        Problem(
            "visible-devices",
            'in CUDA_VISIBLE_DEVICES="GPU-89", "GPU-89" is the beginning of more than one UUID '
            "(GPUs 0 and 1), so CUDA sees no GPU",
            "give numbers among 0,1: `export CUDA_VISIBLE_DEVICES=0`",
        ),
    )


def test_without_gpus_the_variable_does_not_matter() -> None:
    assert visible_gpus((), "7") == VisibleGpus(())


@given(st.text(alphabet="0123456789,-GPUMIabcd ", max_size=24))
def test_whatever_the_variable_holds_the_result_is_a_choice(value: str) -> None:
    seen = visible_gpus(FOUR, value)
    assert len({gpu.index for gpu in seen.gpus}) == len(seen.gpus)
    assert set(seen.gpus) <= set(FOUR)
    assert seen.gpus or any(problem.blocking for problem in seen.problems)


def test_the_freest_is_chosen() -> None:
    gpus = (make_gpu(0, used=20), make_gpu(1, used=130), make_gpu(3, used=0.7))
    assert choose_gpus(gpus) == Chosen(
        (gpus[2],), "GPU 3 has the most free memory: 139.1 of 139.8 GiB"
    )


def test_ties_go_to_the_lowest_number() -> None:
    assert choose_gpus(FOUR).gpus == (FOUR[0],)


def test_several_are_of_one_kind() -> None:
    gpus = (make_gpu(0, used=130), make_gpu(1, used=10), make_t4(2), make_t4(3))
    assert choose_gpus(gpus, count=2) == Chosen(
        (gpus[2], gpus[3]),
        "GPUs 2 and 3 have the most free memory among cards of one kind: "
        "14.6 of 14.6 GiB or more each",
    )


def test_a_set_that_is_large_enough_goes_before_a_freer_one_that_is_not() -> None:
    gpus = (make_gpu(0), make_t4(1), make_t4(2))
    assert choose_gpus(gpus, count=2).gpus == (gpus[1], gpus[2])


def test_cards_with_mig_are_left_out() -> None:
    gpus = (make_gpu(0, mig=True), make_gpu(1, used=100))
    assert choose_gpus(gpus) == Chosen(
        (gpus[1],), "GPU 1 is the only one that can be used: 39.8 of 139.8 GiB free"
    )
    assert choose_gpus(gpus[:1]) == Chosen(gpus[:1], "GPU 0 for want of one without MIG")


def test_too_few_are_chosen_all_the_same() -> None:
    gpus = (make_gpu(0), make_t4(1))
    chosen = choose_gpus(gpus, count=2)
    assert chosen == Chosen(
        (gpus[0],), "GPU 0 is all there is of one kind, of 2 wanted: 139.8 of 139.8 GiB free"
    )
    assert choose_gpus(()) == Chosen((), "CUDA sees no GPU")


@pytest.mark.parametrize("wanted", [("3", "1"), ("GPU-3a", "1"), ("GPU-3a2b3c4d", "GPU-1")])
def test_wanted_gpus_are_taken_in_their_order(wanted: tuple[str, ...]) -> None:
    chosen = choose_gpus(FOUR, wanted=wanted, count=2)
    assert chosen == Chosen((FOUR[3], FOUR[1]), "GPUs 3 and 1 asked for with --gpus")
    assert cuda_environment(chosen.gpus) == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "3,1",
    }


@pytest.mark.parametrize(
    ("wanted", "count", "code", "words"),
    [
        (("2",), 1, "gpu.not_visible", ["`2`", "0 (NVIDIA H200), 1 (NVIDIA H200)"]),
        (("-1",), 1, "gpu.not_visible", ["`-1`"]),
        (("1x",), 1, "gpu.not_visible", ["`1x`"]),
        (("GPU-89",), 1, "gpu.not_visible", ["`GPU-89`"]),
        (("MIG-1",), 1, "gpu.not_visible", ["`MIG-1`"]),
        (("1", "GPU-89bb"), 2, "gpu.named_twice", ["GPU 1 twice"]),
        (("0", "1"), 1, "gpu.count", ["--gpus 0,1", "--tensor-parallel-size wants 1"]),
        (("0",), 2, "gpu.count", ["--gpus 0 names 1 GPU,", "--tensor-parallel-size wants 2"]),
    ],
)
def test_wrong_wishes_are_refused(
    wanted: tuple[str, ...], count: int, code: str, words: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        choose_gpus(TWINS, wanted=wanted, count=count)
    [problem] = caught.value.problems
    assert problem.code == code
    assert problem.hint
    for word in words:
        assert word in problem.message


@given(
    free=st.lists(st.integers(0, 139), min_size=1, max_size=8),
    count=st.integers(1, 8),
)
def test_no_card_left_out_is_freer_than_one_chosen(free: list[int], count: int) -> None:
    gpus = tuple(make_gpu(i, used=139.8 - f) for i, f in enumerate(free))
    chosen = choose_gpus(gpus, count=count).gpus
    left = set(gpus) - set(chosen)
    assert len(chosen) == min(count, len(gpus))
    assert max((g.free_bytes for g in left), default=0) <= min(g.free_bytes for g in chosen)


@pytest.mark.parametrize(
    ("indices", "text"), [([3], "GPU 3"), ([0, 2], "GPUs 0 and 2"), ([0, 1, 2], "GPUs 0, 1 and 2")]
)
def test_names_for_sentences(indices: list[int], text: str) -> None:
    assert name_gpus([FOUR[i] for i in indices]) == text
