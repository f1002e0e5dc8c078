"""Batches from rows that are read while training: for data larger than memory or disk."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_lightning.data.batches.collate import Batch, collate_rows
from qlora_lightning.data.batches.epoch_plan import EpochPlan
from qlora_lightning.data.prepare import Preparer, Recipe, check_usable, refuse_bad, refuse_unusable
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.bad_rows import BadRow
from qlora_lightning.data.rows.formats import RowConverter
from qlora_lightning.data.rows.readers import Row, RowReader
from qlora_lightning.data.rows.sources import DataFile, Source
from qlora_lightning.data.samples import SampleSet, SampleSetBuilder
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


_log = logging.getLogger(__name__)
BLOCK = 1_000  # rows that are shuffled, and packed, together


def check_stream_length(max_steps: int, accumulate: int, overfits: bool) -> int:
    """Return the micro-batches of a run on each rank.

    Raises:
        UserError: the run has no end, or shall see the same batches again.
    """
    if max_steps < 1:
        raise UserError("data.streaming: a stream has no end, so trainer.max_steps must say where to stop.")
    if overfits:
        raise UserError("data.streaming: trainer.overfit_batches wants the same batches again: leave one out.")
    return max_steps * accumulate


class StreamLoader:
    """One rank's batches of a stream, with a position that Lightning saves and restores.

    Rows are read in blocks; a block is rendered, shuffled and packed as a whole, then the next one is read. The order
    within a block is a pure function of the seed and the block's number, so that a position is small and exact: where
    the block begins in the files, and how many of its batches are done. Memory does not grow with the data. Every rank
    reads all rows and keeps its own batches.

    The length is that of the run, counted in micro-batches: when the data end, they begin again.

    Args:
        sources: what to read.
        recipe: how rows are turned into samples.
        length: micro-batches of the whole run on each rank.
        batch_size: rows per micro-batch on each rank; or
        tokens_per_batch: tokens per micro-batch, a budget that the rows of a block are packed into by best fit.
        seed: of the order.
        skip_bad_rows: leave bad rows out, rather than stop at them.
        rank: of this process.
        world_size: number of processes that share the rows.

    Raises:
        UserError: from here and from iteration: a row is bad, or more than 5 % of the first block are unusable.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        recipe: Recipe,
        length: int,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        seed: int = 0,
        skip_bad_rows: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sources, self.recipe, self.length = sources, recipe, length
        self.batch_size, self.tokens_per_batch = batch_size, tokens_per_batch
        self.seed, self.skip_bad_rows = seed, skip_bad_rows
        self.rank, self.world_size = rank, world_size
        stride = (batch_size or 1) * world_size
        self.block_rows = -(-BLOCK // stride) * stride  # whole batches, as long as each row gives one sample
        self.report = Report("train")
        self._converters = [RowConverter(source.settings) for source in sources]
        self._block = 0
        self._start = RowStream(sources).position()
        self._done = 0  # batches of the block
        self._handed_out = 0  # batches of the run

    def __len__(self) -> int:
        return self.length

    def first_block(self) -> tuple[SampleSet, Report]:
        """Read the first block, as a check of the data before anything is trained."""
        taken = RowStream(self.sources).take(self.block_rows, once=True)
        for converter, rows in zip(self._converters, taken, strict=True):
            converter.check([row for row in rows if isinstance(row, Row)])
        return self._prepare(taken, 0)

    def __iter__(self) -> Iterator[Batch]:
        stream = RowStream(self.sources, self._start)
        while self._handed_out < self.length:
            samples, report = self._prepare(stream.take(self.block_rows), sum(self._start["drawn"]))
            self._count(report)
            batches = self._plan(samples).batches(self._block, self.rank) if len(samples) else []
            for rows, filler in batches[self._done : self._done + self.length - self._handed_out]:
                self._done += 1
                self._handed_out += 1
                yield collate_rows(samples, rows, filler)
            if self._done >= len(batches):
                self._block, self._start, self._done = self._block + 1, stream.position(), 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values, and what the stream is made of."""
        return {
            "block": self._block,
            "start": self._start,
            "done": self._done,
            "handed_out": self._handed_out,
            "made_of": self._made_of(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind the batches that were consumed.

        Raises:
            UserError: if the stream is made of something else now.
        """
        for key, mine in self._made_of().items():
            if state_dict["made_of"].get(key) != mine:
                raise UserError(
                    f"the checkpoint was saved inside a stream with {key} = {state_dict['made_of'].get(key)}, but now "
                    f"{key} = {mine}: keep files, weights and batches as they were, to go on exactly there."
                )
        self._block, self._start = state_dict["block"], state_dict["start"]
        self._done, self._handed_out = state_dict["done"], state_dict["handed_out"]

    def _prepare(self, taken: list[list[Row | BadRow]], first_row: int) -> tuple[SampleSet, Report]:
        """Turn a block of rows, a list for each source, into samples."""
        report, builder = Report("train"), SampleSetBuilder()
        for number, (converter, rows) in enumerate(zip(self._converters, taken, strict=True)):
            Preparer(self.recipe, converter, number, report).add(rows, first_row + report.rows, builder)
        # something of the first block is left, so that no pass goes by without a batch
        (refuse_bad if first_row else refuse_unusable)(report, self.skip_bad_rows)
        if not first_row:
            check_usable(report)
        return builder.build(), report

    def _plan(self, samples: SampleSet) -> EpochPlan:
        return EpochPlan(
            samples, self.batch_size, self.tokens_per_batch, shuffle=True, seed=self.seed, world_size=self.world_size
        )

    def _count(self, report: Report) -> None:
        """Add what became of a block's rows to the report of the stream."""
        for name in ("rows", "samples", "tokens", "labelled", "shortened", "lost_tokens", "lost_labels", "bad_rows"):
            setattr(self.report, name, getattr(self.report, name) + getattr(report, name))
        for reason, count in report.dropped.items():
            self.report.dropped[reason] = self.report.dropped.get(reason, 0) + count
        if self.rank == 0 and (report.bad_rows or report.dropped):
            words = replace(report, unread_columns=[]).describe()  # told of the first rows
            _log.info("rows %d to %d: %s", self.report.rows - report.rows + 1, self.report.rows, words)

    def _made_of(self) -> dict[str, Any]:
        files = [[source.path, *(_size(file) for file in source.files)] for source in self.sources]
        return {
            "sources": files,
            "weights": [source.weight for source in self.sources],
            "seed": self.seed,
            "rows_per_batch": (self.batch_size or 0) * self.world_size,
            "tokens_per_batch": self.tokens_per_batch or 0,
            "block_rows": self.block_rows,
            "max_length": self.recipe.max_length,
            "too_long": self.recipe.too_long,
        }


def _size(file: DataFile) -> int | None:
    return file.stat().st_size if isinstance(file, Path) else None
