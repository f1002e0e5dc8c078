"""Batches from rows that are read while training: for data larger than memory or disk."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_lightning.data.batches.collate import Batch, collate_rows
from qlora_lightning.data.batches.epoch_plan import EpochPlan
from qlora_lightning.data.batches.order import RankBatch, make_count, permute
from qlora_lightning.data.prepare import NumberedRow, Preparation, Prepared, Recipe
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.bad_rows import BadRow
from qlora_lightning.data.rows.readers import Row, RowReader
from qlora_lightning.data.rows.sources import Source
from qlora_lightning.data.samples import SampleSet, SampleSetBuilder
from qlora_lightning.support.errors import UserError

_log = logging.getLogger(__name__)


class RowStream:
    """Reads sources over and over; each gets its share of rows by weight, as evenly spread as can be.

    Args:
        sources: what to read; several need weights, since how large they are is not known beforehand.
        seed: of the order of a source's files, another one in each pass; None for their own order, as with ``rows``.
        position: where to begin, as ``position()`` returned it.

    Raises:
        UserError: there are several sources without weights.
    """

    def __init__(
        self, sources: Sequence[Source], seed: int | None = None, position: Mapping[str, Any] | None = None
    ) -> None:
        if len(sources) > 1 and any(source.weight is None for source in sources):
            raise UserError(
                "data.streaming: several sources are mixed row by row, and how large they are is not known beforehand: "
                "give each a weight, as in `{path: …, weight: 2}`."
            )
        nothing = [0] * len(sources)
        position = {"drawn": nothing, "passes": nothing, "readers": [None] * len(sources), **(position or {})}
        self.sources, self.seed = sources, seed
        self.drawn: list[int] = list(position["drawn"])
        self.passes: list[int] = list(position["passes"])  # that are over, of each source
        self._readers = [self._open(number, place) for number, place in enumerate(position["readers"])]

    def take(self, count: int, once: bool = False) -> list[NumberedRow]:
        """Return the next rows, those of a source together; with ``once`` without those of one that has begun again."""
        weights = [source.weight or 1.0 for source in self.sources]
        first = sum(self.drawn)
        taken: list[list[Row | BadRow]] = [[] for _ in self.sources]
        for _ in range(count):
            # the source that is furthest behind its share
            number = min(range(len(weights)), key=lambda i: (self.drawn[i] + 0.5) / weights[i])
            row = self._next(number)
            if not (once and self.passes[number]):
                taken[number].append(row)
            self.drawn[number] += 1
        rows = [(number, row) for number, of_source in enumerate(taken) for row in of_source]
        return [NumberedRow(at, *each) for at, each in enumerate(rows, start=first)]

    def position(self) -> dict[str, Any]:
        """Return where the next row begins, in plain values."""
        readers = [reader.position() for reader, _ in self._readers]
        return {"drawn": list(self.drawn), "passes": list(self.passes), "readers": readers}

    def _open(self, number: int, position: Mapping[str, int] | None) -> tuple[RowReader, Iterator[Row | BadRow]]:
        source = self.sources[number]
        if self.seed is not None and _has_shards(source):
            key = (self.seed, "files", number, self.passes[number])
            order = permute(len(source.files), *key)
            seed = int(permute(1 << 16, *key)[0]) if source.streaming else None
            source = replace(source, files=tuple(source.files[at] for at in order), shard_seed=seed)
        reader = RowReader(source, position)
        return reader, iter(reader)

    def _next(self, number: int) -> Row | BadRow:
        row = next(self._readers[number][1], None)
        if row is None:  # the end: again from the beginning, which holds a row, or the reader complains
            self.passes[number] += 1
            self._readers[number] = self._open(number, None)
            row = next(self._readers[number][1])
        return row


@dataclass(eq=False)
class StreamLoader:
    """One rank's batches of a stream, with a position that Lightning saves and restores.

    Rows are read in blocks. A block is shuffled and cut into chunks of ``batch_size`` rows; chunk c belongs to rank
    c % ``world_size``, which alone renders it. Each rank makes batches of its own rows, and all have as many of a block
    as the one with the most. The order is a pure function of the seed and the block's number, so that a position is
    small and exact: where the block begins in the files, and how many of its batches are done. Memory does not grow
    with the data.

    The length is that of the run, counted in batches: when the data end, they begin again.

    Attributes:
        sources: what to read.
        length: batches of the whole run on each rank.
        batch_size: rows per batch on each rank; or
        tokens_per_batch: tokens per batch, a budget that a rank's rows of a block are packed into by best fit.
        shuffle: the rows of a block, and in each pass the files of a source; else all are in their own order.
        shuffle_buffer: rows of a block, rounded up to whole batches of all ranks.
        gather: returns what each rank calls it with: its number of batches, or None if it cannot continue.

    Raises:
        UserError: from here and from iteration: a row is bad.
    """

    sources: Sequence[Source]
    recipe: Recipe
    length: int
    batch_size: int | None = None
    tokens_per_batch: int | None = None
    seed: int = 0
    skip_bad_rows: bool = False
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True
    shuffle_buffer: int = 1_000
    gather: Callable[[int | None], list[int | None]] = lambda count: [count]

    def __post_init__(self) -> None:
        stride = (self.batch_size or 1) * self.world_size
        # whole batches, as long as each row gives one sample
        self.block_rows = -(-self.shuffle_buffer // stride) * stride
        self._preparation: Preparation | None = None
        self._block = 0
        self._start = self._open_stream().position()
        self._done = 0  # batches of the block
        self._handed_out = 0  # batches of the run
        stop, filler = min(self.recipe.renderer.stop_ids), SampleSetBuilder()
        filler.add([stop, stop], [stop, stop], -1, first=int(self.recipe.pairs))
        self._filler = filler.build()

    def __len__(self) -> int:
        return self.length

    def first_block(self) -> tuple[SampleSet, Report]:
        """Read as many rows as a block has, in file order, as a check of the data before anything is trained.

        They are the same whatever the seed, so that they tell whether a run resumes with the same data.

        Raises:
            UserError: a row is bad, or more than 5 % of the rows are unusable.
        """
        samples, report = self._render(RowStream(self.sources).take(self.block_rows, once=True))
        report.check_bad(self.skip_bad_rows)
        report.check_left()
        return samples, report

    def __iter__(self) -> Iterator[Batch]:
        stream = self._open_stream(self._start)
        while self._handed_out < self.length:
            samples, batches = self._next_block(stream)
            for rows, filler in batches[self._done : self._done + self.length - self._handed_out]:
                self._done += 1
                self._handed_out += 1
                yield collate_rows(self._filler if filler else samples, rows, filler)
            if self._done >= len(batches):
                self._block, self._start, self._done = self._block + 1, stream.position(), 0

    def _next_block(self, stream: RowStream) -> tuple[SampleSet, list[RankBatch]]:
        """Render this rank's rows of the next block, and cut them into batches."""
        samples, report, batches = self._filler, Report("train"), list[RankBatch]()
        fault: UserError | None = None
        try:
            samples, report = self._render(self._choose_own(stream.take(self.block_rows)))
            report.check_bad(self.skip_bad_rows)
            if len(samples):
                batches = EpochPlan(samples, self.batch_size, self.tokens_per_batch).batches(0)
        except UserError as error:
            fault = error
        found = self.gather(len(batches) if fault is None else None)
        counts = [count for count in found if count is not None]
        if fault is not None:
            raise fault
        if len(counts) < len(found):
            raise UserError("another process stopped at a row of the stream that cannot be used, and names it.")
        wanted = max(counts)
        if report.bad_rows or report.dropped:
            _log.info("block %d of the stream: %s", self._block + 1, replace(report, unread_columns=[]).describe())
        if not wanted and not self._block:
            report.check_left()  # else no pass would have a batch
        if self.tokens_per_batch is not None and batches:
            bins = make_count([batch.rows for batch in batches], samples.lengths, min(wanted, len(samples)))
            order = permute(len(bins), self.seed, self._block, "bins").tolist() if self.shuffle else range(len(bins))
            batches = [RankBatch(bins[number], filler=False) for number in order]
        return samples, batches + [RankBatch([0], filler=True)] * (wanted - len(batches))

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
        """Continue behind the batches that were consumed.

        Raises:
            UserError: the stream is made of something else now.
        """
        for key, mine in self._made_of().items():
            stored = state_dict["made_of"].get(key, mine)
            if stored != mine:
                raise UserError(
                    f"the checkpoint was saved inside a stream with {key} = {stored}, but now {key} = {mine}: "
                    "keep files, weights and batches as they were, to resume exactly there."
                )
        self._block, self._start = state_dict["block"], state_dict["start"]
        self._done, self._handed_out = state_dict["done"], state_dict["handed_out"]

    def _open_stream(self, position: Mapping[str, Any] | None = None) -> RowStream:
        return RowStream(self.sources, self.seed if self.shuffle else None, position)

    def _choose_own(self, rows: list[NumberedRow]) -> list[NumberedRow]:
        """Shuffle a block, and return the rows of it that this rank trains."""
        order = permute(len(rows), self.seed, self._block).tolist() if self.shuffle else range(len(rows))
        chunk = self.batch_size or 1
        return [rows[at] for place, at in enumerate(order) if place // chunk % self.world_size == self.rank]

    def _render(self, rows: list[NumberedRow]) -> Prepared:
        if self._preparation is None:
            self._preparation = Preparation(self.recipe, "train", [source.settings for source in self.sources])
            for number, source in enumerate(self.sources):  # by its first rows, wherever the run begins
                self._preparation.check(number, RowReader(source))
        self._preparation.add(rows)
        return self._preparation.take()

    def _made_of(self) -> dict[str, Any]:
        return {
            "sources": [[source.path, *map(_describe_file, source.files)] for source in self.sources],
            "weights": [source.weight for source in self.sources],
            "seed": self.seed,
            "rows_per_batch": (self.batch_size or 0) * self.world_size,
            "tokens_per_batch": self.tokens_per_batch or 0,
            "bins_per_batch": self.world_size if self.tokens_per_batch else 0,
            "block_rows": self.block_rows,
            "max_length": self.recipe.max_length,
            "too_long": self.recipe.too_long,
            "shuffle": self.shuffle,
            "shuffled_files": any(map(_has_shards, self.sources)) and self.shuffle,
        }


def _has_shards(source: Source) -> bool:
    """Whether its files, or the shards of a hub data set, are shuffled: not where ``rows`` counts from the first."""
    return source.rows is None and (source.streaming or len(source.files) > 1)


def _describe_file(file: Path | str) -> int | str:
    return file.stat().st_size if isinstance(file, Path) else file
