"""The rows that ``evaluate`` judges, with where they come from."""

import itertools
from collections.abc import Iterable
from typing import Any

from qlora_lightning.data.rows.bad_rows import BadRow
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.data.rows.sources import find_sources
from qlora_lightning.evaluation.judge import EvaluationRow, cut_rows
from qlora_lightning.support.errors import UserError


def read_rows(data: Any, split: str, most: int | None, group_by: str | None, limit: float = 1.0) -> list[EvaluationRow]:
    """Give the first rows of a split, in order, each with its place and its group.

    Args:
        data: The data module, set up.
        split: ``val`` or ``test``.
        most: How many rows; ``None``: those of the batches that ``limit`` leaves.
        group_by: A column of the rows.
        limit: The trainer's ``limit_val_batches`` or ``limit_test_batches``: a number of batches, or their share.

    Raises:
        UserError: No row has a labelled token, or none has that column.
    """
    rows: list[EvaluationRow] = []
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    for batch in itertools.islice(loader, None if most is not None else _batches(loader, limit)):
        if most is not None and len(rows) >= most:
            break
        rows += cut_rows(batch)
    rows = rows[:most]
    if not rows and most is None and not _batches(loader, limit) and limit != 1:
        raise UserError(f"trainer.limit_{split}_batches is {limit:g} and leaves no row: raise it, or give --rows N.")
    if not rows:
        raise UserError(f"There is nothing to judge: no row of {split} has a labelled token.")
    samples = data.samples.get(split)
    places = {} if samples is None else {int(row_id): samples.where(n) for n, row_id in enumerate(samples.row_ids)}
    groups = {} if group_by is None else _read_groups(data, split, group_by)
    for row in rows:
        row.place = places.get(row.number, f"row {row.number}")
        row.group = None if group_by is None else groups.get(row.number, "(none)")
    return rows


def _batches(loader: Any, limit: float) -> int | None:
    """Give how many batches Lightning takes; ``None``: all."""
    if isinstance(limit, int):
        return limit
    return None if limit == 1 else int(len(loader) * limit)


def source_names(data: Any, split: str) -> list[str]:
    """Name the sources of a split as the user wrote them, in the order of their numbers."""
    value = data.files.get(_read_from(data, split))
    return [] if value is None else [source.path for source in find_sources(value, split)]


def _read_groups(data: Any, split: str, column: str) -> dict[int, str]:
    found: dict[int, str] = {}
    rows: Iterable[Row | BadRow | dict[str, Any]] = data.load_rows(_read_from(data, split))
    for number, row in enumerate(rows):
        values = row.values if isinstance(row, Row) else row if isinstance(row, dict) else {}
        if values.get(column) is not None:
            found[number] = str(values[column])
    if not found:
        raise UserError(f"--group-by {column}: no row of {split} has that column.")
    return found


def _read_from(data: Any, split: str) -> str:
    """Give the split whose files hold the rows: validation rows may be held out of the training rows."""
    return "train" if split == "val" and data.val_fraction is not None else split
