"""A download as it goes: one display for the whole on a terminal, plain lines in a pipe."""

from __future__ import annotations

from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gemma_serve.errors import Problem, Stopped
from gemma_serve.planning.sizes import file_size
from gemma_serve.usecases.download import DownloadResult
from gemma_serve.usecases.events import (
    CheckingFiles,
    DownloadBegan,
    DownloadEnded,
    DownloadProgress,
    Event,
    FileDamaged,
    Noticed,
)
from gemma_serve.view.output import Output, err_console

if TYPE_CHECKING:
    from rich.progress import Progress

# How often a pipe gets a line, and a program an object.
_LINE_EVERY_S = 10.0
_JSON_EVERY_S = 1.0


class DownloadView:
    """Shows what a download does. A context manager, so that the display never outlives it."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._progress: Progress | None = None
        self._told_at = monotonic()
        self._is_loading = False
        self.noticed: list[Problem] = []

    def on_event(self, event: Event) -> None:
        """Show one event of `download`, whose answer alone goes to standard output."""
        if isinstance(event, Noticed):
            self.noticed.append(event.problem)
            if not self._output.as_json:
                self.end()
                self._output.problems([event.problem])
        else:
            self.shows(event)

    def __enter__(self) -> DownloadView:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()
        if self._is_loading and isinstance(error, Stopped | KeyboardInterrupt):
            self._output.note("stopped; what came is kept, and the same command goes on from there")

    def shows(self, event: Event) -> bool:
        """Whether the event is a download's; it is shown then."""
        if isinstance(event, DownloadBegan):
            self.end()
            self._told_at = monotonic()
            self._is_loading = True
            self._output.note(_began_text(event))
        elif isinstance(event, DownloadProgress):
            self._show_progress(event)
        elif isinstance(event, CheckingFiles):
            self._show_checking(event)
        elif isinstance(event, FileDamaged):
            self.end()
            self._output.note(f"{event.file} is damaged ({event.found}): fetching it again")
        elif isinstance(event, DownloadEnded):
            self.end()
            self._is_loading = False
            self._output.note(_ended_text(event))
        else:
            return False
        return True

    def is_due(self, event: Event) -> bool:
        """Whether a program should hear of this event; of what repeats, one a second."""
        if not isinstance(event, DownloadProgress | CheckingFiles):
            return True
        return self._is_time(_JSON_EVERY_S)

    def _show_progress(self, event: DownloadProgress) -> None:
        if err_console().is_terminal:
            text = f"{event.files_done} of {event.files} files, {_rate_text(event)}".rstrip(", ")
            self._display("downloading", text, event.done_bytes, event.total_bytes)
        elif self._is_time(_LINE_EVERY_S) or event.files_done == event.files:
            self._output.note(progress_line(event))

    def _show_checking(self, event: CheckingFiles) -> None:
        if err_console().is_terminal:
            self._display("checking files", "", event.done_bytes, event.total_bytes)
        elif self._is_time(_LINE_EVERY_S):
            done, total = file_size(event.done_bytes), file_size(event.total_bytes)
            self._output.note(f"checking files: {done} of {total}")

    def _is_time(self, every_s: float) -> bool:
        now = monotonic()
        if now - self._told_at < every_s:
            return False
        self._told_at = now
        return True

    def _display(self, what: str, text: str, done: int, total: int) -> None:
        if self._output.as_json:
            return
        if self._progress is None:
            self._progress = _new_progress()
            self._progress.start()
            self._progress.add_task(what, total=total, text=text)
        task = self._progress.task_ids[0]
        self._progress.update(task, description=what, completed=done, total=total, text=text)

    def end(self) -> None:
        """Take the display away; what comes after is somebody else's."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _new_progress() -> Progress:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[text]}"),
        console=err_console(),
        transient=True,
    )


def progress_line(event: DownloadProgress) -> str:
    """One line of a log: "  3.20 of 17.10 GiB, 3 of 12 files, 112.0 MiB/s, 2 min left"."""
    percent = 100 * event.done_bytes // event.total_bytes if event.total_bytes else 100
    return (
        f"  {percent:3} %  {file_size(event.done_bytes)} of {file_size(event.total_bytes)}, "
        f"{event.files_done} of {event.files} files, {_rate_text(event)}"
    ).rstrip(", ")


def _rate_text(event: DownloadProgress) -> str:
    if event.bytes_per_s is None or event.left_s is None:
        return ""
    return f"{event.bytes_per_s / 2**20:.1f} MiB/s, {_duration(event.left_s)} left"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _began_text(event: DownloadBegan) -> str:
    here = event.total_bytes - event.missing_bytes
    rest = f"; {file_size(here)} are here already" if here else ""
    return (
        f"downloading {event.model} at {event.commit[:12]}: {event.files} files, "
        f"{file_size(event.total_bytes)}{rest}"
    )


def _ended_text(event: DownloadEnded) -> str:
    if not event.fetched_bytes:
        return f"all {event.files} files are here and whole"
    fetched, took = file_size(event.fetched_bytes), _duration(event.duration_s)
    return f"downloaded {fetched} in {took}; all {event.files} files are whole"


def download_data(result: DownloadResult) -> dict[str, Any]:
    """The `data` of `download --json`; sizes in bytes."""
    return {
        "model": result.model,
        "commit": result.commit,
        "folder": str(result.folder),
        "files": [
            {"name": f.name, "size_bytes": f.size_bytes, "checksum": f.checksum}
            for f in result.files
        ],
        "total_bytes": result.total_bytes,
        "fetched_bytes": result.fetched_bytes,
        "refetched": list(result.damaged),
        "duration_s": round(result.duration_s, 3),
    }
