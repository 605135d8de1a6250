"""The rooms of the package and which way imports may go."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "gemma_serve"
EVERYTHING = {"cli", "view", "usecases", "engine", "adapters", "planning", "errors"}
MAY_IMPORT = {
    "cli": EVERYTHING,
    "view": EVERYTHING - {"cli"},
    "usecases": {"usecases", "engine", "adapters", "planning", "errors"},
    "engine": {"engine", "planning", "errors"},
    "adapters": {"adapters", "planning", "errors"},
    "planning": {"planning", "errors"},
    "errors": set(),
    "data": set(),
}
# The one home of each library; these and the standard library apart, nothing is imported.
HOMES = {
    "typer": {"cli"},
    "rich": {"view"},
    "httpx": {"adapters"},
    "jinja2": {"view"},
    "ahocorasick_rs": {"engine"},
    "huggingface_hub": {"adapters"},
    "pynvml": {"adapters"},
    "yaml": {"adapters", "view"},
    "platformdirs": {"adapters"},
    "prometheus_client": {"adapters"},
    "psutil": {"adapters", "engine"},
    "pydantic": {"planning"},
    "pydantic_core": {"planning"},
}
FILES = sorted(SRC.rglob("*.py"))


def imported(path):
    """Every module that a file imports, at any depth of it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def room(path):
    return path.relative_to(SRC).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_go_down(path):
    allowed = MAY_IMPORT.get(room(path), EVERYTHING)
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("gemma_serve.")}
    assert rooms <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_each_library_has_one_home_and_the_engine_is_never_imported(path):
    names = {name.split(".")[0] for name in imported(path)}
    assert not names & {"vllm", "torch", "transformers"}
    for library, rooms in HOMES.items():
        assert library not in names or room(path) in rooms, f"{library} in {room(path)}"
