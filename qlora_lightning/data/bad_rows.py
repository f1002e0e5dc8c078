"""Rows that cannot be used: what is wrong with each, and how many of them are told at once."""

from collections.abc import Sequence
from typing import NamedTuple

from qlora_lightning.errors import UserError

_SHOWN = 20


class RowFault(UserError):
    """One row cannot be used; the message is a short reason, to which the caller adds file and line."""


class BadRow(NamedTuple):
    """A row that was refused: where it stands (``train.jsonl:17``) and why."""

    where: str
    reason: str


def refuse(bad: Sequence[BadRow], skippable: bool = True) -> None:
    """Raise one error that lists the first 20 bad rows and counts the rest; do nothing when there are none.

    Args:
        bad: the refused rows, in file order.
        skippable: whether ``on_bad_row: skip`` would help, so that the message offers it.

    Raises:
        UserError: if there is any bad row.
    """
    if not bad:
        return
    rows = "1 row cannot be used:" if len(bad) == 1 else f"{len(bad)} rows cannot be used:"
    lines = [rows, *(f"  {row.where}: {row.reason}" for row in bad[:_SHOWN])]
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more")
    lines.append("Correct them, or leave them out with `on_bad_row: skip`." if skippable else "Correct them.")
    raise UserError("\n".join(lines))
