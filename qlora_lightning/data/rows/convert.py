"""Convert a row: rename its columns, recognise its format, check its messages."""

import reprlib
from typing import Any

from qlora_lightning.data.rows.bad_rows import RowFault, read_string
from qlora_lightning.data.rows.conversation import (
    MEDIA,
    Chat,
    Content,
    Pair,
    Text,
    Tokens,
    check_order,
    find_tools,
    read_message,
)
from qlora_lightning.data.rows.formats import RECOGNISED, Format, find_format, recognise
from qlora_lightning.data.rows.pairs import PREFERENCE_FORMAT, VERDICTS, attach_verdict, pair_up
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.data.rows.sources import RowSettings
from qlora_lightning.support.errors import UserError


class RowConverter:
    """Turns the rows of one source into contents, which depend on the row and the settings alone.

    Args:
        settings: how the rows are read.
        needs_answer: whether they are trained; rows to predict may lack answers.
        pairs: whether they are preferences: two answers to compare, or one with a verdict.

    Attributes:
        formats: names of the recognised formats, in order of appearance.
        unread_columns: columns that no format reads, under our names.
        absent_columns: mapped columns that no row has.

    Raises:
        UserError: there is no such format.
    """

    def __init__(self, settings: RowSettings, needs_answer: bool = True, pairs: bool = False) -> None:
        self.settings, self.needs_answer, self.pairs = settings, needs_answer, pairs
        self.formats: list[str] = []
        self.unread_columns: list[str] = []
        self.absent_columns = set(settings.columns)
        self._unrecognised: Row | None = None  # the first row that no format fits
        self._named = None if settings.format == "auto" else find_format(settings.format)
        if pairs and self._named is None:
            self._named = PREFERENCE_FORMAT

    def check(self) -> None:
        """Raise a UserError if no format fits any row so far."""
        first = self._unrecognised
        if first is not None and not self.formats:
            expected = ", ".join(f"{' + '.join(form.keys(self.needs_answer))} ({form.name})" for form in RECOGNISED)
            raise UserError(
                f"{first.where}: no format is recognised by the keys {', '.join(first.values) or '(none)'}; "
                f"expected {expected}. Map other names with `columns: {{their name: our name}}`; raw text is read by "
                "`format: text`, any other shape by a function, `format: package.module.function`."
            )

    def convert(self, row: Row) -> Content | Pair:
        """Convert one row.

        Raises:
            RowFault: the row cannot be used.
            UserError: no row of its shape can be.
        """
        row = self._rename(row)
        form = self._find_format(row)
        if form is None:
            self._unrecognised = self._unrecognised or row
            raise RowFault(f"no format is recognised by its columns {', '.join(row.values)}")
        if form.name not in self.formats:
            self.formats.append(form.name)
        if form.is_ours and self.needs_answer:
            read_keys = (*form.read_keys, *(("label",) if self.pairs else ()))
            self.unread_columns += [key for key in row.values if key not in (*read_keys, *self.unread_columns)]
        content = self._read(form, row.values)
        if not self.pairs:
            return content if isinstance(content, Text | Tokens) else self._to_chat(content, row.values, form)
        if isinstance(content, tuple) and [type(item) for item in content[1:]] == [bool]:  # from a user's function
            return attach_verdict(self._to_chat(content[0], row.values, form), content[1])
        if form.is_ours and form is not PREFERENCE_FORMAT:
            verdict = VERDICTS.get(str(row.values.get("label")).lower())
            if verdict is None:
                raise RowFault(f"'label' must be true or false, found {reprlib.repr(row.values.get('label'))}")
            return attach_verdict(self._to_chat(content, row.values, form), verdict)
        if not isinstance(content, tuple | list) or len(content) != 2:
            raise RowFault(f"expected two conversations by the format {form.name}, found {reprlib.repr(content)}")
        return pair_up(*(self._to_chat(messages, row.values, form) for messages in content))

    def _rename(self, row: Row) -> Row:
        """Return a row under our names, without columns that are mapped to null."""
        columns = self.settings.columns
        self.absent_columns -= row.values.keys()
        names = {key: name for key in row.values if (name := columns.get(key, key)) is not None}
        if len(set(names.values())) < len(names):
            raise UserError(f"{row.where}: `columns:` gives two of {', '.join(row.values)} the same name.")
        row = row._replace(values={name: row.values[key] for key, name in names.items()})
        if self._named is None or self._named.is_ours:  # a user's function may read any column
            _refuse_other_task(row, self.needs_answer, self.pairs)
        return row

    def _find_format(self, row: Row) -> Format | None:
        is_single = self.pairs and row.values.get("rejected") is None and row.values.get("label") is not None
        form = None if is_single and self.settings.format == "auto" else self._named
        form = form or recognise(row.values, self.needs_answer, row.where)
        if form and not form.is_chat and not self.needs_answer:
            raise UserError(f"{row.where}: rows of the format {form.name} hold no prompt that could be answered.")
        return form

    def _read(self, form: Format, values: dict[str, Any]) -> Any:
        missing = [key for key in form.keys(self.needs_answer) if values.get(key) is None]
        if missing:
            names = " and ".join(map(repr, missing))
            is_no_pair = form is PREFERENCE_FORMAT and len(missing) == 2
            hint = "; a single answer (`objective: kto`) needs true or false in 'label'" if is_no_pair else ""
            raise RowFault(f"{names} is missing or null (format {form.name}, columns {', '.join(values)}){hint}")
        try:
            return form.read(dict(values))
        except RowFault:
            raise
        except Exception as error:  # a user's function may raise anything, and so may ours on unexpected rows
            reason = " ".join(str(error).split())[:300]  # an error may repeat the whole row
            raise RowFault(f"cannot be read by the format {form.name}: {type(error).__name__}: {reason}") from error

    def _to_chat(self, content: Any, values: dict[str, Any], form: Format) -> Chat:
        """Check a conversation, and add system prompt and tools."""
        messages, tools, row_system = content, values.get("tools"), values.get("system") if form.is_ours else None
        if isinstance(content, Chat):
            messages, tools = content.messages, content.tools
        if not isinstance(messages, list) or not messages:
            raise RowFault(f"expected a list of messages by the format {form.name}, found {reprlib.repr(messages)}")
        roles = self.settings.roles
        conversation = [read_message(message, number, roles) for number, message in enumerate(messages, start=1)]
        check_order(conversation, self.needs_answer)
        if row_system and conversation[0]["role"] == "system":
            raise RowFault("has a system message and the key 'system' as well: expected one of them")
        system = read_string(row_system, "'system'") if row_system else self.settings.system
        if system and conversation[0]["role"] != "system":
            conversation.insert(0, {"role": "system", "content": system})
        return Chat(conversation, find_tools(tools, conversation))


def _refuse_other_task(row: Row, needs_answer: bool, pairs: bool) -> None:
    """Raise a UserError for a row of another task, also with ``on_bad_row: skip``: its whole source is affected."""
    for key, value in row.values.items():
        if key in MEDIA and (any(value.values()) if isinstance(value, dict) else value):  # {"bytes": None, "path": …}
            reason = "only text is read: its answer would be trained without what it is about"
        elif pairs or not needs_answer:
            continue
        elif key == "rejected" and value and "chosen" in row.values:
            reason = "a preference row is for PreferenceModule and PreferenceDataModule"
        elif key == "label" and str(value).lower() in VERDICTS:
            reason = "a verdict on the answer is for PreferenceModule (`objective: kto`) and PreferenceDataModule"
        else:
            continue
        raise UserError(
            f"{row.where} has {key!r}, but {reason}. Leave out what is not to be trained, and the column by "
            f"`columns: {{{key}: null}}` (naming the answer, as in `chosen: completion`), or read such rows by a "
            "function, `format: package.module.function`."
        )
