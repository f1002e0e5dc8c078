"""Rows of other tasks, which would train as if they were instructions: preferences, judged answers, pictures."""

from typing import Any

from qlora_lightning.data.reading.bad_rows import RowFault
from qlora_lightning.data.reading.reader import Row
from qlora_lightning.data.rows.columns import rename_columns
from qlora_lightning.data.rows.conversations import to_conversation
from qlora_lightning.data.rows.formats import FORMATS, choose_format
from qlora_lightning.data.rows.messages import MEDIA
from qlora_lightning.support.errors import UserError

_JUDGEMENTS = ("label", "kto_tag")  # TRL's and LLaMA-Factory's names for whether an answer is a good one
_NAMES = {"chosen", "rejected", *_JUDGEMENTS, *MEDIA}
_OR_A_FUNCTION = "or read such rows by a function row -> conversation, `format: package.module.function`"


def refuse_other_task(row: Row, values: dict[str, Any], needs_answer: bool) -> None:
    """Refuse a row of another task, whatever becomes of bad rows: all rows of its source are such.

    Args:
        row: the row, for its place.
        values: what it holds, under our names.
        needs_answer: whether its answer is trained on or judged by.

    Raises:
        UserError: it holds preferences, a boolean label beside its answer, or pictures, films or sounds.
    """
    named = _NAMES & values.keys()
    if not named:
        return
    for key in MEDIA:
        if _holds_something(values.get(key)):
            raise UserError(
                f"{row.where} has {key!r}, but only text is read: its answer would be trained without what it is "
                f"about. Take rows of text alone; or leave the column out by `data.columns: {{{key}: null}}`, "
                f"{_OR_A_FUNCTION}."
            )
    if not needs_answer:
        return
    if {"chosen", "rejected"} <= named and (_holds_something(values["chosen"]) or _holds_something(values["rejected"])):
        raise UserError(
            f"{row.where} is a preference row ('chosen' and 'rejected'), which is no instruction to train on. Take "
            f"rows with one answer; {_advise_on_preferences(row._replace(values=values))}{_OR_A_FUNCTION}."
        )
    for key in _JUDGEMENTS:
        if isinstance(values.get(key), bool) or str(values.get(key)).lower() in ("true", "false"):  # a word in CSV
            raise UserError(
                f"{row.where} has {key!r}: {str(values[key]).lower()}, which says whether its answer is good: bad ones "
                "would be trained as well. Take the rows where it is true, and leave the column out by "
                f"`data.columns: {{{key}: null}}`, {_OR_A_FUNCTION}."
            )


def _advise_on_preferences(row: Row) -> str:
    """Name the first mapping by which the row reads as a conversation that ends in its answer, if one does that."""
    answers = [form.keys(True)[-1] for form in sorted(FORMATS.values(), key=lambda form: len(form.keys(True)))]
    for answer in (None, *answers):  # a chosen conversation, which may repeat the prompt, before an answer to it
        columns = {"chosen": answer, "rejected": None}
        try:
            renamed = row._replace(values=rename_columns(row.values, columns))
            form = choose_format([renamed], "auto")
            if to_conversation(renamed.values, form)[-1]["role"] == "assistant":
                what = "the chosen ones" if answer else repr(form.keys(True)[-1])
                return f"or train {what} alone by `data.columns: {{chosen: {answer or 'null'}, rejected: null}}`, "
        except (RowFault, UserError):
            continue
    return ""


def _holds_something(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_something, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_something, value))
    return not (value is None or value is False or (isinstance(value, str | bytes) and not value))
