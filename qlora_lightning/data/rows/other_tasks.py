"""Rows of other tasks, which would train as if they were instructions: preferences, judged answers, pictures."""

from typing import Any

from qlora_lightning.data.reading.reader import Row
from qlora_lightning.data.rows.formats import FORMATS
from qlora_lightning.support.errors import UserError

MEDIA = ("images", "videos", "audios", "image", "video", "audio")
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
            f"rows with one answer; {_advise_on_preferences(values)}{_OR_A_FUNCTION}."
        )
    for key in _JUDGEMENTS:
        if isinstance(values.get(key), bool) or str(values.get(key)).lower() in ("true", "false"):  # a word in CSV
            raise UserError(
                f"{row.where} has {key!r}: {str(values[key]).lower()}, which says whether its answer is good: bad ones "
                "would be trained as well. Take the rows where it is true, and leave the column out by "
                f"`data.columns: {{{key}: null}}`, {_OR_A_FUNCTION}."
            )


def _advise_on_preferences(values: dict[str, Any]) -> str:
    """Say by which mapping the good answers alone are trained, where one does that."""
    forms = [form for form in FORMATS.values() if all(key in values for key in form.prompt_keys)]
    answer = next((key for form in forms for key in form.answer_keys), None)
    if not forms and isinstance(values["chosen"], list):
        answer = "messages"
    if answer is None:
        return ""
    if answer in values:
        return f"or train {answer!r} alone by `data.columns: {{chosen: null, rejected: null}}`, "
    return f"or train the chosen ones alone by `data.columns: {{chosen: {answer}}}`, "


def _holds_something(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_something, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_something, value))
    return not (value is None or value is False or (isinstance(value, str | bytes) and not value))
