"""What became of the rows of one split."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_lightning.data.rows.bad_rows import SHOWN, BadRow, refuse
from qlora_lightning.data.rows.formats import RowConverter
from qlora_lightning.data.samples import SampleSet, find_repeats
from qlora_lightning.support.errors import UserError

_LISTED = 5
_MAX_UNUSABLE = 0.05


@dataclass
class Report:
    """What became of the rows of one split; plain values.

    Attributes:
        split: ``train``, ``val``, ``test`` or ``predict``.
        rows: rows read, bad and dropped ones included.
        samples: samples made of them.
        formats: names of the formats found.
        tokens: tokens of all samples.
        labelled: of these, labelled ones.
        shortened: samples cut to ``max_length``.
        lost_tokens: tokens cut away.
        lost_labels: of these, labelled ones.
        turn_by_turn: rows that became a sample per turn, since the template renders earlier answers otherwise.
        weighted: samples whose row has another weight than 1.
        dropped: rows left out though they are well-formed, by reason.
        unusable: of these, rows without a labelled token.
        bad_rows: malformed rows.
        bad: the first of them.
        duplicates: rows equal to an earlier one of the split.
        duplicate_pairs: places of the first of these, each with that of the row that it equals.
        overlap: rows of this split that are trained on too.
        overlap_pairs: places of the first of these, each with that in the training rows.
        unread_columns: columns of the rows that nothing reads, under our names.
    """

    split: str
    rows: int = 0
    samples: int = 0
    formats: list[str] = field(default_factory=list)
    tokens: int = 0
    labelled: int = 0
    shortened: int = 0
    lost_tokens: int = 0
    lost_labels: int = 0
    turn_by_turn: int = 0
    weighted: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    unusable: int = 0
    bad_rows: int = 0
    bad: list[BadRow] = field(default_factory=list)
    duplicates: int = 0
    duplicate_pairs: list[tuple[str, str]] = field(default_factory=list)
    overlap: int = 0
    overlap_pairs: list[tuple[str, str]] = field(default_factory=list)
    unread_columns: list[str] = field(default_factory=list)

    def drop(self, reason: str, rows: int = 1) -> None:
        """Count well-formed rows that are left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + rows

    def refuse(self, row: BadRow) -> None:
        """Count a bad row."""
        self.bad_rows += 1
        self.bad = [*self.bad, row][:SHOWN]

    def note_columns(self, converters: Iterable[RowConverter]) -> None:
        """Note the formats that were found, and the columns that nothing reads."""
        for converter in converters:
            for mine, theirs in ((self.formats, converter.formats), (self.unread_columns, converter.unread_columns)):
                mine += [name for name in theirs if name not in mine]

    def count_duplicates(self, samples: SampleSet) -> None:
        """Count the rows that equal an earlier one."""
        repeats = find_repeats(samples)
        self.duplicates, self.duplicate_pairs = len(repeats.row_ids), repeats.pairs

    def count_overlap(self, samples: SampleSet, train: SampleSet) -> None:
        """Count the rows that are trained on too."""
        repeats = find_repeats(samples, among=train)
        self.overlap, self.overlap_pairs = len(repeats.row_ids), repeats.pairs

    def count_samples(self, samples: SampleSet) -> None:
        """Count samples that take the place of those counted so far."""
        self.samples, self.tokens, self.labelled = len(samples), len(samples.ids), int(samples.labelled.sum())
        self.weighted = 0 if samples.weights is None else int((samples.weights != 1).sum())

    def describe(self) -> str:
        """Return what is printed for the split: one line, and one more for each thing to look at."""
        formats = f" ({', '.join(self.formats)})" if self.formats else ""
        parts = [f"{self.split}: {self.rows:,} rows{formats}", f"{self.tokens:,} tokens"]
        if self.labelled:
            parts.append(f"{self.labelled / self.tokens:.0%} labelled")
        if self.samples != self.rows:
            parts.append(f"{self.samples:,} samples")
        if self.shortened:
            parts.append(f"{self.shortened:,} shortened ({self.lost_labels:,} labelled tokens lost)")
        if self.turn_by_turn:
            parts.append(f"{self.turn_by_turn:,} rendered turn by turn")
        lines = [", ".join(parts)]
        if self.unread_columns:
            more = ", …" if len(self.unread_columns) > SHOWN else ""
            lines.append(f"  columns not read: {', '.join(self.unread_columns[:SHOWN])}{more}")
        if self.weighted:
            lines.append(
                f"  {self.weighted:,} samples have a weight, in batch['weights'] for a compute_loss of your own: the "
                "loss of QLoRAModule does not read it"
            )
        lines += [f"  {count:,} rows dropped: {reason}" for reason, count in self.dropped.items()]
        if self.bad_rows:
            lines += _list(f"{self.bad_rows:,} bad rows skipped", [f"{row.where} ({row.reason})" for row in self.bad])
        if self.duplicates:
            pairs = [f"{here} = {first}" for here, first in self.duplicate_pairs]
            lines += _list(f"{self.duplicates:,} rows equal an earlier one", pairs)
        if self.overlap:
            pairs = [f"{here} = {first}" for here, first in self.overlap_pairs]
            lines += _list(f"{self.overlap:,} rows are trained on too, so {self.split}_loss is too good", pairs)
        return "\n".join(lines)

    def check_bad(self, skip: bool) -> None:
        """Refuse bad rows, unless they are to be skipped.

        Raises:
            UserError: there are bad rows and ``skip`` is off.
        """
        if not skip:
            refuse(self.bad, total=self.bad_rows)

    def check_left(self, lenient: bool = False) -> None:
        """Refuse rows of which no sample is left, or too many leave nothing to learn from.

        Raises:
            UserError: no sample is left, or, unless ``lenient``, more than 5 % of the rows have no labelled token.
        """
        if self.samples == 0:
            refuse(self.bad, skippable=False, total=self.bad_rows)
            raise UserError(f"{self.split}: none of {self.rows:,} rows is left ({self._reasons()}).")
        if not lenient and self.unusable > _MAX_UNUSABLE * self.rows:
            raise UserError(
                f"{self.unusable:,} of {self.rows:,} rows of {self.split} have no labelled token (more than "
                f"{_MAX_UNUSABLE:.0%}) and would teach nothing ({self._reasons()}). `qlora-lightning inspect` shows "
                "them; look at max_length, train_on and `train: false`."
            )

    def _reasons(self) -> str:
        return "; ".join(f"{count:,}: {reason}" for reason, count in self.dropped.items())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Report":
        """Make it of its fields, back from JSON."""
        report = cls(**values)
        report.bad = [BadRow(*row) for row in report.bad]
        for pairs in (report.duplicate_pairs, report.overlap_pairs):
            pairs[:] = [(here, first) for here, first in pairs]
        return report


def _list(title: str, places: list[str]) -> list[str]:
    more = ", …" if len(places) > _LISTED else ""
    return [f"  {title}: {', '.join(places[:_LISTED])}{more}"]
