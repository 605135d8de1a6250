"""The smoke test on a terminal, as it goes: a row for each check that will run."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING

from gemma_serve.planning.smoke.report import CheckResult
from gemma_serve.view.output import out_console
from gemma_serve.view.smoke import ID_WIDTH, MARKS, below, indented, summary

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

_REFRESHES_PER_S = 8
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧"
# Of these, the terminal's last line stays free for the cursor.
_FREE_LINES = 1


def can_show_table(console: Console | None = None) -> bool:
    """Whether standard output (or `console`) is a terminal that lines can be rewritten on.

    Rich believes FORCE_COLOR that a pipe is a terminal too.
    """
    console = console or out_console()
    return console.is_interactive and console.file.isatty()


class SmokeTable:
    """The checks `ids`, in order, under `title`: each waits, runs, and gets its verdict.

    A context manager. When it ends, the table stays as it is, and below it follows why checks
    failed; the verdict is for the caller to print. A terminal with fewer lines than checks shows
    those around the one that runs, and all of them in the end.
    """

    def __init__(
        self, ids: Sequence[str], title: Text | str, *, console: Console | None = None
    ) -> None:
        self._ids = tuple(ids)
        self._title = title
        self._console = console or out_console()
        self._ended: dict[str, CheckResult] = {}
        self._running: str | None = None
        self._began_at = 0.0
        self._live: Live | None = None

    def __enter__(self) -> SmokeTable:
        from rich.live import Live

        self._console.print(self._title, markup=False, highlight=False)
        self._live = Live(
            _Rows(self), console=self._console, refresh_per_second=_REFRESHES_PER_S, transient=True
        )
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is None:
            return
        self._live.stop()
        self._live = None
        self._running = None
        self._console.print(self.table(self._ids, whole=True))
        self._tell_of_failures()

    def began(self, id: str) -> None:
        """The check `id` runs now."""
        self._running, self._began_at = id, monotonic()
        self._refresh()

    def ended(self, check: CheckResult) -> None:
        """A check has its verdict; it need not have begun, since skipped ones don't."""
        self._ended[check.id] = check
        if self._running == check.id:
            self._running = None
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()

    def window(self, lines: int) -> tuple[str, ...]:
        """The checks to show on so many lines: those around the one that runs or comes next."""
        if len(self._ids) <= lines:
            return self._ids
        now = next((i for i, id in enumerate(self._ids) if id not in self._ended), len(self._ids))
        first = max(0, min(now - lines + 2, len(self._ids) - lines))
        return self._ids[first : first + lines]

    def table(self, ids: Sequence[str], *, whole: bool) -> Table:
        """A row for each of `ids`; `whole` wraps what is cut off while it runs."""
        from rich.table import Table

        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=4, no_wrap=True)
        table.add_column(width=ID_WIDTH, no_wrap=True)
        table.add_column(width=7, no_wrap=True, justify="right")
        # Were this column itself not to wrap, Rich would shorten the ids before it as well.
        table.add_column(overflow="fold")
        for id in ids:
            *narrow, words = self._row(id)
            words.no_wrap, words.overflow = not whole, "fold" if whole else "ellipsis"
            table.add_row(*narrow, words)
        return table

    def _row(self, id: str) -> tuple[Text, ...]:
        from rich.text import Text

        if check := self._ended.get(id):
            mark, style = MARKS[check.status]
            took = "" if check.status == "skipped" else f"{check.duration_s:.2f} s"
            return Text(mark, style), Text(id), Text(took, "dim"), Text(summary(check), "dim")
        if id == self._running:
            running_s = monotonic() - self._began_at
            frame = _SPINNER[int(running_s * _REFRESHES_PER_S) % len(_SPINNER)]
            return Text(frame, "cyan"), Text(id, "bold"), Text(f"{running_s:.1f} s"), Text()
        return Text(), Text(id, "dim"), Text(), Text()

    def _tell_of_failures(self) -> None:
        for check in self._ended.values():
            if check.status == "failed":
                lines: list[RenderableType] = indented(below(check))
                self._console.print()
                self._console.print(
                    f"FAIL  {check.id}", markup=False, highlight=False, style="bold"
                )
                for line in lines:
                    self._console.print(line)


class _Rows:
    """What is shown while checks run: as many rows as the terminal has lines for."""

    def __init__(self, of: SmokeTable) -> None:
        self._of = of

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = max(1, console.size.height - _FREE_LINES)
        yield self._of.table(self._of.window(lines), whole=False)
