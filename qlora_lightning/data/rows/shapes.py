"""Rows of the common shapes as messages: alpaca, messages, prompt and completion, question and answer.

What these functions return is checked afterwards, so they look only at what they take apart.
"""

from typing import Any

from qlora_lightning.data.reading.bad_rows import RowFault
from qlora_lightning.data.rows.kinds import kind_of
from qlora_lightning.data.rows.text import read_string


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
