"""Columns under other names, or left out: ``columns: {their name: our name, another: null}``."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qlora_lightning.data.reading.bad_rows import RowFault
from qlora_lightning.data.reading.reader import Row
from qlora_lightning.data.rows.formats import KEYS, rows_by_keys
from qlora_lightning.support.errors import UserError


def rename_columns(values: dict[str, Any], columns: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the row under our names, in the order it had, without columns that are mapped to null.

    Raises:
        RowFault: if a column would take the place of another one.
    """
    if not columns:
        return values
    names = {key: ours for key in values if (ours := columns.get(key, key)) is not None}
    renamed = {ours: values[key] for key, ours in names.items()}
    if len(renamed) < len(names):
        raise RowFault(_describe_clash(names))
    return renamed


def check_columns(rows: Sequence[Row], columns: Mapping[str, str | None], format: str = "auto") -> None:
    """Check ``columns`` against the rows, as they are before anything is renamed.

    Args:
        rows: the rows that the mapping is for, at least one.
        columns: the mapping.
        format: as in ``format:``; a function of the user's own may read names that are not ours.

    Raises:
        UserError: if no row has one of the columns, our name is none that is read, two columns are mapped to one name,
            or a column would take the place of another one.
    """
    if not isinstance(columns, Mapping) or not all(
        isinstance(theirs, str) and isinstance(ours, str | None) for theirs, ours in columns.items()
    ):
        raise UserError(f"columns: expected {{their name: our name}}, found {columns!r}.")
    if not columns:
        return
    for ours in (name for name in columns.values() if name is not None):
        twice = [repr(theirs) for theirs, name in columns.items() if name == ours]
        if len(twice) > 1:
            raise UserError(f"columns: {' and '.join(twice)} are both mapped to {ours!r}: keep one of them.")
        if "." not in format and ours not in KEYS:
            raise UserError(f"columns: no format reads {ours!r}; expected {', '.join(KEYS)}.{_nearest(ours, KEYS)}")
    shapes = rows_by_keys(rows)
    found = list(dict.fromkeys(key for keys in shapes for key in keys))
    for theirs in columns:
        if theirs not in found:
            raise UserError(
                f"columns: no row has {theirs!r}, found {', '.join(found) or '(none)'}.{_nearest(theirs, found)}"
            )
    for row in shapes.values():
        try:
            rename_columns(row.values, columns)
        except RowFault as fault:
            raise UserError(f"columns: {row.where} {fault}.") from fault


def _describe_clash(names: Mapping[str, str]) -> str:
    taken: dict[str, str] = {}
    for key, ours in names.items():
        if ours in taken:
            break
        taken[ours] = key
    return f"has {taken[ours]!r} and {key!r}, which would both be {ours!r} by `columns:`"


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
