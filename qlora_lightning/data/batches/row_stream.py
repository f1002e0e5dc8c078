"""Rows without end, from one source or several mixed by weight, from any position."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_lightning.data.reading.bad_rows import BadRow
from qlora_lightning.data.reading.reader import Row, RowReader
from qlora_lightning.data.reading.sources import Source
from qlora_lightning.support.errors import UserError


class RowStream:
    """Reads sources over and over; each gets its share of rows by weight, as evenly spread as can be.

    Args:
        sources: what to read; several need weights, since how large they are is not known beforehand.
        position: where to begin, as ``position()`` gave it.

    Raises:
        UserError: if there are several sources without weights.
    """

    def __init__(self, sources: Sequence[Source], position: Mapping[str, Any] | None = None) -> None:
        if len(sources) > 1 and any(source.weight is None for source in sources):
            raise UserError(
                "data.streaming: several sources are mixed row by row, and how large they are is not known beforehand: "
                "give each a weight, as in `{path: …, weight: 2}`."
            )
        self.sources = sources
        self._weights = [source.weight or 1.0 for source in sources]
        self.drawn: list[int] = list(position["drawn"]) if position else [0] * len(sources)
        places = position["readers"] if position else [None] * len(sources)
        self._readers = [RowReader(source, place) for source, place in zip(sources, places, strict=True)]
        self._iterators = [iter(reader) for reader in self._readers]
        self._begun_again = [False] * len(sources)

    def take(self, count: int, once: bool = False) -> list[list[Row | BadRow]]:
        """Return the next rows, a list for each source; with ``once`` without those of a source that began again."""
        taken: list[list[Row | BadRow]] = [[] for _ in self.sources]
        for _ in range(count):
            # the source that is furthest behind its share
            number = min(range(len(self.sources)), key=lambda i: (self.drawn[i] + 0.5) / self._weights[i])
            row = self._next(number)
            if not (once and self._begun_again[number]):
                taken[number].append(row)
            self.drawn[number] += 1
        return taken

    def position(self) -> dict[str, Any]:
        """Return where the next row begins, in plain values."""
        return {"drawn": list(self.drawn), "readers": [reader.position() for reader in self._readers]}

    def _next(self, number: int) -> Row | BadRow:
        row = next(self._iterators[number], None)
        if row is None:  # the end: again from the beginning, which holds a row, or the reader complains
            self._readers[number] = RowReader(self.sources[number])
            self._iterators[number] = iter(self._readers[number])
            self._begun_again[number] = True
            row = next(self._iterators[number])
        return row
