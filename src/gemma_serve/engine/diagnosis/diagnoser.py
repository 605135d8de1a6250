"""A log in, a verdict out."""

from __future__ import annotations

from gemma_serve.engine.diagnosis.diagnosis import Diagnosis, Ending
from gemma_serve.engine.diagnosis.judge import judge
from gemma_serve.engine.diagnosis.run import MARKS, Mark, Run, marks_in, model_in
from gemma_serve.engine.diagnosis.sightings import Messages, Sighting
from gemma_serve.engine.diagnosis.text import Block, Blocks
from gemma_serve.engine.diagnosis.texts import TextSearch
from gemma_serve.engine.diagnosis.tracebacks import TRACEBACK, Raised, raised_in
from gemma_serve.planning.failures import FailureCatalogue, Numbers

# After a mark, so much of the squeezed text may name the model.
_NAMES_MODEL = 2000


class Diagnoser:
    """Reads a log in pieces of any size, in constant memory, and says what is wrong.

    Use one for one log: `feed` it all, then `finish`.
    """

    def __init__(self, catalogue: FailureCatalogue) -> None:
        self._catalogue = catalogue
        self._messages = Messages(catalogue.failures)
        self._search = TextSearch([*self._messages.texts, *MARKS, TRACEBACK])
        self._blocks = Blocks()
        self._offset = 0
        self._run = Run()
        self._before: Run | None = None

    def feed(self, data: bytes) -> None:
        """Read on."""
        for block in self._blocks.feed(data):
            self._read(block)

    def finish(self, ending: Ending | None = None, *, known: Numbers | None = None) -> Diagnosis:
        """The verdict.

        Args:
            ending: what else is known of the engine's end.
            known: what is known of the start beside its log, by the catalogue's names: `model`,
                which is otherwise what the log names, `port`.
        """
        block = self._blocks.finish()
        self._read(block)
        self._run.last, self._run.end = block.last_place(), self._offset
        return judge(self._run, self._before, self._catalogue, ending or Ending(), known or {})

    def _read(self, block: Block) -> None:
        found = self._search.find_in(block)
        seen: list[Sighting | Raised | Mark] = [
            *marks_in(block, found, self._offset),
            *self._messages.sightings(block, found, self._offset),
            *raised_in(block, found, self._offset),
        ]
        # A mark that stands where something else begins comes first: sorting is stable.
        seen.sort(key=lambda one: one.position)
        for one in seen:
            if isinstance(one, Mark):
                self._mark(one, block)
            elif isinstance(one, Sighting):
                self._run.add_sighting(one)
            else:
                self._run.add_raised(one)
        self._offset += len(block.searched)

    def _mark(self, mark: Mark, block: Block) -> None:
        if mark.kind == "start" and self._run.has_begun:
            # A restart that was cut short hides nothing of the failure before it.
            if self._before is None or self._run.has_trouble:
                self._before = self._run
            self._run = Run()
        self._run.add_mark(mark)
        if self._run.model is None and mark.kind in ("start", "engine"):
            self._run.model = model_in(block.passage(mark.at, mark.at + _NAMES_MODEL))
