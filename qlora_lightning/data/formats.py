"""Row formats: from the keys of a row to a conversation."""

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from qlora_lightning.data.bad_rows import RowFault
from qlora_lightning.data.reader import Row
from qlora_lightning.errors import UserError


class Message(TypedDict):
    """One turn: who speaks (system, user or assistant) and the text."""

    role: str
    content: str


Conversation = list[Message]


class Format(NamedTuple):
    """How a row becomes a conversation.

    Attributes:
        name: as in ``format:``.
        prompt_keys: keys that every row has.
        answer_keys: keys that a row to train on has as well; rows to predict may lack them.
        convert: the function; what it returns is checked by the caller.
    """

    name: str
    prompt_keys: tuple[str, ...]
    answer_keys: tuple[str, ...]
    convert: Callable[[dict[str, Any]], Any]

    def keys(self, needs_answer: bool) -> tuple[str, ...]:
        """Return the keys that a row must have."""
        return self.prompt_keys + self.answer_keys if needs_answer else self.prompt_keys


def _from_alpaca(values: dict[str, Any]) -> Any:
    if values.get("history"):
        raise RowFault("'history' is not read in the alpaca format: write the row as 'messages'")
    system, extra, answer = values.get("system"), values.get("input"), values.get("output")
    prompt = values["instruction"]
    if extra:
        prompt = f"{_text(prompt, 'instruction')}\n\n{_text(extra, 'input')}"
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    return messages + _answer(answer)


def _from_messages(values: dict[str, Any]) -> Any:
    return values["messages"]


def _from_prompt_completion(values: dict[str, Any]) -> Any:
    prompt, completion = values["prompt"], values.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list | None):
        return prompt + (completion or [])
    if isinstance(prompt, str) and isinstance(completion, str | None):
        return [{"role": "user", "content": prompt}, *_answer(completion)]
    raise RowFault("'prompt' and 'completion' must be two strings or two lists of messages")


def _answer(answer: Any) -> list[dict[str, Any]]:
    return [] if answer is None else [{"role": "assistant", "content": answer}]


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise RowFault(f"{key!r} must be a string, found {type(value).__name__}")
    return value


FORMATS = {
    "alpaca": Format("alpaca", ("instruction",), ("output",), _from_alpaca),
    "messages": Format("messages", ("messages",), (), _from_messages),
    "prompt_completion": Format("prompt_completion", ("prompt",), ("completion",), _from_prompt_completion),
}


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
    # Rows to predict may hold answers too: then their format is told by all its keys, as in training.
    for answers in (True,) if needs_answer else (True, False):
        for row in rows:
            fitting = [form for form in FORMATS.values() if row.values.keys() >= set(form.keys(answers))]
            if len(fitting) > 1:
                names = " and ".join(form.name for form in fitting)
                raise UserError(f"{row.where} fits more than one format, {names}: name one in `format:`.")
            if fitting:
                return fitting[0]
    raise UserError(_describe_unrecognised(rows[0], needs_answer))


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
        f"{', '.join(wanted)}.{''.join(hints)} For other keys name a function "
        "row -> conversation: `format: package.module.function`."
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
    return Format(name, (), (), _import_function(name))


def _import_function(path: str) -> Callable[[dict[str, Any]], Any]:
    """Import a function by its dotted path; a module in the current folder is found as well."""
    module_name, _, name = path.rpartition(".")
    folder = str(Path.cwd())
    sys.path.append(
        folder
    )  # an installed command does not look in the current folder, where people keep their function
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
