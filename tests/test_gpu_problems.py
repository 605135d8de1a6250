"""What stands between the chosen GPUs and a running engine: pure decisions."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_serve.errors import Problem
from gemma_serve.planning.hardware.gpu_problems import (
    CONTEXT_BYTES,
    driver_problem,
    gpu_problems,
    requested_bytes,
)
from gemma_serve.planning.hardware.gpus import (
    Gpu,
    GpuProcess,
)
from gpu_samples import GIB, make_gpu, make_t4

FOUR = tuple(make_gpu(i) for i in range(4))


def problems_of(
    *gpus: Gpu,
    utilization: float = 0.9,
    needed: float | None = None,
    parallel: int = 1,
    dtype: str = "auto",
    engine_dtype: str | None = None,
) -> tuple[Problem, ...]:
    return gpu_problems(
        gpus,
        gpu_memory_utilization=utilization,
        needed_bytes=None if needed is None else int(needed * GIB),
        tensor_parallel_size=parallel,
        dtype=dtype,
        engine_dtype=engine_dtype,
    )


def test_an_idle_card_has_no_problem() -> None:
    assert problems_of(make_gpu(0), needed=15.9) == ()


def test_a_busy_card_names_its_holders_and_what_would_work() -> None:
    held = (GpuProcess(7, "python3", 5 * GIB), GpuProcess(9, "unknown", 11 * GIB))
    gpu = make_gpu(0, total=47.5, used=20, processes=held)
    assert problems_of(gpu, needed=15.9) == (
        Problem(
            "gpu-busy",
            "GPU 0 has 27.50 GiB of 47.50 GiB free, and vLLM wants 42.75 GiB of it "
            "(--gpu-memory-utilization 0.9); it is held by unknown (pid 9, 11.00 GiB) and "
            "python3 (pid 7, 5.00 GiB) and processes that can't be seen from here (4.00 GiB)",
            "wait for it or stop it, choose another GPU with `--gpus`, or run beside it with "
            "`--gpu-memory-utilization 0.56`",
        ),
    )


def test_a_share_in_which_the_model_does_not_fit_is_not_advised() -> None:
    held = (GpuProcess(7, "python3", 20 * GIB),)
    gpu = make_gpu(0, total=47.5, used=20, processes=held)
    [problem] = problems_of(gpu, needed=27)
    assert problem.hint == "wait for it or stop it, choose another GPU with `--gpus`"
    # 56 percent of 47.5 GiB is 26.6 GiB.
    advice = ", or run beside it with `--gpu-memory-utilization 0.56`"
    assert [p.hint for p in problems_of(gpu, needed=26.61)] == [problem.hint]
    assert [p.hint for p in problems_of(gpu, needed=26.59)] == [problem.hint + advice]
    # What is needed is needed on each of the GPUs, the fullest of which decides.
    both = problems_of(make_gpu(1, total=47.5), gpu, needed=26.61, parallel=2)
    assert [p.hint for p in both] == [problem.hint]


def test_an_orphan_engine_is_to_be_killed() -> None:
    orphan = GpuProcess(4242, "VLLM::EngineCore", 125 * GIB, orphan=True)
    [problem] = problems_of(make_gpu(0, used=125, processes=(orphan,)))
    assert problem.hint == (
        "a vLLM engine outlived its server and will never let go: `gemma-serve stop --orphans` "
        "ends it if it is ours, else `kill -9 4242` does, "
        "or run beside it with `--gpu-memory-utilization 0.1`"
    )


def test_a_living_engine_is_not() -> None:
    alive = GpuProcess(4242, "VLLM::EngineCore", 139 * GIB)
    [problem] = problems_of(make_gpu(0, used=139.7, processes=(alive,)))
    assert problem.hint == (
        "stop the vLLM server that runs there, choose another GPU with `--gpus`"
    )


def test_a_holder_of_unknown_size_leaves_nothing_to_guess() -> None:
    [problem] = problems_of(make_gpu(0, used=30, processes=(GpuProcess(7, "Xorg", None),)))
    assert problem.message.endswith("it is held by Xorg (pid 7, size unknown)")


def test_a_share_that_just_fits_is_a_warning() -> None:
    assert problems_of(make_gpu(0), utilization=0.998) == (
        Problem(
            "gpu.tight",
            "GPU 0 has 139.80 GiB of 139.80 GiB free, and vLLM wants 139.52 GiB of it "
            "(--gpu-memory-utilization 0.998), which leaves less than the 0.59 GiB that vLLM "
            "may need before it measures",
            "if it doesn't start, say `--gpu-memory-utilization 0.99`",
            blocking=False,
        ),
    )


@given(
    total=st.integers(2**30, 2**38),
    used_percent=st.integers(0, 100),
    utilization=st.integers(1, 100),
)
def test_advised_shares_are_free_of_problems(
    total: int, used_percent: int, utilization: int
) -> None:
    used = total * used_percent // 100
    gpu = dataclasses.replace(FOUR[0], total_bytes=total, used_bytes=used, free_bytes=total - used)
    for problem in problems_of(gpu, utilization=utilization / 100):
        if problem.code == "gpu-busy" and "utilization" in problem.hint:
            advised = float(problem.hint.rsplit(" ", 1)[1].strip("`"))
            assert problems_of(gpu, utilization=advised) == ()
            assert requested_bytes(gpu, advised) + CONTEXT_BYTES <= gpu.free_bytes + 1


def test_too_few_and_mixed() -> None:
    [problem] = problems_of(make_gpu(0), parallel=2)
    assert (problem.code, problem.hint) == (
        "tp-too-big",
        "say `--tensor-parallel-size 1`, or choose a smaller model",
    )
    [mixed, _old] = problems_of(make_gpu(0), make_t4(1), parallel=2)
    assert (mixed.code, mixed.blocking) == ("gpu.mixed", False)


def test_mig_is_the_only_thing_said_of_such_a_card() -> None:
    [problem] = problems_of(make_gpu(2, mig=True, used=139), needed=500)
    assert problem.code == "gpu.mig"
    assert "sudo nvidia-smi -i 2 -mig 0" in problem.hint


@pytest.mark.parametrize(
    ("engine_dtype", "dtype", "blocking", "hint"),
    [
        ("float16", "auto", False, "it will be computed in float16, in which this Gemma can run"),
        ("float32", "auto", False, "it will be computed in float32, which takes twice the memory; "
         "a newer GPU needs half"),
        (None, "auto", False, "Gemma 1 runs in float16 there, later ones in float32, which takes "
         "twice the memory"),
        ("bfloat16", "bfloat16", True, "say `--dtype auto`, which takes what the GPU can do"),
        (None, "bfloat16", True, "say `--dtype auto`, which takes what the GPU can do"),
    ],
)  # fmt: skip
def test_bfloat16_needs_a_newer_card(
    engine_dtype: str | None, dtype: str, blocking: bool, hint: str
) -> None:
    assert problems_of(make_gpu(0), make_t4(1), dtype=dtype, engine_dtype=engine_dtype)[1:] == (
        Problem(
            "bf16-unsupported",
            "GPU 1 (Tesla T4) has compute capability 7.5; bfloat16, in which Gemma is published, "
            "wants 8.0 or newer",
            hint,
            blocking=blocking,
        ),
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_dtype_that_an_old_card_can_do(dtype: str) -> None:
    assert problems_of(make_t4(0), dtype=dtype, engine_dtype=dtype) == ()
    assert problems_of(make_t4(0), dtype=dtype) == ()


@pytest.mark.parametrize("engine_dtype", [None, "bfloat16", "float16", "float32"])
def test_a_new_card_can_do_everything(engine_dtype: str | None) -> None:
    assert problems_of(make_gpu(0), engine_dtype=engine_dtype) == ()


@pytest.mark.parametrize(
    ("version", "warned"), [("12.8", True), ("13.0", False), ("14.1", False), (None, False)]
)
def test_an_old_driver_is_a_warning(version: str | None, warned: bool) -> None:
    problem = driver_problem(version)
    assert (problem is not None) is warned
    assert problem is None or not problem.blocking
