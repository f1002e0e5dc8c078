"""Row formats: from the columns of a row to a conversation, a text, tokens, or two answers to compare."""

import inspect
import pkgutil
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from qlora_lightning.data.rows.bad_rows import RowFault, parse_json, read_string
from qlora_lightning.data.rows.conversation import (
    MEDIA,
    ROLES,
    Chat,
    Content,
    Pair,
    Text,
    Tokens,
    check_order,
    find_tools,
    is_answer,
    read_message,
)
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.data.rows.sources import RowSettings
from qlora_lightning.support.errors import UserError, nearest


class RowConverter:
    """Turns the rows of one source into contents. What becomes of a row follows from it and the settings alone.

    Attributes:
        formats: names of the formats that were recognised, in the order in which they came.
        unread_columns: columns that no format reads, under our names.

    Raises:
        UserError: there is no such format, role or column.
    """

    def __init__(self, settings: RowSettings, needs_answer: bool = True, pairs: bool = False) -> None:
        self.settings, self.needs_answer, self.pairs = settings, needs_answer, pairs
        self.formats: list[str] = []
        self.unread_columns: list[str] = []
        named = settings.format
        if pairs and named != "auto" and "." not in named:
            raise UserError(
                f"format: expected auto or the dotted path of a function that returns two answers, found {named!r}."
            )
        self._named = None if named == "auto" else _name_format(named)
        if pairs and self._named is None:
            self._named = PREFERENCE._replace(convert=partial(from_preference, roles=settings.roles))
        self._by_columns: dict[tuple[str, ...], Format | None] = {}
        other_shape = " If the rows have another shape than those that `columns` is for, add `--data.columns null`."
        self._remedy = other_shape if settings.columns else ""
        for ours in settings.roles.values():
            if ours not in ROLES:
                raise UserError(f"roles: expected {', '.join(ROLES)}, found {ours!r}.{nearest(str(ours), ROLES)}")
        for column in settings.columns.values():
            if column is not None and column not in KEYS and "." not in settings.format:
                hint = nearest(column, KEYS)
                raise UserError(f"columns: no format reads {column!r}; expected {', '.join(KEYS)}.{hint}")

    def check(self, rows: Sequence[Row]) -> None:
        """Raise a UserError if the settings do not fit the first rows of the source, or no format does."""
        if not rows:
            return
        self._check_columns(list(dict.fromkeys(name for row in rows for name in row.values)))
        renamed = [self._rename(row) for row in rows]
        if not any(map(self._format_of, renamed)):
            raise UserError(_describe_unrecognised(renamed[0], self.needs_answer) + self._remedy)

    def convert(self, row: Row) -> Content | Pair:
        """Convert one row, or raise a RowFault; a UserError if no row of its shape can be used."""
        row = self._rename(row)
        form = self._format_of(row)
        if form is None:  # of a row that has some keys of a format, it is said which ones it lacks
            near = (form for form in _BY_COLUMNS if row.values.keys() & set(form.keys(self.needs_answer)))
            form = next(near, None)
        if form is None:
            raise RowFault(f"no format is recognised by its columns {', '.join(row.values)}")
        return _to_content(row.values, form, self.settings, self.needs_answer, self.pairs)

    def _check_columns(self, found: list[str]) -> None:
        """Refuse a misspelt name in ``columns``; those of other sources pass."""
        columns = self.settings.columns
        for theirs, ours in columns.items():
            near = nearest(theirs, [name for name in found if name not in columns])
            if near and theirs not in found and ours not in found:
                raise UserError(f"columns: no row has {theirs!r}, found {', '.join(found)}.{near}{self._remedy}")

    def _rename(self, row: Row) -> Row:
        """Return a row under our names, without columns that are mapped to null, which is of no other task."""
        columns = self.settings.columns
        if columns:
            names = {key: ours for key in row.values if (ours := columns.get(key, key)) is not None}
            if len(set(names.values())) < len(names):
                names_of_row = ", ".join(row.values)
                raise UserError(f"{row.where}: `columns:` gives two of {names_of_row} the same name.{self._remedy}")
            row = row._replace(values={ours: row.values[key] for key, ours in names.items()})
        if self._named is None or self._named.is_ours:  # a function of the user's own may read what it likes
            _refuse_other_task(row, self.needs_answer, self.pairs)
        return row

    def _format_of(self, row: Row) -> "Format | None":
        columns = tuple(row.values)
        if columns in self._by_columns:
            return self._by_columns[columns]
        form = self._named or _recognise(row, self.needs_answer)
        if form and not form.is_chat and not self.needs_answer:
            raise UserError(f"{row.where}: rows of the format {form.name} hold no prompt that could be answered.")
        self._by_columns[columns] = form
        if form is None:
            return None
        if form.name not in self.formats:
            self.formats.append(form.name)
        if form.is_ours and self.needs_answer:
            unread = self.unread_columns
            unread += [name for name in columns if name not in form.read_keys and name not in unread]
        return form


# Formats


def from_alpaca(values: dict[str, Any]) -> Any:
    """Read ``instruction``, ``input`` and ``output``; the pairs of ``history`` become earlier turns."""
    prompt, extra = (read_string(values.get(key) or "", repr(key)) for key in ("instruction", "input"))
    history = parse_json(values.get("history") or [], "'history'")
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowFault(f"'history' must be a list of [question, answer] pairs, found {reprlib.repr(history)}")
    earlier = [message for pair in history for message in _exchange(*pair)]
    return [*earlier, *_exchange(f"{prompt}\n\n{extra}" if prompt and extra else prompt or extra, values.get("output"))]


def from_prompt_completion(values: dict[str, Any]) -> Any:
    """Read ``prompt`` and ``completion``: two strings, or two lists of messages; only the completion is trained."""
    prompt, completion = values["prompt"], values.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list | None):
        return [*({**message, "train": False} for message in prompt), *(completion or [])]
    return _exchange(read_string(prompt, "'prompt'"), completion)


def from_question_answer(values: dict[str, Any]) -> Any:
    """Read ``question`` and ``answer``."""
    return _exchange(values["question"], values.get("answer"))


def from_list(key: str) -> Callable[[dict[str, Any]], Any]:
    """Read a list of messages, or one as a JSON string, under a key."""
    return lambda values: parse_json(values[key], repr(key))


def _exchange(prompt: Any, answer: Any) -> list[dict[str, Any]]:
    asked = [{"role": "user", "content": prompt}]
    return asked if answer is None else [*asked, _answer(answer)]


def _answer(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def from_text(values: dict[str, Any]) -> Text:
    """Read ``text``, a document, every token of which is trained."""
    text = read_string(values["text"], "'text'")
    if not text.strip():
        raise RowFault("'text' is empty")
    return Text(text)


def from_tokens(values: dict[str, Any]) -> Tokens:
    """Read ``input_ids`` and ``labels``, which are aligned (not shifted), -100 where a token is not trained."""
    ids, labels = (parse_json(values[key], repr(key)) for key in ("input_ids", "labels"))
    for key, tokens, least in (("input_ids", ids, 0), ("labels", labels, -100)):
        if not isinstance(tokens, list) or not tokens or not all(type(n) is int and n >= least for n in tokens):
            raise RowFault(f"{key!r} must be a list of token ids, found {reprlib.repr(tokens)}")
    if not all(parse_json(values.get("attention_mask"), "'attention_mask'") or (1,)):
        raise RowFault("'attention_mask' has zeros: expected rows without padding")
    return Tokens(ids, labels)


def from_preference(values: dict[str, Any], roles: Mapping[str, str]) -> tuple[Any, Any]:
    """Read ``chosen`` and ``rejected``: each a text, a message or a list of messages, behind the row's prompt.

    The prompt is ``prompt`` (a text or messages), ``messages``, ``conversations``, or Alpaca's columns (LLaMA-Factory);
    without one, or beside one, both hold whole conversations, which begin alike (TRL's implicit prompt). Messages may
    be JSON strings.
    """
    answers = [_parse_messages(values[key], repr(key)) for key in ("chosen", "rejected")]
    if [] in answers:
        raise RowFault("'chosen' or 'rejected' is an empty list: expected an answer")
    of_lists = (parse_json(values[key], repr(key)) for key in ("messages", "conversations") if values.get(key))
    prompt = _parse_messages(values.get("prompt"), "'prompt'") or next(of_lists, None)
    if all(isinstance(each, list) and not is_answer(each[0], roles) for each in answers):
        shared = _count_shared(answers[0], answers[1], roles)
        prompt, answers = answers[0][:shared], [answer[shared:] for answer in answers]
    elif values.get("instruction"):
        prompt = from_alpaca({**values, "output": None})
    elif isinstance(prompt, str):
        prompt = _exchange(prompt, None)
    elif not prompt:
        theirs = next((name for name in _SYNONYMS["instruction"] if values.get(name)), None)
        hint = f": did you mean `columns: {{{theirs}: prompt}}`?" if theirs else ""
        raise RowFault(
            f"a preference row needs a prompt beside 'chosen' and 'rejected', or a whole conversation in each{hint}"
        )
    elif is_answer(prompt[-1], roles):
        raise RowFault("the prompt ends with an assistant's message: expected a user's or a tool's, to answer")
    asked = [{**message, "train": False} for message in prompt]
    chosen, rejected = (
        [*asked, *(each if isinstance(each, list) else [each if isinstance(each, dict) else _answer(each)])]
        for each in answers
    )
    if chosen == rejected:
        raise RowFault(_ALIKE)
    return chosen, rejected


_ALIKE = "'chosen' and 'rejected' are the same"
# keys of a message, in one of the ways in which it is written
_MESSAGE_KEYS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})


def _parse_messages(value: Any, where: str) -> Any:
    """Return the messages that a JSON string holds, as it does in CSV; any other text, which is said, as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        found = parse_json(value, where)
    except RowFault:
        if value.startswith(("[{'role': ", "[{'content': ", "[{'from': ")):  # as Python shows a list of messages
            raise
        return value
    messages = found if isinstance(found, list) else [found]
    are_messages = all(
        isinstance(each, dict) and any(keys <= each.keys() for keys in _MESSAGE_KEYS) for each in messages
    )
    return messages if messages and are_messages else value


def _count_shared(chosen: Sequence[Any], rejected: Sequence[Any], roles: Mapping[str, str]) -> int:
    """Count the messages with which two whole conversations begin: their prompt, which each of them must answer."""
    if chosen == rejected:
        raise RowFault(_ALIKE)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if not shared or not all(each[shared:] and is_answer(each[shared], roles) for each in (chosen, rejected)):
        raise RowFault("'chosen' and 'rejected' answer different prompts, or one has no answer")
    return shared


class Format(NamedTuple):
    """How a row becomes a content."""

    name: str  # as in ``format:``
    prompt_keys: tuple[str, ...]  # keys that every row has
    answer_keys: tuple[str, ...]  # keys that a row to train on has as well; rows to predict may lack them
    convert: Callable[[dict[str, Any]], Any]  # the messages that it returns are checked by the caller
    other_keys: tuple[str, ...] = ()  # keys that a row may have
    is_chat: bool = True

    @property
    def is_ours(self) -> bool:
        """Whether it is no function of the user's, which is named by its dotted path."""
        return "." not in self.name

    @property
    def read_keys(self) -> tuple[str, ...]:
        """All keys of a row that are read."""
        return (*self.keys(True), *self.other_keys, *(("system", "tools") if self.is_chat else ()))

    def keys(self, needs_answer: bool) -> tuple[str, ...]:
        """Return the keys that a row must have."""
        return self.prompt_keys + self.answer_keys if needs_answer else self.prompt_keys


FORMATS = {
    form.name: form
    for form in (
        Format("alpaca", ("instruction",), ("output",), from_alpaca, ("input", "history")),
        Format("messages", ("messages",), (), from_list("messages"), ("functions",)),
        Format("sharegpt", ("conversations",), (), from_list("conversations"), ("functions",)),
        Format("prompt_completion", ("prompt",), ("completion",), from_prompt_completion),
        Format("question_answer", ("question",), ("answer",), from_question_answer),
        Format("text", ("text",), (), from_text, is_chat=False),
        Format("tokens", ("input_ids", "labels"), (), from_tokens, ("attention_mask",), is_chat=False),
    )
}
PREFERENCE = Format(
    *("preference", (), ("chosen", "rejected"), partial(from_preference, roles={})),
    ("prompt", "messages", "conversations", "instruction", "input", "history", "functions"),
)
# Text is read where `format:` names it: it may be a conversation with a template applied, or be beside a misspelt one.
_BY_COLUMNS = [form for form in FORMATS.values() if form.name != "text"]

KEYS = tuple(dict.fromkeys(key for form in (*FORMATS.values(), PREFERENCE) for key in form.read_keys))


def _name_format(name: str) -> Format:
    """Return the format of a name, or that of a function by its dotted path."""
    if name in FORMATS:
        return FORMATS[name]
    if "." not in name:
        known = ["auto", *FORMATS]
        names = ", ".join(known)
        hint = nearest(name, known)
        raise UserError(f"format: expected {names} or the dotted path of a function, found {name!r}.{hint}")
    wanted = "expected a plain Python function of a module in the current folder or of an installed package"
    if name.partition(".")[0] in sys.stdlib_module_names:
        raise UserError(f"format: {wanted}, found {name!r}, which is Python's own.")
    folder = str(Path.cwd())
    sys.path.append(folder)  # an installed command does not look there, where people keep their function
    try:
        function = pkgutil.resolve_name(name)
    except Exception as error:
        raise UserError(f"format: cannot import {name!r}: {type(error).__name__}: {error}.") from error
    finally:
        sys.path.remove(folder)
    if not inspect.isfunction(function) or function.__module__.partition(".")[0] in sys.stdlib_module_names:
        raise UserError(f"format: {wanted}, found {name!r}, which is {function!r}.")
    return Format(name, (), (), function)


def _recognise(row: Row, needs_answer: bool) -> Format | None:
    """Return the format that the columns of a row have, under our names, if there is one."""
    # Rows to predict may hold answers too: then their format is told by all its keys, as in training.
    for answers in (True,) if needs_answer else (True, False):
        fitting = [form for form in _BY_COLUMNS if row.values.keys() >= set(form.keys(answers))]
        if len(fitting) > 1:
            names = " and ".join(form.name for form in fitting)
            raise UserError(f"{row.where} fits more than one format, {names}: name one in `format:`.")
        if fitting:
            return fitting[0]
    return None


def _describe_unrecognised(row: Row, needs_answer: bool) -> str:
    wanted = ", ".join(f"{' + '.join(form.keys(needs_answer))} ({form.name})" for form in _BY_COLUMNS)
    return (
        f"{row.where}: no format is recognised by the keys {', '.join(row.values) or '(none)'}; expected {wanted}."
        f"{_advise(row.values)} Map other names with `columns: {{their name: our name}}`; for another shape name a "
        "function row -> conversation: `format: package.module.function`."
    )


# names that other data sets have for our columns, the likeliest first
_SYNONYMS = {
    "instruction": ("instruction", "question", "query", "problem", "prompt", "input"),
    "input": ("input", "context"),
    "output": ("output", "response", "answer", "completion", "solution", "target", "reply"),
    "system": ("system", "system_prompt"),
}


def _advise(values: Mapping[str, Any]) -> str:
    """Say what reads a row of a shape that people meet, or which column may be misspelt."""
    if "text" in values:
        return " Raw text, every token of which is trained, is read by `format: text`."
    columns: dict[str, str] = {}
    for ours, names in _SYNONYMS.items():
        theirs = next((name for name in names if isinstance(values.get(name), str) and name not in columns), None)
        if theirs is not None:
            columns[theirs] = ours
    if {"instruction", "output"} <= set(columns.values()):
        pairs = ", ".join(f"{theirs}: {ours}" for theirs, ours in columns.items() if theirs != ours)
        return f" Did you mean `columns: {{{pairs}}}`?"
    keys = [key for key in KEYS if key not in values]
    return "".join(nearest(name, keys, 0.75).replace("?", f" by {name!r}?") for name in values)


# One row

_OTHER_TASKS = {
    **dict.fromkeys(MEDIA, "but only text is read: its answer would be trained without what it is about"),
    "rejected": "so it is a preference row, for PreferenceModule with PreferenceDataModule",
    # TRL's and LLaMA-Factory's names
    **dict.fromkeys(("label", "kto_tag"), "which says whether its answer is good: bad ones would be trained as well"),
}


def _refuse_other_task(row: Row, needs_answer: bool, pairs: bool) -> None:
    """Refuse a row of another task by a UserError, also with ``on_bad_row: skip``: all rows of its source are such."""
    for key in sorted(_OTHER_TASKS.keys() & row.values.keys()):
        value = row.values[key]
        if key in MEDIA:
            is_other = any(value.values()) if isinstance(value, dict) else bool(value)  # {"bytes": None, "path": None}
        elif key == "rejected":
            is_other = not pairs and bool(value) and "chosen" in row.values and needs_answer
        else:
            is_other = str(value).lower() in ("true", "false") and needs_answer  # a word in CSV
        if is_other:
            raise UserError(
                f"{row.where} has {key!r}, {_OTHER_TASKS[key]}. Leave out what is not to be trained, and the column by "
                f"`data.columns: {{{key}: null}}` (naming the answer, as in `chosen: completion`), or read such rows "
                "by a function, `format: package.module.function`."
            )


def _to_content(
    values: dict[str, Any], form: Format, settings: RowSettings, needs_answer: bool, pairs: bool
) -> Content | Pair:
    """Convert one row, under our names, and check what comes out."""
    missing = [key for key in form.keys(needs_answer) if values.get(key) is None]
    if missing:
        columns = ", ".join(values)
        raise RowFault(f"{' and '.join(map(repr, missing))} is missing or null (format {form.name}, columns {columns})")
    try:
        content = form.convert(dict(values))
    except RowFault:
        raise
    except Exception as error:  # a user's function may raise anything, and ours meet rows that nobody expects
        said = " ".join(str(error).split())[:300]  # an error may repeat the whole row
        raise RowFault(f"cannot be read by the format {form.name}: {type(error).__name__}: {said}") from error
    if isinstance(content, Text | Tokens) and not pairs:
        return content
    if pairs:
        if not isinstance(content, tuple | list) or len(content) != 2:
            raise RowFault(f"expected two conversations by the format {form.name}, found {reprlib.repr(content)}")
        chosen, rejected = (_to_chat(each, values, form, settings, needs_answer) for each in content)
        if not form.is_ours:
            shared = _count_shared(chosen.messages, rejected.messages, {})
            for message in (*chosen.messages[:shared], *rejected.messages[:shared]):
                if message["role"] == "assistant":
                    message["train"] = False
        return Pair(chosen, rejected)
    return _to_chat(content, values, form, settings, needs_answer)


def _to_chat(content: Any, values: dict[str, Any], form: Format, settings: RowSettings, needs_answer: bool) -> Chat:
    """Check a conversation, and put system prompt and tools beside it."""
    messages, tools, own_system = content, values.get("tools"), values.get("system") if form.is_ours else None
    if isinstance(content, Chat):
        messages, tools, own_system = content.messages, content.tools, None
    if not isinstance(messages, list) or not messages:
        raise RowFault(f"expected a list of messages by the format {form.name}, found {reprlib.repr(messages)}")
    conversation = [read_message(message, at, settings.roles) for at, message in enumerate(messages, start=1)]
    check_order(conversation, needs_answer)
    if own_system and conversation[0]["role"] == "system":
        raise RowFault("has a system message and the key 'system' as well: expected one of them")
    system = read_string(own_system, "'system'") if own_system else settings.system
    if system and conversation[0]["role"] != "system":
        conversation.insert(0, {"role": "system", "content": system})
    schemas = find_tools(tools)
    if "functions" in form.other_keys:  # OpenAI's older name
        functions = find_tools(values.get("functions"), "functions")
        if schemas and functions and schemas != functions:
            raise RowFault("the row has 'tools' and 'functions', which differ: keep one")
        schemas = schemas or functions
    return Chat(conversation, schemas)
