"""What a row becomes: a checked conversation, a text or tokens; and the checks of messages."""

import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple, NotRequired, TypedDict

from qlora_lightning.data.rows.bad_rows import RowFault, check_characters, kind_of, read_string
from qlora_lightning.data.rows.tools import parse_json, read_calls


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

_SPEAKERS = {
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response"), "tool"),
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_UNREAD = {  # keys whose meaning would be lost without a word
    **dict.fromkeys(MEDIA, "only text is"),
    # Marks of other tools, and slips of the pen, that would train what shall not be trained.
    **dict.fromkeys(("loss", "mask", "trian", "trained", "training", "weigth", "weights"), "write `train: false`"),
}


def check_message(message: Any, number: int, roles: Mapping[str, str] | None = None) -> Message:
    """Check one message and return it with the keys that matter.

    Args:
        message: a dict with ``role`` and ``content``, or ShareGPT's ``from`` and ``value``; optionally ``train: false``
            (or OpenAI's ``weight``); of an assistant ``tool_calls`` and ``reasoning_content``, of a tool ``name`` and
            ``tool_call_id``. A key with null counts as absent.
        number: its place in the conversation, from 1.
        roles: names of roles beyond those that are known, ``{their name: our name}``.

    Raises:
        RowFault: with the reason why it cannot be used.
    """
    where = f"message {number}"
    if not isinstance(message, dict):
        raise RowFault(f"{where} must have 'role' and 'content', found {kind_of(message)}")
    speaker = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    calls = message.get("tool_calls") or message.get("function_call")
    has_content = "content" in message or "value" in message
    if not ("role" in message or "from" in message) or not (has_content or calls):
        raise RowFault(f"{where} must have 'role' and 'content', found {', '.join(map(str, message))}")
    role = (roles or {}).get(speaker, _SPEAKERS.get(speaker, speaker)) if isinstance(speaker, str) else speaker
    if role not in ROLES:
        known = ", ".join((*ROLES, *_SPEAKERS))
        raise RowFault(
            f"{where} has the role {reprlib.repr(role)}, expected {known}; name others by `roles: {{theirs: ours}}`"
        )
    if speaker == "function_call":
        calls, content = parse_json(content, f"{where} (function_call)"), None
    text, untrained = _read_content(content, where, role, optional=bool(calls))
    checked: Message = {"role": role, "content": text}
    if untrained:
        checked["untrained"] = untrained
    if len(message) > 2 or calls:
        _add_options(checked, message, calls, where)
    if role == "assistant" and not calls and not text.strip():
        raise RowFault(f"the answer ({where}) is empty")
    if untrained and sum(end - start for start, end in untrained) == len(text):
        checked["train"] = False
    return checked


def _read_content(content: Any, where: str, role: str, optional: bool) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a message, or of its parts joined, and the stretches that are not trained."""
    if content is None and optional:
        return "", []
    untrained: list[tuple[int, int]] = []
    if isinstance(content, list) and content:
        text = ""
        for number, part in enumerate(content, start=1):
            begin, place = len(text), f"part {number} of {where}"
            text += _read_part(part, place)
            train = part.get("train")
            if not isinstance(train, bool | None) or (train and role != "assistant"):
                raise RowFault(f"{place} has train: {reprlib.repr(train)}, expected true or false, of an answer only")
            if train is False and role == "assistant" and len(text) > begin:
                untrained.append((begin, len(text)))
        content = text
    if not isinstance(content, str):
        raise RowFault(f"the {role} content of {where} must be a string, found {kind_of(content)}")
    check_characters(content, where)
    return content, untrained


def _read_part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise RowFault(
            f"{where} is {kind_of(part) if kind is None else reprlib.repr(kind)}, expected 'text': only text is read"
        )
    return read_string(part.get("text", part.get("value")), f"the text of {where}")


def _add_options(checked: Message, message: dict[str, Any], calls: Any, where: str) -> None:
    role = checked["role"]
    for key, advice in _UNREAD.items():
        if message.get(key) not in (None, "", []):
            raise RowFault(f"{where} has {key!r}, which is not read: {advice}")
    if calls:
        if role != "assistant":
            raise RowFault(f"{where} ({role}) has 'tool_calls', which only an assistant makes")
        checked["tool_calls"] = read_calls([calls] if isinstance(calls, dict) else calls, where)
    reasoning = {key: message[key] for key in _REASONING if message.get(key)}
    if len(set(map(str, reasoning.values()))) > 1:
        raise RowFault(f"{where} has {' and '.join(reasoning)}, which differ: keep one")
    for key, value in reasoning.items():
        if role != "assistant":
            raise RowFault(f"{where} ({role}) has {key!r}, which only an assistant has")
        checked["reasoning_content"] = read_string(value, f"{key!r} of {where}")
    for key in ("name", "tool_call_id") if role == "tool" else ():
        if message.get(key) is not None:
            checked[key] = read_string(message[key], f"{key!r} of {where}")  # type: ignore[literal-required]
    if not _is_trained(message, role, where) and role == "assistant":
        checked["train"] = False


def _is_trained(message: dict[str, Any], role: str, where: str) -> bool:
    """Return what ``train``, or OpenAI's ``weight``, says of a message."""
    marks = {key: message[key] for key in ("train", "weight") if message.get(key) is not None}
    for key, value in marks.items():
        if value not in (0, 1) or (key == "train") != isinstance(value, bool):
            expected = "true or false" if key == "train" else "0 or 1"
            raise RowFault(f"{key!r} of {where} must be {expected}, found {reprlib.repr(value)}")
        if value and role != "assistant":
            raise RowFault(f"{where} ({role}) has {key}: {value}, but only answers are trained")
    if len(set(map(bool, marks.values()))) > 1:
        raise RowFault(f"'train' and 'weight' of {where} contradict each other")
    return all(marks.values())


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
    before = "user"
    for number, role in enumerate(roles, start=1):
        # after an assistant, which may call it in plain text, or another tool
        if role == "tool" and before not in ("tool", "assistant"):
            raise RowFault(f"message {number} is a tool's, but no assistant message that calls it stands before it")
        before = role
    if needs_answer and "assistant" not in turns:
        raise RowFault("no assistant turn, so there is nothing to train on")
