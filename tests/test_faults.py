"""Whatever is done to a deployment, nothing of it is left, and the next `up` works."""

import pytest

from faults import FAULTS, ONLY_MEASURED, PROMISED_S, measure

HERE = [fault for fault in FAULTS if not fault.stops and fault.name not in ONLY_MEASURED]


def check(fault):
    if not fault.possible():
        pytest.skip("this machine does not permit it")
    outcome = measure(fault)
    assert outcome == fault.expected
    # The promise is for a machine that does nothing else; `measure_faults.py` holds it to that.
    assert outcome.seconds < 4 * PROMISED_S


@pytest.mark.parametrize("fault", HERE, ids=lambda fault: fault.name)
def test_after_a_fault_nothing_is_left_and_the_next_up_works(fault):
    check(fault)
