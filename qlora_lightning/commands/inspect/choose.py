"""Which rows to show: by place, by length, by what they say, or the first ones."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from qlora_lightning.commands.inspect.arguments import Options
from qlora_lightning.commands.inspect.pieces import Piece, PieceCutter
from qlora_lightning.data.report import Report
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.support.errors import UserError

_FIRST, _FOUND = 2, 3  # rows shown when none are asked for, and of those that a search finds
_CHUNK = 1_000


@dataclass(frozen=True)
class ShownRow:
    """A row to show, or a sentence about one that gave no sample.

    Attributes:
        where: file and line.
        why: what it was chosen for.
        pieces: of its sample, in order.
        tokens: of its sample.
        labelled: of these, labelled ones.
        note: what became of it, if it gave no sample.
    """

    where: str
    why: str
    pieces: tuple[Piece, ...] = ()
    tokens: int = 0
    labelled: int = 0
    note: str = ""


class RowChooser:
    """Finds the rows of a split that the options ask for.

    Args:
        split: name of the split.
        samples: its ``SampleSet``.
        report: its ``Report``.
        cutter: cuts samples into pieces.
        others: the samples of the other splits, which may hold a row that is looked for.
    """

    def __init__(
        self,
        split: str,
        samples: SampleSet,
        report: Report,
        cutter: PieceCutter,
        others: Mapping[str, SampleSet] = MappingProxyType({}),
    ) -> None:
        self.split = split
        self.samples = samples
        self.report = report
        self.cutter = cutter
        self.others = others

    def choose(self, options: Options) -> list[ShownRow]:
        """Choose rows, in the order of the options; the first two if none are asked for.

        Raises:
            UserError: the split has no such row.
        """
        chosen = [row for place in options.rows for row in self._at(place)]
        lengths = self.samples.lengths
        if options.longest and len(lengths):
            chosen.append(self._show(int(lengths.argmax()), "the longest"))
        if options.shortest and len(lengths):
            chosen.append(self._show(int(lengths.argmin()), "the shortest"))
        if options.search is not None:
            chosen += self._search(options.search)
        if options.rows or options.longest or options.shortest or options.search is not None:
            return chosen
        return [self._show(number, "") for number in range(min(_FIRST, len(lengths)))]

    def _show(self, number: int, why: str) -> ShownRow:
        begin, end = (int(at) for at in self.samples.starts[number : number + 2])
        labelled = self.samples.labelled[begin:end].tolist()
        pieces = self.cutter.cut(self.samples.ids[begin:end].tolist(), labelled)
        return ShownRow(self.samples.where(number), why, tuple(pieces), end - begin, sum(labelled))

    def _at(self, place: str) -> list[ShownRow]:
        file, _, line = place.rpartition(":")
        if not line.isdecimal() or int(line) < 1:
            raise UserError(f"--row {place}: expected a line number from 1, or FILE:LINE as messages name a row.")
        shown = [self._show(number, "") for number in _find(self.samples, file, int(line))]
        bad = [row for row in self.report.bad if _is_at(row.where, file, line)]
        shown += [ShownRow(row.where, "", note=f"a bad row: {row.reason}") for row in bad]
        return shown or [self._explain(place, file, int(line))]

    def _explain(self, place: str, file: str, line: int) -> ShownRow:
        """Say why a line gave no sample.

        Raises:
            UserError: there is no such line.
        """
        where = place if file else f"{self.split} line {line}"
        for name, other in self.others.items():
            held_out = [number for number in _find(other, file, line) if _file(other, number) in self.samples.files]
            if held_out:
                return ShownRow(where, "", note=f"is a row of {name}: --split {name} shows it.")
        bad_lines = [row.where.rpartition(":")[2] for row in self.report.bad]
        lines = [*self.samples.line.tolist(), *(int(number) for number in bad_lines if number.isdecimal())]
        last = max([self.report.rows, *lines])
        if line > last or (file and not any(name.endswith(file) for name in self.samples.files)):
            raise UserError(
                f"--row {place}: {self.split} has no such row; its {self.report.rows:,} rows end at {last}."
            )
        reasons = "; ".join(f"{reason} ({count:,})" for reason, count in self.report.dropped.items())
        dropped = f", or the row was dropped: {reasons}" if reasons else ""
        unlisted = self.report.bad_rows > len(self.report.bad)
        bad = ", or it is one of the bad rows that are not listed" if unlisted else ""
        return ShownRow(where, "", note=f"no sample comes from here: no row begins in that line{dropped}{bad}.")

    def _search(self, text: str) -> list[ShownRow]:
        found = [number for number, row in enumerate(self._decode_all()) if text.casefold() in row.casefold()]
        first = [self._show(number, f"holds {text!r}") for number in found[:_FOUND]]
        count = f"{len(found):,} of {len(self.samples):,} samples hold it"
        shown = f"; the first {_FOUND} are shown." if len(found) > _FOUND else "."
        return [ShownRow(f"search for {text!r}", "", note=count + shown), *first]

    def _decode_all(self) -> Iterator[str]:
        for begin in range(0, len(self.samples), _CHUNK):
            bounds = self.samples.starts[begin : begin + _CHUNK + 1].tolist()
            rows = [self.samples.ids[start:end].tolist() for start, end in itertools.pairwise(bounds)]
            yield from self.cutter.tokenizer.batch_decode(
                rows, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )


def _find(samples: SampleSet, file: str, line: int) -> list[int]:
    """Find the samples of a line, in any file if none is named."""
    numbers = np.flatnonzero(samples.line == line).tolist()
    return [number for number in numbers if _is_at(samples.where(number), file, str(line))]


def _is_at(where: str, file: str, line: str) -> bool:
    return where.endswith(f"{file}:{line}") if file else where.rpartition(":")[2] == line


def _file(samples: SampleSet, number: int) -> str:
    return samples.where(number).rpartition(":")[0]
