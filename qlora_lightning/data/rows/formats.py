"""Row formats: which columns a row has, and how they become messages, a text or tokens."""

import inspect
import pkgutil
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from qlora_lightning.data.rows.bad_rows import RowFault, parse_json, read_string
from qlora_lightning.data.rows.conversation import Text, Tokens
from qlora_lightning.support.errors import UserError, nearest


class Format(NamedTuple):
    """How the columns of a row are read."""

    name: str  # as in ``format:``
    prompt_keys: tuple[str, ...]  # columns of every row
    answer_keys: tuple[str, ...]  # further columns of rows to train on; rows to predict may lack them
    read: Callable[[dict[str, Any]], Any]  # returns unchecked messages, a Text or Tokens
    other_keys: tuple[str, ...] = ()  # optional columns
    is_chat: bool = True

    @property
    def is_ours(self) -> bool:
        """Whether it is one of ours; a user's function has a dotted path as its name."""
        return "." not in self.name

    @property
    def read_keys(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (*self.keys(True), *self.other_keys, *(("system", "tools") if self.is_chat else ()))

    def keys(self, needs_answer: bool) -> tuple[str, ...]:
        """Return the columns that a row must have."""
        return self.prompt_keys + self.answer_keys if needs_answer else self.prompt_keys


def read_alpaca(values: dict[str, Any]) -> list[Any]:
    """Read ``instruction``, ``input`` and ``output``; the pairs of ``history`` become earlier turns."""
    prompt, extra = (read_string(values.get(key) or "", repr(key)) for key in ("instruction", "input"))
    history = parse_json(values.get("history") or [], "'history'")
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowFault(f"'history' must be a list of [question, answer] pairs, found {reprlib.repr(history)}")
    turns = [message for pair in history for message in exchange(*pair)]
    return [*turns, *exchange(f"{prompt}\n\n{extra}" if prompt and extra else prompt or extra, values.get("output"))]


def _read_prompt_completion(values: dict[str, Any]) -> list[Any]:
    """Read two strings, or two lists of messages, of which only the completion is trained."""
    refuse_messages_as_text(values, ("prompt", "completion"))
    prompt, completion = values["prompt"], values.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list | None):
        return [*({**message, "train": False} for message in prompt), *(completion or [])]
    return exchange(read_string(prompt, "'prompt'"), completion)


def refuse_messages_as_text(values: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Reject a list of messages in a string, as in CSV: it would be trained as that text."""
    for key in keys:
        if isinstance(values.get(key), str) and values[key].lstrip().startswith(("[{", "{'", '{"role"')):
            raise RowFault(f"{key!r} is a list of messages as text, which would be trained as it is: use JSON lines")


def exchange(prompt: Any, answer: Any) -> list[dict[str, Any]]:
    """Return a question and its answer, if there is one, as messages."""
    question = [{"role": "user", "content": prompt}]
    return question if answer is None else [*question, {"role": "assistant", "content": answer}]


def _read_text(values: dict[str, Any]) -> Text:
    text = read_string(values["text"], "'text'")
    if not text.strip():
        raise RowFault("'text' is empty")
    return Text(text)


def _read_tokens(values: dict[str, Any]) -> Tokens:
    """Read ids and labels, which are aligned (not shifted), -100 where a token is not trained."""
    ids, labels = (parse_json(values[key], repr(key)) for key in ("input_ids", "labels"))
    for key, tokens in (("input_ids", ids), ("labels", labels)):
        if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
            raise RowFault(f"{key!r} must be a list of token ids, found {reprlib.repr(tokens)}")
    return Tokens(ids, labels)


FORMATS = {
    form.name: form
    for form in (
        Format("alpaca", ("instruction",), ("output",), read_alpaca, ("input", "history")),
        Format("messages", ("messages",), (), lambda row: parse_json(row["messages"], "'messages'")),
        Format("sharegpt", ("conversations",), (), lambda row: parse_json(row["conversations"], "'conversations'")),
        Format("prompt_completion", ("prompt",), ("completion",), _read_prompt_completion),
        Format("question_answer", ("question",), ("answer",), lambda row: exchange(row["question"], row.get("answer"))),
        Format("text", ("text",), (), _read_text, is_chat=False),
        Format("tokens", ("input_ids", "labels"), (), _read_tokens, is_chat=False),
    )
}
# Text is read only if `format:` names it: it may be a conversation that a template has rendered.
RECOGNISED = [form for form in FORMATS.values() if form.name != "text"]


def find_format(name: str) -> Format:
    """Return the format of a name, or of the user's function by its dotted path."""
    if name in FORMATS:
        return FORMATS[name]
    if "." not in name:
        names = ["auto", *FORMATS]
        expected = f"{', '.join(names)} or the dotted path of a function"
        raise UserError(f"format: expected {expected}, found {name!r}.{nearest(name, names)}")
    try:
        function = pkgutil.resolve_name(name)
    except Exception as error:
        raise UserError(f"format: cannot import {name!r}: {type(error).__name__}: {error}.") from error
    if not inspect.isfunction(function) or function.__module__.partition(".")[0] in sys.stdlib_module_names:
        raise UserError(f"format: expected a plain Python function of yours, found {name!r}, which is {function!r}.")
    return Format(name, (), (), function)


def recognise(columns: Mapping[str, Any], needs_answer: bool, where: str) -> Format | None:
    """Return the format that has these columns, if there is one.

    Raises:
        UserError: several formats have them; ``where`` is the file and line of the row.
    """
    # Rows to predict may have answers too: then all the keys of their format decide, as in training.
    for answers in (True,) if needs_answer else (True, False):
        forms = [form for form in RECOGNISED if columns.keys() >= set(form.keys(answers))]
        if len(forms) > 1:
            names = " and ".join(form.name for form in forms)
            raise UserError(f"{where} fits more than one format, {names}: name one in `format:`.")
        if forms:
            return forms[0]
    return None
