"""What is found when an engine was ended."""

import socket

import pytest

from gemma_serve.engine.ladder import Descent, StopStep
from gemma_serve.engine.reports import Stopped
from gemma_serve.usecases.events import EngineStopped
from gemma_serve.usecases.proof import prove_stopped, still_held, stop_problems
from test_compile_caches import a_run

GIB = 2**30
STEPS = (StopStep("terminate", 0.5), StopStep("clean", 0.0, 2))


@pytest.mark.parametrize(
    ("before", "now", "held"),
    [
        ({}, {}, None),
        ({"GPU-1": 0}, {"GPU-1": 0}, 0),
        ({"GPU-1": GIB}, {"GPU-1": GIB + 1000}, 0),
        ({"GPU-1": GIB, "GPU-2": 0}, {"GPU-1": 3 * GIB, "GPU-2": GIB}, 3 * GIB),
        ({"GPU-1": 5 * GIB}, {"GPU-1": GIB}, 0),
    ],
)
def test_memory_that_did_not_come_back(before, now, held):
    assert still_held(before, now) == held


def test_a_port_that_somebody_else_took_meanwhile_is_told():
    stopped = Stopped(Descent(STEPS, ()), 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        taken = prove_stopped(a_run(port=port), stopped, {})
    assert taken == EngineStopped(0.5, False, (), STEPS, port_is_free=False)
    assert prove_stopped(a_run(port=port), stopped, {}).port_is_free


def test_processes_that_stay_are_an_error_and_memory_a_warning():
    found = stop_problems(EngineStopped(9.0, True, (12, 13), gpu_bytes_held=2 * GIB))
    assert [(problem.code, problem.blocking) for problem in found] == [
        ("engine.left_behind", True),
        ("gpu.memory_held", False),
    ]
    assert "12, 13" in found[0].message
    assert "2.00 GiB" in found[1].message
