"""Reads ``metrics.csv``: each column as the points of a curve."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_lightning.support.errors import UserError

LARGEST = 3.5e38  # just beyond what float32 holds
Points = list[tuple[float, float]]
"""(optimizer steps done, value), in the order of the file."""


def read_metrics(file: Path) -> dict[str, Points]:
    """Read every column as points; cells that are empty, or no number that a run can measure, are left out.

    Half a line at the end, as a kill or a run that is going on leaves it, is left out too. No file gives no columns.

    Raises:
        UserError: It cannot be read, or has no column ``step``.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")  # a spreadsheet writes a mark of its own before the first name
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    whole, _, _ = text.rpartition("\n")
    if not whole:
        return {}
    try:
        return _read_columns(whole.splitlines(), file)
    except csv.Error as error:
        raise UserError(f"{file} is no table of metrics: {error}.") from error


def _read_columns(lines: Sequence[str], file: Path) -> dict[str, Points]:
    rows = csv.DictReader(lines)
    if "step" not in (rows.fieldnames or ()):
        raise UserError(f"{file} is no table of metrics: expected a column `step` in its first line.")
    columns: dict[str, Points] = {name: [] for name in rows.fieldnames or () if name != "step"}
    for row in rows:
        step = _number(row["step"])
        for name, points in columns.items():
            value = _number(row[name])
            if step is not None and value is not None:
                points.append((step + 1, value))  # Lightning counts steps from 0
    return columns


def last(metrics: Mapping[str, Points], name: str) -> float | None:
    """Give the last value of a column, if it has one."""
    points = metrics.get(name)
    return points[-1][1] if points else None


def highest(metrics: Mapping[str, Points], name: str) -> float | None:
    """Give the largest value of a column, if it has one."""
    points = metrics.get(name)
    return max(value for _, value in points) if points else None


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if abs(value) <= LARGEST else None  # not a number is not
