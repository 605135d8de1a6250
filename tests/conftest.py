"""What several test files share."""

from typing import NamedTuple

import pytest

from gemma_serve.adapters.state import all_deployments
from running import Program, end_deployments


class KeyedEngine(NamedTuple):
    """Where a real engine answers, and the key that it wants."""

    url: str
    key: str


@pytest.fixture(scope="session")
def keyed_engine(tmp_path_factory):
    """The real vLLM with the demo model and an API key: only to be asked, never to be harmed."""
    key = "sk-of-the-tests"
    state = {"GEMMA_SERVE_STATE_DIR": str(tmp_path_factory.mktemp("keyed"))}
    small = ("--model", "demo", "--port", "0", "--max-model-len", "1024", "--max-num-seqs", "16")
    environ = {**state, "GEMMA_SERVE_API_KEY": key}
    with Program("up", "--detach", *small, environ=environ) as program:
        assert program.popen.wait(240) == 0, program.err
        (deployment,) = all_deployments(state)
        yield KeyedEngine(deployment.url, key)
        end_deployments(state)
