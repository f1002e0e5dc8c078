"""A row as a checked conversation."""

from typing import Any

from qlora_lightning.data.reading.bad_rows import RowFault
from qlora_lightning.data.rows.formats import FORMATS, Conversation, Format
from qlora_lightning.data.rows.kinds import kind_of
from qlora_lightning.data.rows.messages import check_message

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
    _check_order(conversation, needs_answer)
    if system and conversation[0]["role"] != "system":
        conversation.insert(0, {"role": "system", "content": system})
    return conversation


def _check_order(conversation: Conversation, needs_answer: bool) -> None:
    roles = [message["role"] for message in conversation]
    if "system" in roles[1:]:
        raise RowFault(f"a system message must come first, found one as message {roles.index('system', 1) + 1}")
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns:
        raise RowFault("nothing but a system message")
    if turns[0] == "assistant":
        raise RowFault("the conversation begins with an assistant turn: expected a user turn before it")
    if "tool" in turns:
        _check_tool_turns(conversation)
    if needs_answer and "assistant" not in turns:
        raise RowFault("no assistant turn, so there is nothing to train on")


def _check_tool_turns(conversation: Conversation) -> None:
    answerable = False  # whether a tool may speak: after an assistant, which may call it in plain text, or a tool
    for number, message in enumerate(conversation, start=1):
        if message["role"] == "tool" and not answerable:
            raise RowFault(f"message {number} is a tool's, but no assistant message that calls it stands before it")
        answerable = message["role"] in ("tool", "assistant")
