"""A row as a checked conversation."""

from typing import Any

from qlora_lightning.data.bad_rows import RowFault
from qlora_lightning.data.formats import Conversation, Format, Message

ROLES = ("system", "user", "assistant")


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
    try:
        messages = form.convert(dict(values))
    except RowFault:
        raise
    except Exception as error:  # a user's function may raise anything
        raise RowFault(f"format function {form.name} raised {type(error).__name__}: {error}") from error
    conversation = _check_messages(messages)
    _check_order(conversation, needs_answer)
    if system and conversation[0]["role"] != "system":
        conversation.insert(0, {"role": "system", "content": system})
    return conversation


def _check_messages(messages: Any) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise RowFault(f"expected a list of messages, found {_kind(messages)}")
    return [_check_message(message, number) for number, message in enumerate(messages, start=1)]


def _check_message(message: Any, number: int) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        found = ", ".join(map(str, message)) if isinstance(message, dict) else _kind(message)
        raise RowFault(f"message {number} must have 'role' and 'content', found {found}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise RowFault(f"message {number} has the role {role!r}, expected {', '.join(ROLES)}")
    if message.get("tool_calls"):
        raise RowFault(f"message {number} calls tools, which are not read")
    if not isinstance(content, str):
        raise RowFault(f"the {role} content of message {number} must be a string, found {_kind(content)}")
    if role == "assistant" and not content.strip():
        raise RowFault(f"the answer (message {number}) is empty")
    if "\x00" in content:
        raise RowFault(f"message {number} contains a NUL character")
    if not content.isascii() and any("\ud800" <= char <= "\udfff" for char in content):
        raise RowFault(f"message {number} contains half a character (a lone surrogate, as a cut \\ud83d escape leaves)")
    return {"role": role, "content": content}


def _check_order(conversation: Conversation, needs_answer: bool) -> None:
    roles = [message["role"] for message in conversation]
    if "system" in roles[1:]:
        raise RowFault(f"a system message must come first, found one as message {roles.index('system', 1) + 1}")
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns:
        raise RowFault("nothing but a system message")
    if turns[0] == "assistant":
        raise RowFault("the conversation begins with an assistant turn: expected a user turn before it")
    if needs_answer and "assistant" not in turns:
        raise RowFault("no assistant turn, so there is nothing to train on")


def _kind(value: Any) -> str:
    if value == [] and isinstance(value, list):
        return "an empty list"
    return "null" if value is None else type(value).__name__
