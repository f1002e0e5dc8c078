"""What a row becomes: a checked conversation, a text or tokens; and the checks of messages."""

import reprlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple, NotRequired, TypedDict

from qlora_lightning.data.rows.bad_rows import RowFault, check_characters, kind_of, parse_json, read_string
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

_SPEAKERS = {
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response"), "tool"),
}
# keys whose meaning would be lost without a word: marks of other tools, and slips of the pen
_UNREAD = {*MEDIA, "loss", "mask", "trian", "trained", "training", "weigth", "weights"}


def read_message(message: Any, number: int, roles: Mapping[str, str]) -> Message:
    """Check one message and return it with the keys that matter, or raise a RowFault.

    Args:
        message: a dict with ``role`` and ``content``, or ShareGPT's ``from`` and ``value``; optionally ``train: false``
            (or OpenAI's ``weight``); of an assistant ``tool_calls`` and ``reasoning_content``, of a tool ``name`` and
            ``tool_call_id``. A key with null counts as absent.
        number: its place in the conversation, from 1.
        roles: names of roles beyond those that are known, ``{their name: our name}``.
    """
    where = f"message {number}"
    if not isinstance(message, dict):
        raise RowFault(f"{where} must have 'role' and 'content', found {kind_of(message)}")
    speaker = str(message.get("role", message.get("from")))
    role = roles.get(speaker, _SPEAKERS.get(speaker, speaker))
    if role not in ROLES:
        known = ", ".join((*ROLES, *_SPEAKERS))
        raise RowFault(f"{where} has the role {speaker!r}, expected {known}; name others by `roles: {{theirs: ours}}`")
    content = message.get("content", message.get("value"))
    calls = message.get("tool_calls") or message.get("function_call")
    if speaker == "function_call":
        calls, content = parse_json(content, f"{where} (function_call)"), None
    reasoning = message.get("reasoning_content") or message.get("reasoning") or message.get("thinking")
    if role != "assistant" and (calls or reasoning):
        raise RowFault(f"{where} ({role}) has calls or reasoning, which only an assistant has")

    text, untrained = _read_content("" if content is None and calls else content, where, role)
    read: Message = {"role": role, "content": text}
    if untrained:
        read["untrained"] = untrained
    if calls:
        read["tool_calls"] = read_calls([calls] if isinstance(calls, dict) else calls, where)
    elif role == "assistant" and not text.strip():
        raise RowFault(f"the answer ({where}) is empty")
    if reasoning:
        read["reasoning_content"] = read_string(reasoning, f"the reasoning of {where}")
    for key in ("name", "tool_call_id"):
        if role == "tool" and message.get(key) is not None:
            read[key] = read_string(message[key], f"{key!r} of {where}")
    is_trained = _read_marks(message, role, where)
    if untrained and sum(end - begin for begin, end in untrained) == len(text):
        is_trained = False
    if role == "assistant" and not is_trained:
        read["train"] = False
    return read


def _read_content(content: Any, where: str, role: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a message, or of its parts joined, and the stretches that are not trained."""
    if not isinstance(content, list) or not content:
        return read_string(content, f"the {role} content of {where}"), []
    text, untrained = "", []
    for number, part in enumerate(content, start=1):
        place = f"part {number} of {where}"
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RowFault(f"{place} is {reprlib.repr(part)}, expected {{type: text, text: …}}: only text is read")
        begin = len(text)
        text += read_string(part.get("text", part.get("value")), f"the text of {place}")
        train = part.get("train")
        if not isinstance(train, bool | None) or (train and role != "assistant"):
            raise RowFault(f"{place} has train: {train!r}, expected true or false, of an answer only")
        if train is False and role == "assistant" and len(text) > begin:
            untrained.append((begin, len(text)))
    check_characters(text, where)  # half a character in each of two parts
    return text, untrained


def _read_marks(message: dict[str, Any], role: str, where: str) -> bool:
    """Return whether a message is trained: what its ``train``, or OpenAI's ``weight``, says."""
    if len(message) == 2:  # role and content alone, as most messages have
        return True
    for key in sorted(_UNREAD & message.keys()):
        if message[key] not in (None, "", []):
            raise RowFault(f"{where} has {key!r}, which is not read: only text is, and `train: false`")
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
    """Refuse a conversation whose turns come in an order that no chat has, by a RowFault."""
    roles = [message["role"] for message in conversation]
    turns = roles[1:] if roles[0] == "system" else roles
    if "system" in turns:
        raise RowFault("a system message must come first, found one behind other messages")
    if turns[:1] != ["user"]:
        raise RowFault(f"the conversation must begin with a user turn, found {turns[0] if turns else 'none'}")
    # after an assistant, which may call it in plain text, or another tool
    if ("user", "tool") in pairwise(turns):
        raise RowFault("a tool's message follows a user's: no assistant message that calls the tool is before it")
    if needs_answer and "assistant" not in turns:
        raise RowFault("no assistant turn, so there is nothing to train on")
