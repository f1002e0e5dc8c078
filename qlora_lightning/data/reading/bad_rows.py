"""Rows that cannot be used: what is wrong with each, and how many of them are told at once."""

from collections.abc import Sequence
from typing import NamedTuple

from qlora_lightning.support.errors import UserError

SHOWN = 20


class RowFault(UserError):
    """One row cannot be used; the message is a short reason, to which the caller adds file and line."""


class BadRow(NamedTuple):
    """A row that was refused: where it stands (``train.jsonl:17``) and why."""

    where: str
    reason: str


def refuse(bad: Sequence[BadRow], skippable: bool = True, total: int | None = None) -> None:
    """Raise one error that lists the first 20 bad rows and counts the rest; do nothing when there are none.

    Args:
        bad: the refused rows, or the first of them, in file order.
        skippable: whether ``on_bad_row: skip`` would help, so that the message offers it.
        total: how many there are in all.

    Raises:
        UserError: if there is any bad row.
    """
    if not bad:
        return
    count = total or len(bad)
    rows = "1 row cannot be used:" if count == 1 else f"{count} rows cannot be used:"
    lines = [rows, *(f"  {row.where}: {row.reason}" for row in bad[:SHOWN])]
    if count > SHOWN:
        lines.append(f"  and {count - SHOWN} more")
    lines.append("Correct them, or leave them out with `on_bad_row: skip`." if skippable else "Correct them.")
    raise UserError("\n".join(lines))
