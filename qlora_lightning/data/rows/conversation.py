"""A row as a checked conversation: messages, reduced to what a chat template reads."""

import reprlib
from collections.abc import Iterable
from typing import Any, NamedTuple, NotRequired, TypedDict

from qlora_lightning.data.rows.bad_rows import RowFault, check_characters, kind_of, read_string
from qlora_lightning.data.rows.tools import read_calls


class Message(TypedDict):
    """One turn: who speaks (system, user, assistant or tool), the text, and what else a chat template may need.

    ``train`` is only ever False, on an answer that is not to be trained; ``untrained`` holds the stretches of an
    answer's content, in characters, that are not. Templates see neither.
    """

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]
    train: NotRequired[bool]
    untrained: NotRequired[list[tuple[int, int]]]


Conversation = list[Message]
Tools = list[dict[str, Any]] | None


class Chat(NamedTuple):
    """A conversation, and the schemas of the tools that may be called in it.

    ``weight``, here and below, is what the row counts in the loss.
    """

    messages: Conversation
    tools: Tools = None
    weight: float = 1.0


class Text(NamedTuple):
    """Text that is trained without a chat template.

    Attributes:
        segments: pieces of text, each with whether it is trained.
        whole: whether it is a document, to begin and end with the tokenizer's own tokens and to be cut into pieces
            of ``max_length``; else it is taken as it is written.
        weight: of the row.
    """

    segments: tuple[tuple[str, bool], ...]
    whole: bool
    weight: float = 1.0


class Tokens(NamedTuple):
    """Token ids as they are trained, and their labels: -100 where they are not."""

    ids: list[int]
    labels: list[int]
    weight: float = 1.0


Content = Chat | Text | Tokens

ROLES = ("system", "user", "assistant", "tool")
MEDIA = ("images", "videos", "audios", "image", "video", "audio")  # keys of rows and of messages

# Keys that say something to the model, or to be said by it, which would be lost without a word.
_UNREAD = {
    "function_call": "write it as 'tool_calls'",
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"),
        "write it into the content, as the chat template does (<think>…</think>)",
    ),
    **dict.fromkeys(MEDIA, "only text is"),
    # Marks of other tools, and slips of the pen, that would train what shall not be trained.
    **dict.fromkeys(("loss", "mask", "trian", "trained", "training", "weigth", "weights"), "write `train: false`"),
}


def check_message(message: Any, number: int) -> Message:
    """Check one message and return it with the keys that matter.

    Args:
        message: a dict with ``role`` and ``content``; optionally ``train: false`` (or OpenAI's ``weight``); of an
            assistant ``tool_calls``, of a tool ``name`` and ``tool_call_id``. A key with null counts as absent.
        number: its place in the conversation, from 1.

    Raises:
        RowFault: with the reason why it cannot be used.
    """
    if not isinstance(message, dict) or "role" not in message or not ("content" in message or "tool_calls" in message):
        found = ", ".join(map(str, message)) if isinstance(message, dict) else kind_of(message)
        is_turn = isinstance(message, dict) and {"from", "value"} <= message.keys()
        advice = ": these are turns of ShareGPT, which stand under 'conversations'" if is_turn else ""
        raise RowFault(f"message {number} must have 'role' and 'content', found {found}{advice}")
    role, calls = message["role"], message.get("tool_calls")
    if role not in ROLES:
        raise RowFault(f"message {number} has the role {reprlib.repr(role)}, expected {', '.join(ROLES)}")
    content = _read_content(message.get("content"), role, number, optional=bool(calls))
    checked: Message = {"role": role, "content": content}
    if len(message) > 2 or calls:
        _add_options(checked, message, number)
    if role == "assistant" and not calls and not content.strip():
        raise RowFault(f"the answer (message {number}) is empty")
    return checked


def without_marks(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Return the messages as a chat template takes them: without ``train`` and ``untrained``."""
    return [{key: value for key, value in message.items() if key not in _MARKS} for message in messages]


_MARKS = ("train", "untrained")


def _read_content(content: Any, role: str, number: int, optional: bool) -> str:
    """Return the text of a message; of OpenAI's list of parts, the texts joined."""
    if isinstance(content, list) and content:
        content = "".join(_read_part(part, f"part {at} of message {number}") for at, part in enumerate(content, 1))
    if content is None and optional:
        return ""
    if not isinstance(content, str):
        raise RowFault(f"the {role} content of message {number} must be a string, found {kind_of(content)}")
    check_characters(content, f"message {number}")
    return content


def _read_part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise RowFault(
            f"{where} is {kind_of(part) if kind is None else reprlib.repr(kind)}, expected 'text': only text is read"
        )
    return read_string(part.get("text"), f"the text of {where}")


def _add_options(checked: Message, message: dict[str, Any], number: int) -> None:
    where, role = f"message {number}", message["role"]
    for key, advice in _UNREAD.items():
        if message.get(key) not in (None, "", []):
            raise RowFault(f"{where} has {key!r}, which is not read: {advice}")
    if message.get("tool_calls"):
        if role != "assistant":
            raise RowFault(f"{where} ({role}) has 'tool_calls', which only an assistant makes")
        checked["tool_calls"] = read_calls(message["tool_calls"], where)
    if role == "tool":
        if message.get("name") is not None:
            checked["name"] = read_string(message["name"], f"'name' of {where}")
        if message.get("tool_call_id") is not None:
            checked["tool_call_id"] = read_string(message["tool_call_id"], f"'tool_call_id' of {where}")
    if _is_trained(message, where) is False and role == "assistant":
        checked["train"] = False


def _is_trained(message: dict[str, Any], where: str) -> bool | None:
    """Return what ``train`` and ``weight`` say, or None if they say nothing."""
    train, weight = message.get("train"), message.get("weight")
    if not isinstance(train, bool | None):
        raise RowFault(f"'train' of {where} must be true or false, found {reprlib.repr(train)}")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowFault(f"'weight' of {where} must be 0 or 1, found {reprlib.repr(weight)}")
    if weight is not None and train is not None and bool(weight) != train:
        raise RowFault(f"'train' and 'weight' of {where} contradict each other")
    wanted = train if weight is None else bool(weight)
    if wanted and message["role"] != "assistant":
        key = "'train: true'" if weight is None else "'weight: 1'"
        raise RowFault(f"{where} ({message['role']}) has {key}, but only answers are trained")
    return wanted


def check_order(conversation: Conversation, needs_answer: bool) -> None:
    """Refuse a conversation whose turns come in an order that no chat has.

    Raises:
        RowFault: with the reason.
    """
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
