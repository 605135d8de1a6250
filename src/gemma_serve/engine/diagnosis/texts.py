"""Many texts looked for at once, so that a long log takes about as long to search as to read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import ahocorasick_rs

from gemma_serve.engine.diagnosis.text import Block

Found = Mapping[bytes, Sequence[int]]


class TextSearch:
    """Looks for any of `texts`, each without whitespace, in one block after the other."""

    def __init__(self, texts: Iterable[bytes]) -> None:
        self._texts = list(dict.fromkeys(texts))
        self._automaton = ahocorasick_rs.BytesAhoCorasick(
            self._texts, implementation=ahocorasick_rs.Implementation.DFA
        )

    def find_in(self, block: Block) -> Found:
        """Where each text that is there begins in the block's own part, in order."""
        found: dict[bytes, list[int]] = defaultdict(list)
        matches = self._automaton.find_matches_as_indexes(block.squeezed, overlapping=True)
        for index, start, _ in matches:
            if start in block.searched:
                found[self._texts[index]].append(start)
        return found
