"""What is asked of the settings of a data module, and of each split's rows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qlora_lightning.data.reading.bad_rows import BadRow, refuse
from qlora_lightning.data.reading.cursor import REST_UNREAD
from qlora_lightning.data.reading.reader import Row
from qlora_lightning.data.samples.duplicates import find_duplicates
from qlora_lightning.data.samples.prepare import TOO_LONG
from qlora_lightning.data.samples.report import Report
from qlora_lightning.data.samples.sample_set import SampleSet
from qlora_lightning.support.errors import UserError

_MAX_UNUSABLE = 0.05


def check_word(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse a word that is none of the known ones.

    Raises:
        UserError: it is none.
    """
    if value not in known:
        raise UserError(f"{name}: expected {', '.join(known[:-1])} or {known[-1]}, found {value!r}.")


def check_combinations(
    val: Any,
    val_fraction: float | None,
    batch_size: int | None,
    tokens_per_batch: int | None,
    group_by_length: bool,
    streaming: bool,
    own_rows: bool = False,
) -> None:
    """Refuse settings that contradict each other."""
    if val is not None and val_fraction is not None:
        raise UserError("val and val_fraction are both given: keep one, the file or the share of the training rows.")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UserError(
            f"data.val_fraction is {val_fraction:g}: expected a share of the training rows between 0 and 1. For no "
            "validation set it to null; for validation rows of their own name a file in data.val."
        )
    if batch_size is not None and tokens_per_batch is not None:
        raise UserError("batch_size and tokens_per_batch are both given: keep one, rows or tokens per micro-batch.")
    for name, value in (("batch_size", batch_size), ("tokens_per_batch", tokens_per_batch)):
        if value is not None and value < 1:
            raise UserError(f"{name}: expected at least 1, found {value}.")
    if streaming and val_fraction is not None:
        raise UserError("val_fraction needs all rows, which streaming never has: name validation rows in data.val.")
    if streaming and own_rows:
        raise UserError("streaming reads the files of data.train itself, so load_rows cannot be overridden beside it.")
    if streaming and group_by_length:
        raise UserError("group_by_length needs all rows, which streaming never has: use tokens_per_batch instead.")


def recount(split: str, samples: SampleSet, whole: Report) -> Report:
    """Report on samples that were divided off; what became of rows before that is told with the training rows."""
    report = Report(split, len(set(samples.row_ids.tolist())), formats=list(whole.formats))
    if split == "train":
        report = replace(whole, rows=report.rows + sum(whole.dropped.values()) + whole.bad_rows)
    report.samples, report.tokens, report.labelled = len(samples), len(samples.ids), int(samples.labelled.sum())
    report.duplicates, report.duplicate_pairs = find_duplicates(samples)
    return report


def as_row(row: Row | BadRow | dict[str, Any], split: str, number: int) -> Row | BadRow:
    """Give a plain dict a place, so that messages can name it."""
    if isinstance(row, Row | BadRow):
        return row
    if not isinstance(row, dict):
        raise UserError(f"load_rows({split!r}): expected rows or dicts, found {type(row).__name__} as row {number}.")
    return Row(row, split, number)


def refuse_bad(report: Report, skip: bool) -> None:
    """Stop at bad rows, unless they are to be skipped.

    Raises:
        UserError: there are bad rows and ``skip`` is off, or one of them hides the rest of its file.
    """
    if not skip:
        refuse(report.bad, total=report.bad_rows)
    # to skip a row was asked for, not the rest of a file
    refuse([row for row in report.bad if row.reason.endswith(REST_UNREAD)], skippable=False)


def refuse_unusable(report: Report, skip: bool) -> None:
    """Stop at bad rows, unless they are to be skipped and leave something to use.

    Raises:
        UserError: as ``refuse_bad``; or nothing is left.
    """
    refuse_bad(report, skip)
    if report.samples == 0:
        refuse(report.bad, skippable=False, total=report.bad_rows)
        reasons = "; ".join(f"{count:,}: {reason}" for reason, count in report.dropped.items())
        raise UserError(f"{report.split}: none of {report.rows:,} rows is left ({reasons}).")


def check_usable(report: Report) -> None:
    """Refuse a split of which too many rows are well-formed, but leave nothing to learn from.

    Raises:
        UserError: more than 5 % do.
    """
    if report.unusable > _MAX_UNUSABLE * report.rows:
        reasons = "; ".join(f"{count:,}: {why}" for why, count in report.dropped.items() if why != TOO_LONG)
        raise UserError(
            f"{report.unusable:,} of {report.rows:,} rows of {report.split} have no labelled token (more than "
            f"{_MAX_UNUSABLE:.0%}) and would teach nothing ({reasons}). `qlora-lightning inspect` shows them; look at "
            "max_length, train_on and `train: false`."
        )
