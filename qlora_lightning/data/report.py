"""Report on the rows of one split: how many are trained, left out, bad, repeated or suspicious."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from qlora_lightning.data.rows.files import BadRow, Row, count_lines, kind_of_file
from qlora_lightning.data.samples import SampleSet, find_repeats
from qlora_lightning.support.console import count_of
from qlora_lightning.support.errors import UserError

_SHOWN = 20
_MEANS_NONE = {"n/a", "na", "null", "nan", "none", "nil", "-"}  # in lower case
# what cp1252 has as €, „ or – and latin-1 reads as a control; what was written for bytes of another encoding
_MISREAD = re.compile("[\x80-\x9f\N{REPLACEMENT CHARACTER}]")
_LISTED = 10
_MAX_UNUSABLE = 0.05


@dataclass
class DataReport:
    """Counts of the rows of one split, and the first 20 of each list; plain values."""

    split: str
    rows: int = 0  # read, bad and dropped ones included
    samples: int = 0
    formats: list[str] = field(default_factory=list)  # that were recognized
    tokens: int = 0
    labelled: int = 0  # of the tokens
    desirable: int | None = None  # samples with that verdict, if they have verdicts
    shortened: int = 0  # samples cut to max_length
    lost_labels: int = 0  # labeled tokens that max_length cut off or, with too_long: drop, left out with their rows
    dropped: dict[str, int] = field(default_factory=dict)  # well-formed rows that were left out, by reason
    unusable: int = 0  # of these, rows that leave nothing to train on
    bad_rows: int = 0
    bad: dict[str, list[str]] = field(default_factory=dict)  # their files and lines, by reason
    duplicates: int = 0  # rows equal to an earlier one of the split
    duplicate_pairs: list[str] = field(default_factory=list)  # each with the row that it equals
    overlap: int = 0  # rows that, or whose prompts, are trained on too
    overlap_prompts: int = 0  # of these, rows that are trained with another answer
    overlap_pairs: list[str] = field(default_factory=list)
    suspicious: int = 0  # trained rows that look incomplete or garbled
    suspicious_rows: list[str] = field(default_factory=list)  # each with its reasons
    unreasoned: int = 0  # rows with answers without reasoning, if generation begins within reasoning
    unread_columns: list[str] = field(default_factory=list)  # under our names
    absent_columns: list[str] = field(default_factory=list)  # mapped columns that a source lacks
    files: list[str] = field(default_factory=list)  # that were read
    delimiters: dict[str, list[str]] = field(default_factory=dict)  # CSV files, by a delimiter that nobody named
    long_rows: int = 0  # rows of several lines in a CSV file, as after a stray quote
    longest_row: str = ""  # of these
    most_lines: int = 1  # of the longest

    def drop(self, reason: str, rows: int = 1) -> None:
        """Count well-formed rows that are left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + rows

    def leave_untrained(self, reason: str) -> None:
        """Count a row that leaves nothing to train on."""
        self.unusable += 1
        self.drop(reason)

    def count_bad_row(self, row: BadRow) -> None:
        """Count a bad row."""
        self.bad_rows += 1
        if self.bad_rows <= _SHOWN:
            self.bad.setdefault(row.reason, []).append(row.where)

    def count_lines(self, row: Row) -> None:
        """Count the lines of a row, if it is of a CSV file."""
        if kind_of_file(row.file) in (".csv", ".tsv"):
            lines = count_lines(row.values.values())
            self.long_rows += lines > 1
            if lines > self.most_lines:
                self.longest_row, self.most_lines = row.where, lines

    def note_suspicious(self, where: str, answers: Iterable[str], questions: Iterable[str], text: str) -> None:
        """Note a row whose answer is a word such as "n/a", whose question is empty, or whose text was misread."""
        misread = _MISREAD.search(text)
        reasons = [f"the answer is {text!r}" for text in answers if text.lower() in _MEANS_NONE]
        reasons += ["the question is empty" for question in questions if not question.strip()][:1]
        reasons += [f"the character U+{ord(misread[0]):04X}, of another encoding?"] if misread else []
        if reasons:
            self.suspicious += 1
            self.suspicious_rows = [*self.suspicious_rows, f"{where} ({', '.join(reasons)})"][:_SHOWN]

    def count_duplicates(self, samples: SampleSet) -> None:
        """Count the rows that equal an earlier one."""
        repeats = find_repeats(samples)
        self.duplicates, self.duplicate_pairs = len(repeats.row_ids), repeats.pairs

    def count_overlap(self, samples: SampleSet, train: SampleSet) -> None:
        """Count the rows that, or whose prompts, are trained on too."""
        equal = find_repeats(samples, among=train)
        others = samples.take(np.flatnonzero(~np.isin(samples.row_ids, equal.row_ids)))
        prompts = find_repeats(others, among=train, by_prompt=True)
        self.overlap, self.overlap_prompts = len(equal.row_ids) + len(prompts.row_ids), len(prompts.row_ids)
        self.overlap_pairs = [*equal.pairs, *(f"{pair} (prompt)" for pair in prompts.pairs)][:_SHOWN]

    def count_samples(self, samples: SampleSet) -> None:
        """Count samples, replacing earlier counts."""
        self.samples, self.tokens, self.labelled = len(samples), len(samples.ids), int(samples.labelled.sum())
        self.desirable = None if samples.desirable is None else int(samples.desirable.sum())

    def describe(self, skip_bad: bool = True) -> str:
        """Return what is printed for the split: one line, and one more for each problem.

        Without ``skip_bad`` the bad rows, which are not in the counts, stop a training.
        """
        formats = f" ({', '.join(self.formats)})" if self.formats else ""
        others = f", {self.overlap_prompts:,} of them with another answer" if self.overlap_prompts else ""
        parts = [f"{self.split}: {count_of(self.rows, 'row')}{formats}", count_of(self.tokens, "token")]
        if self.labelled:
            parts.append(f"{self.labelled / self.tokens:.0%} labeled")
        if self.desirable is not None:
            parts.append(f"{self.desirable:,} of {count_of(self.samples, 'answer')} desirable")
        if self.samples != self.rows:
            parts.append(count_of(self.samples, "sample"))
        if self.shortened:
            parts.append(f"{self.shortened:,} shortened ({count_of(self.lost_labels, 'labeled token')} lost)")
        lines = [", ".join(parts)]
        bad = [f"{', '.join(locations)} ({reason})" for reason, locations in self.bad.items()]
        for title, entries in (
            ("read from", self.files),
            *((f"read by the delimiter {mark!r}", names) for mark, names in self.delimiters.items()),
            ("columns not read", self.unread_columns),
            ("data.columns names what no row of a source has", self.absent_columns),
            (f"{count_of(self.bad_rows, 'bad row')} {'skipped' if skip_bad else 'on which training stops'}", bad),
            (f"{count_of(self.suspicious, 'suspicious row')}; data.drop_answers drops answers", self.suspicious_rows),
            (f"{count_of(self.duplicates, 'row')} equal to an earlier one", self.duplicate_pairs),
            (
                f"{count_of(self.overlap, 'row')} trained on too{others}, so {self.split}_loss is too good",
                self.overlap_pairs,
            ),
        ):
            if entries:
                ellipsis = ", …" if len(entries) > _LISTED else ""
                lines.append(f"  {title}: {', '.join(entries[:_LISTED])}{ellipsis}")
        if self.long_rows:
            verb = "spans" if self.long_rows == 1 else "span"
            lines.append(
                f"  {count_of(self.long_rows, 'row')} of CSV files {verb} several lines, at most {self.most_lines:,} "
                f"({self.longest_row}): between two stray quotes all rows become one"
            )
        if self.unreasoned:
            lines.append(
                f"  {count_of(self.unreasoned, 'row')} with answers without reasoning, and generation begins within "
                "reasoning: these answers are trained after an empty block; data.template_options (such as "
                "enable_thinking: false) may let generation begin after it too"
            )
        return "\n".join(
            [*lines, *(f"  {count_of(count, 'row')} dropped: {reason}" for reason, count in self.dropped.items())]
        )

    def check(self, skip_bad: bool) -> None:
        """Reject a split that cannot be trained on as it is.

        Raises:
            UserError: there are bad rows without ``skip_bad``; or no sample is left; or more than 5 % of the rows leave
                nothing to train on.
        """
        bad_lines = [f"{count_of(self.bad_rows, 'row')} cannot be used:"]
        bad_lines += [f"  {', '.join(locations)}: {reason}" for reason, locations in self.bad.items()]
        if self.bad_rows > _SHOWN:
            bad_lines.append(f"  and {self.bad_rows - _SHOWN:,} more")
        reasons = "; ".join(f"{count:,}: {reason}" for reason, count in self.dropped.items())
        if self.bad_rows and not skip_bad:
            raise UserError(
                "\n".join([*bad_lines, "Correct them, or leave them out with `on_bad_row: skip`."]), "rows.bad"
            )
        if self.samples == 0:
            empty = f"{self.split}: none of {count_of(self.rows, 'row')} is left ({reasons})."
            raise UserError("\n".join(bad_lines) if self.bad_rows else empty, "rows.none_left")
        if self.unusable > _MAX_UNUSABLE * self.rows:
            raise UserError(
                f"{self.unusable:,} of {self.rows:,} rows of {self.split} leave nothing to train on (more than "
                f"{_MAX_UNUSABLE:.0%}; {reasons}). `qlora-lightning inspect` shows them; look at max_length, "
                "train_on and `train: false`.",
                "rows.untrained",
            )
