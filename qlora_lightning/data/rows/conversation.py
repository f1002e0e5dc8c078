"""What a row becomes: a checked conversation, a text or tokens; and the checks of messages and tools."""

import reprlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple, NotRequired, TypedDict

from qlora_lightning.data.rows.bad_rows import RowFault, check_characters, kind_of, parse_json, read_string


class Message(TypedDict):
    """One turn: who speaks (system, user, assistant or tool), the text, and what else a chat template may need.

    ``train`` is only ever False, on an answer that is not to be trained. Templates do not see it.
    """

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]
    train: NotRequired[bool]


Conversation = list[Message]
Tools = list[dict[str, Any]] | None


class Chat(NamedTuple):
    """A conversation, and the schemas of the tools that may be called in it."""

    messages: Conversation
    tools: Tools = None


class Text(NamedTuple):
    """A document, trained as a whole, with the tokenizer's own beginning and end, without a chat template."""

    text: str


class Tokens(NamedTuple):
    """Token ids as they are trained, and their labels: -100 where they are not."""

    ids: list[int]
    labels: list[int]


Content = Chat | Text | Tokens


class Pair(NamedTuple):
    """Two answers to one prompt, of which the first is preferred."""

    chosen: Chat
    rejected: Chat


class Judged(NamedTuple):
    """One answer, its conversation, with a verdict on it."""

    chat: Chat
    desirable: bool


ROLES = ("system", "user", "assistant", "tool")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # of messages; templates use the same names
MEDIA = ("images", "videos", "audios", "image", "video", "audio")  # keys of rows and of messages

_SPEAKERS = {
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response"), "tool"),
}
_UNREAD = {*MEDIA, "loss", "mask"}  # keys whose meaning would be lost without a word


def is_answer(message: Mapping[str, Any], roles: Mapping[str, str]) -> bool:
    """Whether an assistant speaks, by a name that is known or in ``roles``."""
    speaker = str(message.get("role", message.get("from")))
    return roles.get(speaker, _SPEAKERS.get(speaker, speaker)) == "assistant"


def read_message(message: Any, number: int, roles: Mapping[str, str]) -> Message:
    """Check one message and return it with the keys that matter, or raise a RowFault; null counts as absent.

    Args:
        message: OpenAI's ``role`` and ``content``, or ShareGPT's ``from`` and ``value``, and what else they may have.
        number: its number in the conversation, from 1.
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
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
    if role != "assistant" and (calls or reasoning):
        raise RowFault(f"{where} ({role}) has calls or reasoning, which only an assistant has")

    text = _read_content("" if content is None and calls else content, where, role)
    read: Message = {"role": role, "content": text}
    if calls:
        read["tool_calls"] = read_calls([calls] if isinstance(calls, dict) else calls, where)
    elif role == "assistant" and not text.strip():
        raise RowFault(f"the answer ({where}) is empty")
    if reasoning:
        if text.lstrip().startswith("<think>"):
            raise RowFault(f"{where} has reasoning beside a <think> block in its content: keep one")
        read["reasoning_content"] = read_string(reasoning, f"the reasoning of {where}")
    for key in ("name", "tool_call_id"):
        if role == "tool" and message.get(key) is not None:
            read[key] = read_string(message[key], f"{key!r} of {where}")
    if not _is_trained(message, role, where) and role == "assistant":
        read["train"] = False
    return read


def _read_content(content: Any, where: str, role: str) -> str:
    """Return the text of a message, or of its parts joined."""
    if not isinstance(content, list) or not content:
        return read_string(content, f"the {role} content of {where}")
    text = ""
    for number, part in enumerate(content, start=1):
        name = f"part {number} of {where}"
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RowFault(f"{name} is {reprlib.repr(part)}, expected {{type: text, text: …}}: only text is read")
        _refuse_unread(part, _UNREAD | {"train", "weight"}, name)
        text += read_string(part.get("text", part.get("value")), f"the text of {name}")
    check_characters(text, where)  # half a character in each of two parts
    return text


def _is_trained(message: dict[str, Any], role: str, where: str) -> bool:
    """Whether an answer is trained: what ``train``, or OpenAI's ``weight``, of the message decides."""
    if len(message) == 2:  # role and content alone, as most messages have
        return True
    _refuse_unread(message, _UNREAD, where)
    marks = {key: message[key] for key in ("train", "weight") if message.get(key) is not None}
    for key, value in marks.items():
        if value not in (0, 1):
            expected = "true or false" if key == "train" else "0 or 1"
            raise RowFault(f"{key!r} of {where} must be {expected}, found {reprlib.repr(value)}")
        if value and role != "assistant":
            raise RowFault(f"{where} ({role}) has {key}: {value}, but only answers are trained")
    return all(marks.values())


def _refuse_unread(values: dict[str, Any], keys: set[str], where: str) -> None:
    for key in sorted(keys & values.keys()):
        if values[key] not in (None, "", []):
            raise RowFault(f"{where} has {key!r}, which is not read: only text is, and `train: false` of a message")


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


# Tools


def find_tools(tools: Any, key: str = "tools") -> list[dict[str, Any]] | None:
    """Return the tools of a row: JSON schemas as OpenAI has them, or of functions alone, or either as a JSON string."""
    tools = parse_json(tools or [], repr(key)) or []
    if not isinstance(tools, list):
        raise RowFault(f"{key!r} must be a list of JSON schemas, found {kind_of(tools)}")
    functions = [_read_function(tool, f"tool {number}") for number, tool in enumerate(tools, start=1)]
    return [{"type": "function", "function": function} for function in functions] or None


def read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return the ``tool_calls`` of a message with their arguments as objects, which is what templates expect."""
    if not isinstance(calls, list):
        raise RowFault(f"the tool_calls of {where} must be a list, found {kind_of(calls)}")
    return [_read_call(call, f"tool call {number} of {where}") for number, call in enumerate(calls, start=1)]


def _read_call(call: Any, where: str) -> dict[str, Any]:
    function = _read_function(call, where)
    arguments = parse_json(function.get("arguments"), f"the arguments of {where}")
    if not isinstance(arguments, dict):
        raise RowFault(f"the arguments of {where} must be an object, or a JSON string of one, found {arguments!r:.80}")
    check_characters(arguments, where)
    read: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id") is not None:
        read["id"] = read_string(call["id"], f"the id of {where}")
    return read


def _read_function(value: Any, where: str) -> dict[str, Any]:
    """Return what is under ``function``, or the value itself where it is the function alone."""
    if isinstance(value, dict) and value.get("type") in (None, "function"):
        function = value.get("function") or {key: inner for key, inner in value.items() if key != "type"}
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            check_characters(function, where)
            return function
    raise RowFault(f"{where} must be a function with a 'name', found {reprlib.repr(value)}")
