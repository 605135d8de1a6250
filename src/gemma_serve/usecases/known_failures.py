"""The catalogue's words in front of what a check found, so that it reads as the diagnosis does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from gemma_serve.adapters.package_data import load_failures
from gemma_serve.errors import GemmaServeError, Problem


def with_titles(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Each problem as the catalogue calls it, if it is one of its failures."""
    found = tuple(problems)
    # The file need not be read where nothing is wrong.
    return tuple(load_failures().titled(problem) for problem in found)


@contextmanager
def named_as_known() -> Iterator[None]:
    """The same for the problems of an error."""
    try:
        yield
    except GemmaServeError as error:
        error.problems = with_titles(error.problems)
        raise
