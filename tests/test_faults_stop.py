"""However a deployment is stopped, and whatever happens meanwhile, nothing of it is left."""

import pytest

from faults import FAULTS, ONLY_MEASURED
from test_faults import check

HERE = [fault for fault in FAULTS if fault.stops and fault.name not in ONLY_MEASURED]


@pytest.mark.parametrize("fault", HERE, ids=lambda fault: fault.name)
def test_a_stop_that_is_disturbed_leaves_nothing_and_the_next_up_works(fault):
    check(fault)
