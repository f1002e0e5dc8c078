"""Row formats: from the keys of a row to a conversation."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

from qlora_lightning.data.reading.reader import Row
from qlora_lightning.data.rows.format_function import import_function
from qlora_lightning.data.rows.shapes import from_alpaca, from_messages, from_prompt_completion, from_question_answer
from qlora_lightning.data.rows.sharegpt import from_sharegpt
from qlora_lightning.support.errors import UserError


class Message(TypedDict):
    """One turn: who speaks (system, user, assistant or tool), the text, and what else a chat template may need.

    ``train`` is only ever False, on an answer that is not to be trained; templates never see it.
    """

    role: str
    content: str
    train: NotRequired[bool]
    tool_calls: NotRequired[list[dict[str, Any]]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]


Conversation = list[Message]


_OF_EVERY_ROW = ("system", "tools")


class Format(NamedTuple):
    """How a row becomes a conversation.

    Attributes:
        name: as in ``format:``.
        prompt_keys: keys that every row has.
        answer_keys: keys that a row to train on has as well; rows to predict may lack them.
        convert: the function; what it returns is checked by the caller.
        other_keys: keys that a row may have, beside ``system`` and ``tools``, which every row may.
    """

    name: str
    prompt_keys: tuple[str, ...]
    answer_keys: tuple[str, ...]
    convert: Callable[[dict[str, Any]], Any]
    other_keys: tuple[str, ...] = ()

    @property
    def read_keys(self) -> tuple[str, ...]:
        """All keys of a row that are read."""
        return (*self.keys(True), *self.other_keys, *_OF_EVERY_ROW)

    def keys(self, needs_answer: bool) -> tuple[str, ...]:
        """Return the keys that a row must have."""
        return self.prompt_keys + self.answer_keys if needs_answer else self.prompt_keys


FORMATS = {
    form.name: form
    for form in (
        Format("alpaca", ("instruction",), ("output",), from_alpaca, ("input", "history")),
        Format("messages", ("messages",), (), from_messages),
        Format("sharegpt", ("conversations",), (), from_sharegpt),
        Format("prompt_completion", ("prompt",), ("completion",), from_prompt_completion),
        Format("question_answer", ("question",), ("answer",), from_question_answer),
    )
}

KEYS = (*(key for form in FORMATS.values() for key in (*form.keys(True), *form.other_keys)), *_OF_EVERY_ROW)


def choose_format(rows: Sequence[Row], name: str, needs_answer: bool = True) -> Format:
    """Return the format of the rows of one file.

    Args:
        rows: the rows, at least one.
        name: ``auto``, the name of a format, or the dotted path of a function ``row -> conversation``.
        needs_answer: whether the rows are trained on, so that they must hold answers.

    Raises:
        UserError: if the name is unknown, or ``auto`` recognises no format or more than one.
    """
    if name != "auto":
        return _named_format(name)
    distinct = rows_by_keys(rows)
    # Rows to predict may hold answers too: then their format is told by all its keys, as in training.
    for answers in (True,) if needs_answer else (True, False):
        fitting = [form for row in distinct.values() if (form := _recognise(row, answers))]
        if fitting:
            return fitting[0]
    raise UserError(_describe_unrecognised(rows[0], needs_answer))


def rows_by_keys(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    """Return the first row of each set of keys: few rows, however many there are."""
    first: dict[tuple[str, ...], Row] = {}
    for row in rows:
        first.setdefault(tuple(row.values), row)
    return first


def _recognise(row: Row, needs_answer: bool) -> Format | None:
    fitting = [form for form in FORMATS.values() if row.values.keys() >= set(form.keys(needs_answer))]
    if len(fitting) > 1:
        names = " and ".join(form.name for form in fitting)
        raise UserError(f"{row.where} fits more than one format, {names}: name one in `format:`.")
    return fitting[0] if fitting else None


def _describe_unrecognised(row: Row, needs_answer: bool) -> str:
    found = list(row.values)
    wanted = [f"{' + '.join(form.keys(needs_answer))} ({form.name})" for form in FORMATS.values()]
    hints = []
    for key in dict.fromkeys(key for form in FORMATS.values() for key in form.keys(needs_answer)):
        near = difflib.get_close_matches(key, found, n=1, cutoff=0.75)
        if near and key not in found:
            hints.append(f" Did you mean {key!r} by {near[0]!r}?")
    return (
        f"{row.where}: no format is recognised by the keys {', '.join(found) or '(none)'}; expected "
        f"{', '.join(wanted)}.{''.join(hints)} Map other names with `columns: {{their name: our name}}`; for another "
        "shape name a function row -> conversation: `format: package.module.function`."
    )


def _named_format(name: str) -> Format:
    if name in FORMATS:
        return FORMATS[name]
    if "." not in name:
        near = difflib.get_close_matches(name, ["auto", *FORMATS], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"format: expected auto, {', '.join(FORMATS)} or the dotted path of a function, found {name!r}.{hint}"
        )
    return Format(name, (), (), import_function(name))
