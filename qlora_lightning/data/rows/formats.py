"""Row formats: which columns a row has, and how they become messages, a pair of answers, a text or tokens."""

import inspect
import pkgutil
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qlora_lightning.data.rows import content as rows
from qlora_lightning.data.rows.files import DELIMITERS, Row, RowFunction, Source, kind_of_file, name_of_format
from qlora_lightning.support.errors import UserError, describe_error, explaining, nearest

_LABELS = {"true": True, "false": False}  # of answers; in CSV a label is a word
_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*['"](role|from)['"]\s*:""")  # as text
_PROMPT_KEYS = ("prompt", "messages", "conversations")  # of preferences


class Format(NamedTuple):
    """How the columns of a row are read."""

    name: str  # as in ``format:``
    prompt_keys: tuple[str, ...]  # columns of every row
    answer_keys: tuple[str, ...]  # further columns of rows to train on; rows to predict may lack them
    read: Callable[[dict[str, Any]], Any]  # returns unchecked messages, a Text or Tokens
    other_keys: tuple[str, ...] = ("system", "tools")  # optional columns

    @property
    def is_ours(self) -> bool:
        """Whether it is one of ours; a user's function has a dotted path as its name."""
        return "." not in self.name

    def keys(self, needs_answer: bool) -> tuple[str, ...]:
        """Return the columns that a row must have."""
        return self.prompt_keys + self.answer_keys if needs_answer else self.prompt_keys


class RowConverter:
    """Turns the rows of one source into contents, which depend on the row and the settings alone.

    Args:
        source: which says how its rows are read.
        needs_answer: whether they are trained; rows to predict may lack answers.
        pairs: whether they are preferences: two answers to compare, or one with a verdict.

    Raises:
        UserError: there is no such format.
    """

    def __init__(self, source: Source, needs_answer: bool = True, pairs: bool = False) -> None:
        self.source, self.needs_answer, self.pairs = source, needs_answer, pairs
        self.formats: list[str] = []  # names of the recognized ones, in order of appearance
        self.unread_columns: list[str] = []  # under our names
        self.absent_columns = set(source.columns)  # mapped columns that no row has
        self._unrecognised: Row | None = None  # the first row that no format fits
        self._named = None if source.format == "auto" else _find_named(source.format)

    def check(self) -> None:
        """Raise a UserError if no format fits any row so far."""
        first = self._unrecognised
        if first is not None and not self.formats:
            expected = ", ".join(f"{' + '.join(form.keys(self.needs_answer))} ({form.name})" for form in _RECOGNISED)
            raise UserError(
                f"{first.where}: no format is recognized by the keys {', '.join(first.values) or '(none)'}; "
                f"expected {expected}. Map other names with `columns: {{their name: our name}}`; raw text is read by "
                "`format: text`, any other shape by a function, `format: package.module.function`."
                f"{_hint_at_delimiter(first)}",
                "data.format",
            )

    def convert(self, row: Row) -> rows.RowContent:
        """Convert one row.

        Raises:
            RowFault: the row cannot be used.
            UserError: no row of its shape can be.
        """
        row = self._rename(row)
        form = self._find_format(row)
        if form is None:
            self._unrecognised = self._unrecognised or row
            raise rows.RowFault(f"no format is recognized by its columns {', '.join(row.values)}")
        if form.name not in self.formats:
            self.formats.append(form.name)
        if form.is_ours and self.needs_answer:
            known = {*form.keys(True), *form.other_keys, *(["label"] if self.pairs else []), *self.unread_columns}
            self.unread_columns += [key for key in row.values if key not in known]
        try:
            return self._read(form, row.values)
        except rows.RowFault:
            raise
        except Exception as error:  # a user's function may raise anything, and so may ours on unexpected rows
            raise rows.RowFault(f"cannot be read by the format {form.name}: {describe_error(error)}") from error

    def _rename(self, row: Row) -> Row:
        """Return a row under our names, without columns that are mapped to null."""
        columns = self.source.columns
        self.absent_columns -= row.values.keys()
        names = {key: name for key in row.values if (name := columns.get(key, key)) is not None}
        if len(set(names.values())) < len(names):
            message = f"{row.where}: `columns:` gives two of {', '.join(row.values)} the same name."
            raise UserError(message, "data.columns")
        row = row._replace(values={name: row.values[key] for key, name in names.items()})
        if self._named is None or self._named.is_ours:  # a user's function may read any column
            _refuse_other_task(row, self.needs_answer, self.pairs)
        return row

    def _find_format(self, row: Row) -> Format | None:
        """Return the format that is named or has the columns of a row, if there is one; several are an error."""
        if self._named is not None:
            return self._named
        if self.pairs and (row.values.get("rejected") is not None or row.values.get("label") is None):
            return _PREFERENCE
        # Rows to predict may have answers too: then all the keys of their format decide, as in training.
        for answers in (True,) if self.needs_answer else (True, False):
            forms = [form for form in _RECOGNISED if row.values.keys() >= set(form.keys(answers))]
            if len(forms) > 1:
                message = f"{row.where} fits more than one format, {forms[0].name} and {forms[1].name}: name one."
                raise UserError(message, "data.format")
            if forms:
                return forms[0]
        return None

    def _read(self, form: Format, values: dict[str, Any]) -> rows.RowContent:
        missing = [key for key in form.keys(self.needs_answer) if values.get(key) is None]
        if missing:
            names = " and ".join(map(repr, missing))
            raise rows.RowFault(f"{names} is missing or null (format {form.name}, columns {', '.join(values)})")
        content = form.read(dict(values))
        if not self.pairs:
            return content if isinstance(content, rows.Text | rows.Tokens) else self._to_chat(content, values, form)
        if form.is_ours and form is not _PREFERENCE:
            label = _LABELS.get(str(values.get("label")).lower())
            if label is None:
                raise rows.RowFault(f"'label' must be true or false, found {reprlib.repr(values.get('label'))}")
            content = content, label
        match content:
            case (messages, bool(label)):
                return rows.judge(self._to_chat(messages, values, form), label)
            case (chosen, rejected):
                return rows.pair_up(*(self._to_chat(messages, values, form) for messages in (chosen, rejected)))
        raise rows.RowFault(f"expected two conversations by the format {form.name}, found {reprlib.repr(content)}")

    def _to_chat(self, content: Any, values: dict[str, Any], form: Format) -> rows.Chat:
        """Check a conversation, and add system prompt and tools."""
        messages, tools, row_system = content, values.get("tools"), values.get("system") if form.is_ours else None
        if isinstance(content, rows.Chat):
            messages, tools = content.messages, content.tools
        if messages is None or isinstance(messages, str | Mapping):  # by a user's function
            found = f"{type(messages).__name__}, expected a list of messages: {{role: …, content: …}} each"
            raise rows.RowFault(f"the format {form.name} returned {found}")
        roles = self.source.roles
        conversation = [rows.read_message(message, number, roles) for number, message in enumerate(messages, start=1)]
        rows.check_order(conversation, self.needs_answer)
        if row_system in (None, ""):
            system = self.source.system
        elif conversation[0]["role"] == "system":
            raise rows.RowFault("has a system message and the key 'system' as well: expected one of them")
        else:
            system = rows.read_string(row_system, "'system'")
        if system is not None and conversation[0]["role"] != "system":
            conversation.insert(0, {"role": "system", "content": system})
        return rows.Chat(conversation, rows.find_tools(tools, conversation))


def _hint_at_delimiter(row: Row) -> str:
    """Return a hint to end a message if the names of a row's columns look as if the delimiter were another."""
    looks_split_wrongly = any(mark in name for name in row.values for mark in DELIMITERS)
    if not looks_split_wrongly or kind_of_file(row.file) not in (".csv", ".tsv"):
        return ""
    return " Or name the delimiter of the file, as in `{path: FILE, delimiter: ;}`."


def _refuse_other_task(row: Row, needs_answer: bool, pairs: bool) -> None:
    """Raise a UserError for a row of another task, also with ``on_bad_row: skip``: its whole source is affected."""
    for key, value in row.values.items():
        is_given = any(value.values()) if isinstance(value, dict) else value  # {"bytes": None, "path": …}
        if key in rows.MEDIA and is_given:
            reason = "only text is read: its answer would be trained without what it is about"
        elif pairs or not needs_answer:
            continue
        elif key == "rejected" and value and "chosen" in row.values:
            reason = "a preference row is for PreferenceModule and PreferenceDataModule"
        elif key in ("label", "kto_tag") and str(value).lower() in _LABELS:
            reason = "a verdict on the answer is for PreferenceModule (`objective: kto`) and PreferenceDataModule"
        else:
            continue
        raise UserError(
            f"{row.where} has {key!r}, but {reason}. Leave out what is not to be trained, and the column by "
            f"`columns: {{{key}: null}}` (naming the answer, as in `chosen: completion`), or read such rows by a "
            "function, `format: package.module.function`.",
            f"row.{key}",
        )


def _find_named(name: str | RowFunction) -> Format:
    """Return the format of a name, or of the user's function or its dotted path."""
    if isinstance(name, str) and name in FORMATS:
        return FORMATS[name]
    if isinstance(name, str) and "." not in name:
        names = ["auto", *FORMATS]
        expected = f"{', '.join(names)} or the dotted path of a function"
        raise UserError(f"format: expected {expected}, found {name!r}.{nearest(name, names)}", "data.format")
    if not isinstance(name, str):
        return Format(name_of_format(name), (), (), name)
    with explaining(f"format: cannot import {name!r}", "data.format"):
        function = pkgutil.resolve_name(name)
    if not inspect.isfunction(function) or function.__module__.partition(".")[0] in sys.stdlib_module_names:
        message = f"format: expected a plain Python function of yours, found {name!r}, which is {function!r}."
        raise UserError(message, "data.format")
    return Format(name, (), (), function)


def _read_alpaca(values: dict[str, Any]) -> list[Any]:
    """Read ``instruction``, ``input`` and ``output``; the pairs of ``history`` become earlier turns."""
    prompt, extra = (
        "" if values.get(key) is None else rows.read_string(values[key], repr(key)) for key in ("instruction", "input")
    )
    history = values.get("history")
    history = [] if history in rows.EMPTY else rows.parse_json(history, "'history'")
    if not isinstance(history, list) or not all(map(_is_exchange, history)):
        raise rows.RowFault(f"'history' must be a list of [question, answer] pairs, found {reprlib.repr(history)}")
    turns = [message for question, answer in history for message in _exchange(question, answer)]
    return [*turns, *_exchange(f"{prompt}\n\n{extra}" if prompt and extra else prompt or extra, values.get("output"))]


def _is_exchange(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _read_prompt_completion(values: dict[str, Any]) -> list[Any]:
    """Read two strings, or two lists of messages, of which only the completion is trained."""
    prompt, completion = values["prompt"], values.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list | None):
        return [*({**message, "train": False} for message in prompt), *(completion or [])]
    return _exchange(rows.read_string(prompt, "'prompt'"), completion)


def _refuse_messages_as_text(values: Mapping[str, Any]) -> None:
    """Reject a list of messages in a string, as in CSV: it would be trained as that text."""
    for name, value in values.items():
        if isinstance(value, str) and _MESSAGES.match(value):
            raise rows.RowFault(f"{name} is a list of messages as text, and would be trained as it is: use JSON lines")


def _exchange(prompt: Any, answer: Any) -> list[dict[str, Any]]:
    """Return a question and its answer, if there is one, as messages."""
    _refuse_messages_as_text({"the question": prompt, "the answer": answer})
    question = [{"role": "user", "content": prompt}]
    return question if answer is None else [*question, {"role": "assistant", "content": answer}]


def _read_text(values: dict[str, Any]) -> rows.Text:
    text = rows.read_string(values["text"], "'text'")
    if not text.strip():
        raise rows.RowFault("'text' is empty")
    return rows.Text(text)


def _read_tokens(values: dict[str, Any]) -> rows.Tokens:
    """Read ids and labels, which are aligned (not shifted), -100 where a token is not trained."""
    ids, labels = (rows.parse_json(values[key], repr(key)) for key in ("input_ids", "labels"))
    for key, tokens in (("input_ids", ids), ("labels", labels)):
        if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
            raise rows.RowFault(f"{key!r} must be a list of token ids, found {reprlib.repr(tokens)}")
    return rows.Tokens(ids, labels)


def _read_pair(values: dict[str, Any]) -> list[Any]:
    """Read ``chosen`` and ``rejected``, each a text, a message or a list of messages, and put the prompt before each.

    The prompt is ``prompt`` (a text or messages), ``messages``, ``conversations``, or Alpaca's columns (LLaMA-Factory);
    if both are whole conversations, which begin alike (TRL's implicit prompt), it is not read.
    """
    answers = [values[key] for key in ("chosen", "rejected")]
    _refuse_messages_as_text({repr(key): values.get(key) for key in ("chosen", "rejected", *_PROMPT_KEYS)})
    is_whole = all(isinstance(answer, list) and not rows.is_answer(answer[0]) for answer in answers)
    prompt = [] if is_whole else _read_prompt(values)
    return [[*prompt, *_as_messages(answer)] for answer in answers]


def _read_prompt(values: dict[str, Any]) -> list[Any]:
    keys = [key for key in ("instruction", *_PROMPT_KEYS) if values.get(key) not in rows.EMPTY]
    if not keys:
        raise rows.RowFault(
            "a preference row needs a prompt beside 'chosen' and 'rejected', or a whole conversation in each; "
            "name its column by `columns: {theirs: prompt}`"
        )
    if len(keys) > 1:
        other = f"leave one out, as by `columns: {{{keys[1]}: null}}`"
        raise rows.RowFault(f"has two prompts beside 'chosen' and 'rejected', {keys[0]!r} and {keys[1]!r}: {other}")
    if keys == ["instruction"]:
        return _read_alpaca({**values, "output": None})
    prompt = values[keys[0]]
    return _exchange(prompt, None) if isinstance(prompt, str) else prompt


def _as_messages(answer: Any) -> list[Any]:
    if isinstance(answer, list):
        return answer
    return [answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}]


FORMATS = {
    form.name: form
    for form in (
        Format("alpaca", ("instruction",), ("output",), _read_alpaca, ("input", "history", "system", "tools")),
        Format("messages", ("messages",), (), lambda row: rows.parse_json(row["messages"], "'messages'")),
        Format(
            "sharegpt", ("conversations",), (), lambda row: rows.parse_json(row["conversations"], "'conversations'")
        ),
        Format("prompt_completion", ("prompt",), ("completion",), _read_prompt_completion),
        Format(
            "question_answer", ("question",), ("answer",), lambda row: _exchange(row["question"], row.get("answer"))
        ),
        Format("text", ("text",), (), _read_text, other_keys=()),
        Format("tokens", ("input_ids", "labels"), (), _read_tokens, other_keys=()),
    )
}
# Text is read only if `format:` names it: it may be a conversation that a template has rendered.
_RECOGNISED = [form for form in FORMATS.values() if form.name != "text"]
_PREFERENCE_KEYS = (*_PROMPT_KEYS, "instruction", "input", "history", "system", "tools")
_PREFERENCE = Format("preference", (), ("chosen", "rejected"), _read_pair, _PREFERENCE_KEYS)
