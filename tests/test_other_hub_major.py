"""What is promised of the Hub holds with the other major of its client, too.

1.x and 2.x stand on different HTTP libraries. One of them is installed; the other is fetched here,
and the tests of the Hub run against it in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

pytestmark = [pytest.mark.alone, pytest.mark.proof]

TESTS = Path(__file__).parent
INSTALLED = int(huggingface_hub.__version__.partition(".")[0])
OTHER = 1 if INSTALLED > 1 else 2
_FIRST_HALF = "connection or folder or wrong or stopped"
# Files, and which of their tests.
_SHARES = (
    (("test_hub.py", "test_access.py", "test_hub_errors.py"), ""),
    (("test_download.py",), _FIRST_HALF),
    (("test_download.py",), f"not ({_FIRST_HALF})"),
)
_RUN = """
import sys
import huggingface_hub, pytest
assert huggingface_hub.__version__.startswith(sys.argv[1] + "."), huggingface_hub.__file__
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def other_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the newest client of the other major."""
    folder = tmp_path_factory.mktemp("other-hub")
    # 1.x needs what we need anyway; 2.x brings an HTTP library of its own.
    alone = ["--no-deps"] if OTHER == 1 else []
    options = ["--quiet", "--disable-pip-version-check", "--no-compile", "--retries", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *alone, "--target", str(folder),
         f"huggingface_hub>={OTHER},<{OTHER + 1}"],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"pip can't fetch huggingface_hub {OTHER}.x: {done.stderr[-300:]}")
    return folder


def test_the_same_holds(other_client: Path, tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [str(other_client), os.environ.get("PYTHONPATH")]))
    children = []
    # Side by side: they wait more than they compute.
    for number, (names, selection) in enumerate(_SHARES):
        output = (tmp_path / f"output-{number}").open("w+")
        options = ["-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / f'tests-{number}'}"]
        files = [str(TESTS / name) for name in names]
        child = subprocess.Popen(
            [sys.executable, "-c", _RUN, str(OTHER), *options, "-k", selection, *files],
            cwd=TESTS.parent,
            env={**os.environ, "PYTHONPATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        children.append((child, output))
    codes = [child.wait() for child, _ in children]
    told = []
    for _, output in children:
        output.seek(0)
        told.append(output.read()[-8000:])
        output.close()
    assert codes == [0] * len(_SHARES), "\n".join(told)
