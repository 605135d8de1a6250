"""The smoke test's report files: JUnit for pipelines, HTML for people."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gemma_serve.adapters.whole_files import write_whole
from gemma_serve.errors import GemmaServeError, UsageError
from gemma_serve.planning.smoke.report import SmokeReport


@dataclass(frozen=True)
class ReportFiles:
    """Where the reports go; None for one that is not wanted."""

    junit: Path | None = None
    html: Path | None = None

    @property
    def wanted(self) -> bool:
        """Whether there is any to write."""
        return bool(self.junit or self.html)

    def refuse_bad_places(self) -> None:
        """Raise UsageError, before anything is tested, where a report can't be written."""
        for option, path in (("--junit", self.junit), ("--html", self.html)):
            if path is None:
                continue
            parent = path.resolve().parent
            special = path.exists() and not path.is_file()  # a folder, a pipe, a device
            if special or not parent.is_dir() or not os.access(parent, os.W_OK):
                raise UsageError(
                    f"{option} {path} can't be written",
                    code="usage",
                    hint="name a file in a folder that exists and is yours",
                )
        if self.wanted and self.junit == self.html:
            raise UsageError(
                f"--junit and --html both name {self.junit}",
                code="usage",
                hint="name two files",
            )

    def write(self, report: SmokeReport) -> None:
        """Write what is wanted. Raises GemmaServeError where a disk says no."""
        from gemma_serve.view.smoke_html import html_page
        from gemma_serve.view.smoke_junit import junit_xml

        if self.junit is not None:
            _write(self.junit, junit_xml(report))
        if self.html is not None:
            _write(self.html, html_page(report))

    @contextmanager
    def of_failures(self) -> Iterator[None]:
        """Tell the JUnit report's reader why nothing was tested, where the block raises.

        The reports of an earlier run are removed first: they must not pass for this one's.
        """
        from gemma_serve.view.smoke_junit import junit_of_problems

        started_at = time.time()
        for path in (self.junit, self.html):
            if path is not None:
                path.resolve().unlink(missing_ok=True)
        try:
            yield
        except GemmaServeError as error:
            if self.junit is not None and not self.junit.exists():
                _write(self.junit, junit_of_problems(error.problems, started_at=started_at))
            raise


NO_REPORTS = ReportFiles()


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path.resolve(), text)
    except OSError as error:
        raise GemmaServeError(
            f"{path} can't be written: {error.strerror or error}", code="smoke.report"
        ) from None
