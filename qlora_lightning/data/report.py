"""What became of the rows of one split."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_lightning.data.rows.bad_rows import BadRow
from qlora_lightning.data.samples import SampleSet, find_repeats
from qlora_lightning.support.errors import UserError

_SHOWN = 20
_MEANS_NONE = {"n/a", "na", "null", "nan", "none", "nil", "-"}  # in lower case
_LISTED = 5
_MAX_UNUSABLE = 0.05


@dataclass
class Report:
    """What became of the rows of one split; plain values."""

    split: str
    rows: int = 0  # read, bad and dropped ones included
    samples: int = 0
    formats: list[str] = field(default_factory=list)  # that were found
    tokens: int = 0
    labelled: int = 0  # of the tokens
    desirable: int | None = None  # samples with that verdict, if they have verdicts
    shortened: int = 0  # samples cut to max_length
    lost_tokens: int = 0  # that max_length cut off or, with too_long: drop, left out with their rows
    lost_labels: int = 0  # of these
    turn_by_turn: int = 0  # rows that became a sample per turn, since the template renders earlier answers otherwise
    dropped: dict[str, int] = field(default_factory=dict)  # well-formed rows that are left out, by reason
    unusable: int = 0  # of these, rows that leave nothing to train on
    bad_rows: int = 0
    bad: list[BadRow] = field(default_factory=list)  # the first of them
    duplicates: int = 0  # rows equal to an earlier one of the split
    duplicate_pairs: list[tuple[str, str]] = field(default_factory=list)  # the first ones, each with what it equals
    overlap: int = 0  # rows that are trained on too
    overlap_pairs: list[tuple[str, str]] = field(default_factory=list)
    suspicious: int = 0  # rows that are trained, and look as if something were missing
    suspicious_rows: list[str] = field(default_factory=list)  # the first ones, each with why
    unread_columns: list[str] = field(default_factory=list)  # under our names
    files: list[str] = field(default_factory=list)  # that were read

    def drop(self, reason: str, rows: int = 1) -> None:
        """Count well-formed rows that are left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + rows

    def count_bad_row(self, row: BadRow) -> None:
        """Count a bad row."""
        self.bad_rows += 1
        self.bad = [*self.bad, row][:_SHOWN]

    def note_suspicious(self, where: str, answers: Iterable[str], questions: Iterable[str]) -> None:
        """Note a row whose answer is a word for none, or whose question is empty."""
        reasons = [f"the answer is {text!r}" for text in answers if text.lower() in _MEANS_NONE]
        reasons += ["the question is empty" for text in questions if not text.strip()][:1]
        if reasons:
            self.suspicious += 1
            self.suspicious_rows = [*self.suspicious_rows, f"{where} ({', '.join(reasons)})"][:_SHOWN]

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
        self.desirable = None if samples.desirable is None else int(samples.desirable.sum())

    def describe(self) -> str:
        """Return what is printed for the split: one line, and one more for each thing to look at."""
        formats = f" ({', '.join(self.formats)})" if self.formats else ""
        parts = [f"{self.split}: {self.rows:,} rows{formats}", f"{self.tokens:,} tokens"]
        if self.labelled:
            parts.append(f"{self.labelled / self.tokens:.0%} labelled")
        if self.desirable is not None:
            parts.append(f"{self.desirable:,} of {self.samples:,} answers desirable")
        if self.samples != self.rows:
            parts.append(f"{self.samples:,} samples")
        if self.shortened:
            parts.append(f"{self.shortened:,} shortened ({self.lost_labels:,} labelled tokens lost)")
        if self.turn_by_turn:
            parts.append(f"{self.turn_by_turn:,} rendered turn by turn")
        lines = [", ".join(parts)]
        if self.files:
            more = f" and {len(self.files) - _SHOWN:,} more" if len(self.files) > _SHOWN else ""
            lines.append(f"  read from {', '.join(self.files[:_SHOWN])}{more}")
        if self.unread_columns:
            more = ", …" if len(self.unread_columns) > _SHOWN else ""
            lines.append(f"  columns not read: {', '.join(self.unread_columns[:_SHOWN])}{more}")
        lines += [f"  {count:,} rows dropped: {reason}" for reason, count in self.dropped.items()]
        if self.bad_rows:
            bad = [f"{places} ({reason})" for reason, places in self._bad_places().items()]
            lines += _list(f"{self.bad_rows:,} bad rows skipped", bad)
        if self.suspicious:
            lines += _list(f"{self.suspicious:,} rows look incomplete; data.missing drops them", self.suspicious_rows)
        if self.duplicates:
            pairs = [f"{here} = {first}" for here, first in self.duplicate_pairs]
            lines += _list(f"{self.duplicates:,} rows equal an earlier one", pairs)
        if self.overlap:
            pairs = [f"{here} = {first}" for here, first in self.overlap_pairs]
            lines += _list(f"{self.overlap:,} rows are trained on too, so {self.split}_loss is too good", pairs)
        return "\n".join(lines)

    def check(self, skip_bad: bool, lenient: bool = False) -> None:
        """Reject a split that cannot be trained on as it is.

        Raises:
            UserError: there are bad rows and they are not to be skipped; or no sample is left; or, unless ``lenient``,
                more than 5 % of the rows leave nothing to train on.
        """
        if self.bad_rows and not (skip_bad or lenient):
            raise UserError(f"{self._list_bad()}\nCorrect them, or leave them out with `on_bad_row: skip`.")
        if self.samples == 0:
            left = f"{self.split}: none of {self.rows:,} rows is left ({self._reasons()})."
            raise UserError(self._list_bad() if self.bad_rows else left)
        if not lenient and self.unusable > _MAX_UNUSABLE * self.rows:
            raise UserError(
                f"{self.unusable:,} of {self.rows:,} rows of {self.split} leave nothing to train on (more than "
                f"{_MAX_UNUSABLE:.0%}; {self._reasons()}). `qlora-lightning inspect` shows them; look at max_length, "
                "train_on and `train: false`."
            )

    def _bad_places(self) -> dict[str, str]:
        """Return the places of the first bad rows by their reason."""
        places: dict[str, list[str]] = {}
        for row in self.bad:
            places.setdefault(row.reason, []).append(row.where)
        return {reason: ", ".join(where) for reason, where in places.items()}

    def _list_bad(self) -> str:
        rows = "1 row cannot be used:" if self.bad_rows == 1 else f"{self.bad_rows} rows cannot be used:"
        lines = [rows, *(f"  {places}: {reason}" for reason, places in self._bad_places().items())]
        if self.bad_rows > len(self.bad):
            lines.append(f"  and {self.bad_rows - len(self.bad)} more")
        return "\n".join(lines)

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
