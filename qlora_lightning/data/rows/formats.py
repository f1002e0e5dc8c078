"""Row formats: from the columns of a row to its messages."""

import difflib
import importlib
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlora_lightning.data.rows.bad_rows import RowFault, kind_of, read_string
from qlora_lightning.data.rows.conversation import MEDIA, Chat, Conversation, check_message, check_order
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.data.rows.sources import RowSettings
from qlora_lightning.data.rows.tools import find_tools, parse_json
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
    is_read = "." in format or any(_is_recognised(row, columns) for row in shapes.values())
    for theirs, name in columns.items():
        # a mapping may be for other sources, whose columns have these names
        near = _nearest(theirs, [name for name in found if name not in columns])
        if theirs not in found and name not in found and (near or not is_read):
            raise UserError(f"columns: no row has {theirs!r}, found {', '.join(found) or '(none)'}.{near}")
    for row in shapes.values():
        try:
            rename_columns(row.values, columns)
        except RowFault as fault:
            raise UserError(f"columns: {row.where} {fault}.") from fault


def _is_recognised(row: Row, columns: Mapping[str, str | None]) -> bool:
    try:
        choose_format([row._replace(values=rename_columns(row.values, columns))], "auto", needs_answer=False)
    except UserError:
        return False
    return True


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


def import_function(path: str) -> Callable[[dict[str, Any]], Any]:
    """Import a function by its dotted path; a module in the current folder is found as well.

    Raises:
        UserError: if the module cannot be imported, or what it holds under that name is no function.
    """
    module_name, _, name = path.rpartition(".")
    folder = str(Path.cwd())
    sys.path.append(folder)  # an installed command does not look there, where people keep their function
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"format: cannot import {module_name!r} for {path!r}: {type(error).__name__}: {error}."
        ) from error
    finally:
        sys.path.remove(folder)
    function = getattr(module, name, None)
    if function is None:
        near = difflib.get_close_matches(name, dir(module), n=1)
        raise UserError(f"format: {module_name} has no {name!r}{f'; did you mean {near[0]!r}?' if near else '.'}")
    if not callable(function):
        raise UserError(f"format: {path} is {type(function).__name__}, not a function row -> conversation.")
    return function  # type: ignore[no-any-return]


def from_alpaca(values: dict[str, Any]) -> Any:
    """Read ``instruction``, ``input`` and ``output``; the pairs of ``history`` become earlier turns."""
    prompt, extra = read_string(values["instruction"], "'instruction'"), values.get("input")
    if extra not in (None, ""):
        extra = read_string(extra, "'input'")
        prompt = f"{prompt}\n\n{extra}" if prompt else extra
    earlier = [] if values.get("history") in (None, "") else _read_history(values["history"])
    return with_system(values, [*earlier, _message("user", prompt), *_answer(values.get("output"))])


def from_messages(values: dict[str, Any]) -> Any:
    """Read ``messages``, a list as OpenAI has it."""
    return with_system(values, values["messages"])


def from_prompt_completion(values: dict[str, Any]) -> Any:
    """Read ``prompt`` and ``completion``: two strings, or two lists of messages; only the completion is trained."""
    prompt, completion = values["prompt"], values.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list | None):
        return with_system(values, [_untrained(message) for message in prompt] + (completion or []))
    if isinstance(prompt, str) and isinstance(completion, str | None):
        return with_system(values, [_message("user", prompt), *_answer(completion)])
    raise RowFault(
        "'prompt' and 'completion' must be two strings or two lists of messages, found "
        f"{kind_of(prompt)} and {kind_of(completion)}"
    )


def from_question_answer(values: dict[str, Any]) -> Any:
    """Read ``question`` and ``answer``."""
    return with_system(values, [_message("user", values["question"]), *_answer(values.get("answer"))])


def with_system(values: dict[str, Any], messages: Any) -> Any:
    """Put the row's ``system``, if it has one, before the messages.

    Raises:
        RowFault: if the messages begin with a system message as well.
    """
    system = values.get("system")
    if system in (None, "") or not isinstance(messages, list):
        return messages
    first = messages[0] if messages else None
    if isinstance(first, dict) and first.get("role") == "system":
        raise RowFault("has a system message and the key 'system' as well: expected one of them")
    return [_message("system", system), *messages]


def _read_history(history: Any) -> list[dict[str, Any]]:
    expected = "'history' must be a list of [question, answer] pairs"
    if not isinstance(history, list):
        raise RowFault(f"{expected}, found {kind_of(history)}")
    turns = []
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            found = f"{len(pair)} values" if isinstance(pair, list) else kind_of(pair)
            raise RowFault(f"{expected}, found {found} as pair {number}")
        turns += [_message("user", pair[0]), _message("assistant", pair[1])]
    return turns


def _untrained(message: Any) -> Any:
    is_answer = isinstance(message, dict) and message.get("role") == "assistant"
    return {**message, "train": False} if is_answer else message


def _answer(answer: Any) -> list[dict[str, Any]]:
    return [] if answer is None else [_message("assistant", answer)]


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


def from_sharegpt(values: dict[str, Any]) -> Any:
    """Read ``conversations``; a turn from ``function_call`` becomes an assistant message with ``tool_calls``."""
    turns = values["conversations"]
    if not isinstance(turns, list):
        raise RowFault(f"'conversations' must be a list of turns, found {kind_of(turns)}")
    return with_system(values, [_read_turn(turn, number) for number, turn in enumerate(turns, start=1)])


def _read_turn(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        found = ", ".join(map(str, turn)) if isinstance(turn, dict) else kind_of(turn)
        is_message = isinstance(turn, dict) and {"role", "content"} <= turn.keys()
        advice = ": map the column with `columns: {conversations: messages}`" if is_message else ""
        raise RowFault(f"turn {number} must have 'from' and 'value', found {found}{advice}")
    speaker, value = turn["from"], turn["value"]
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowFault(f"turn {number} is from {reprlib.repr(speaker)}, expected {', '.join(_ROLES)}")
    message = {"role": role, "content": value, **{key: turn[key] for key in turn if key not in ("from", "value")}}
    if speaker != "function_call":
        return message
    calls = parse_json(value, f"turn {number} (function_call)")
    return {**message, "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}


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


_MAX_SAID = 300  # an error may repeat the whole row


def to_conversation(
    values: dict[str, Any], form: Format, system: str | None = None, needs_answer: bool = True
) -> Conversation:
    """Convert one row and check what comes out.

    Args:
        values: the row.
        form: its format.
        system: a system prompt for conversations that have none.
        needs_answer: whether at least one assistant turn is required.

    Raises:
        RowFault: with the reason why the row cannot be used.
    """
    missing = [key for key in form.keys(needs_answer) if key not in values]
    if missing:
        raise RowFault(
            f"lacks {' and '.join(map(repr, missing))} of the format {form.name} (found {', '.join(values)})"
        )
    null = [key for key in form.keys(needs_answer) if values[key] is None]
    if null:
        raise RowFault(f"{' and '.join(map(repr, null))} is null")
    try:
        messages = form.convert(dict(values))
    except RowFault:
        raise
    except Exception as error:  # a user's function may raise anything
        said = " ".join(str(error).split())[:_MAX_SAID]
        raise RowFault(
            f"format function {form.name} raised {type(error).__name__}{f': {said}' if said else ''}"
        ) from error
    if not isinstance(messages, list) or not messages:
        source = "" if form.name in FORMATS else f" from the format function {form.name}"
        raise RowFault(f"expected a list of messages{source}, found {kind_of(messages)}")
    conversation = [check_message(message, number) for number, message in enumerate(messages, start=1)]
    check_order(conversation, needs_answer)
    if system and conversation[0]["role"] != "system":
        conversation.insert(0, {"role": "system", "content": system})
    return conversation


class RowConverter:
    """Turns the rows of one source into chats. What becomes of a row follows from the row and the settings alone.

    Args:
        settings: of the source.
        needs_answer: whether the rows are trained on, so that they must hold answers.

    Attributes:
        formats: names of the formats that were recognised, in the order in which they came.
        unread_columns: columns that no format reads, under our names.
    """

    def __init__(self, settings: RowSettings, needs_answer: bool = True) -> None:
        self.settings, self.needs_answer = settings, needs_answer
        self.formats: list[str] = []
        self.unread_columns: list[str] = []
        self._by_columns: dict[tuple[str, ...], Format] = {}
        self._usual: Format | None = None

    def check(self, rows: Sequence[Row]) -> None:
        """Check the settings against the first rows of the source.

        Raises:
            UserError: the settings do not fit these rows.
        """
        if not rows:
            return
        check_columns(rows, self.settings.columns, self.settings.format)
        for row in rows_by_keys(rows).values():
            renamed = row._replace(values=rename_columns(row.values, self.settings.columns))
            try:
                self._usual = self._usual or choose_format([renamed], self.settings.format, self.needs_answer)
            except UserError:
                continue

    def convert(self, row: Row) -> Chat:
        """Convert one row.

        Raises:
            RowFault: this row cannot be used.
            UserError: no row of its shape can be used.
        """
        settings, is_function = self.settings, "." in self.settings.format
        values = rename_columns(row.values, settings.columns)
        if not is_function:  # a function of the user's own may read what it likes
            refuse_other_task(row, values, self.needs_answer)
        columns = tuple(values)
        if columns not in self._by_columns:
            form = self._choose(row._replace(values=values))
            self._by_columns[columns] = form
            if form.name not in self.formats:
                self.formats.append(form.name)
            if self.needs_answer and not is_function and set(form.keys(True)) <= set(columns):
                unread = self.unread_columns
                unread += [name for name in columns if name not in form.read_keys and name not in unread]
        form = self._by_columns[columns]
        return Chat(to_conversation(values, form, settings.system, self.needs_answer), find_tools(values))

    def _choose(self, row: Row) -> Format:
        try:
            return choose_format([row], self.settings.format, self.needs_answer)
        except UserError:
            if self._usual is None:
                raise
            return self._usual  # which tells what this row lacks
