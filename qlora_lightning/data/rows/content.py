"""What a row is: a conversation, a pair of them, one with a verdict, a text or tokens; and the checks of its values."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, NotRequired, TypedDict

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import load_json

MAX_TEXT = 64_000_000  # characters of a row, where a value counts as 16
TOO_LARGE = "more than 64 MB of text or 4 million values, too much for one row: cut it into several"


class RowFault(UserError):
    """One row cannot be used. The message is a short reason; the caller adds file and line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, "row.fault")


class Message(TypedDict):
    """One turn: its role (system, user, assistant or tool), its text, and what else a chat template may need.

    ``train`` is only set to False, on an answer that is not trained. Templates do not see it.
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


@dataclass(frozen=True)
class Chat:
    """A conversation, and the schemas of the tools that may be called in it."""

    messages: Conversation
    tools: Tools = None


@dataclass(frozen=True)
class Text:
    """A document, trained as a whole, between the tokenizer's BOS and EOS, without a chat template."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """Token ids, and their labels: -100 where a token is not trained."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which the first is preferred."""

    chosen: Chat
    rejected: Chat


@dataclass(frozen=True)
class Judged:
    """A conversation, and whether its last answer is good."""

    chat: Chat
    label: bool


Content = Chat | Text | Tokens
RowContent = Content | Pair | Judged

# what counts as absent where a key may be; 0 and false are values, of a wrong kind
EMPTY: tuple[Any, ...] = (None, "", [], {})
ROLES = ("system", "user", "assistant", "tool")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # of messages; templates use the same names
MEDIA = ("images", "videos", "audios", "image", "video", "audio")  # keys of rows and of messages

_SPEAKERS = {
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response"), "tool"),
}
# keys whose meaning would be lost silently; train_detail is Axolotl's
_UNREAD = {*MEDIA, "loss", "loss_mask", "mask", "masked", "train_detail", "function_call"}
_TRAIN_FLAGS = ("train", "training", "trainable", "weight", "loss_weight")  # of a message


def answer_indices(messages: Sequence[Message]) -> list[int]:
    """Return the indices of the answers."""
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def is_answer(message: Mapping[str, Any]) -> bool:
    """Whether the role of a message is one of the known names of the assistant."""
    speaker = message.get("from") if message.get("role") is None else message["role"]
    return speaker == "assistant" or _SPEAKERS.get(str(speaker)) == "assistant"


def read_message(message: Any, number: int, roles: Mapping[str, str]) -> Message:
    """Check one message and return it with the keys that matter, or raise a RowFault; null counts as absent.

    Args:
        message: OpenAI's ``role`` and ``content``, or ShareGPT's ``from`` and ``value``, and what else they may have.
        number: its number in the conversation, from 1.
        roles: names of roles beyond those that are known, ``{their name: our name}``.
    """
    where = f"message {number}"
    if not isinstance(message, Mapping):
        raise RowFault(f"{where} is {kind_of(message)}, expected an object with 'role' and 'content'")
    if message.get("role") is None and message.get("from") is None:
        raise RowFault(f"{where} has no 'role', expected {', '.join(ROLES)}")
    speaker = str(_read_one_of(("role", "from"), message, where))
    role = roles.get(speaker, _SPEAKERS.get(speaker, speaker))
    if role not in ROLES:
        names = ", ".join((*ROLES, *_SPEAKERS))
        raise RowFault(f"{where} has the role {speaker!r}, expected {names}; name others by `roles: {{theirs: ours}}`")
    content = _read_one_of(("content", "value"), message, where)
    calls = None if message.get("tool_calls") in EMPTY else message["tool_calls"]
    if speaker == "function_call":
        calls, content = parse_json(content, f"{where} (function_call)"), None
    reasoning = _read_one_of(REASONING_KEYS, {key: value for key, value in message.items() if value != ""}, where)
    if role != "assistant" and not (calls is None and reasoning is None):
        raise RowFault(f"{where} ({role}) has calls or reasoning, which only an assistant has")

    text = _read_content("" if content is None and calls is not None else content, where, role)
    checked: Message = {"role": role, "content": text}
    if calls is not None:
        calls = [calls] if isinstance(calls, dict) else calls
        if not isinstance(calls, list):
            raise RowFault(f"'tool_calls' of {where} must be a list, found {kind_of(calls)}")
        checked["tool_calls"] = [_read_call(call, f"call {i} of {where}") for i, call in enumerate(calls, start=1)]
    elif role == "assistant" and not text.strip():
        raise RowFault(f"the answer ({where}) is empty")
    if reasoning is not None:
        if text.lstrip().startswith("<think>"):
            raise RowFault(f"{where} has reasoning beside a <think> block in its content: keep one")
        checked["reasoning_content"] = read_string(reasoning, f"the reasoning of {where}")
    for key in ("name", "tool_call_id"):
        if role == "tool" and message.get(key) is not None:
            checked[key] = read_string(message[key], f"{key!r} of {where}")
    if not _is_trained(message, where) and role == "assistant":
        checked["train"] = False
    return checked


def _read_one_of(keys: Sequence[str], message: Mapping[str, Any], where: str) -> Any:
    """Return what a message has under one of the names of a key; null counts as absent."""
    given = [key for key in keys if message.get(key) is not None]
    for key in given[1:]:
        if message[key] != message[given[0]]:
            raise RowFault(f"{where} has {given[0]!r} and {key!r}, which differ: keep one")
    return message[given[0]] if given else None


def _read_content(content: Any, where: str, role: str) -> str:
    """Return the text of a message, or of its parts joined."""
    if not isinstance(content, list) or not content:
        return read_string(content, f"the {role} content of {where}")
    text = ""
    for number, part in enumerate(content, start=1):
        # LLaMA-Factory's new format has `value`
        given = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
        texts = [value for key, value in given.items() if key in ("text", "value") and isinstance(value, str)]
        if given.get("type") != "text" or len(texts) != 1 or len(given) != 2:
            subject = f"part {number} of {where} is {reprlib.repr(part)}"
            raise RowFault(f"{subject}, expected {{type: text, text: …}}: only text is read, and no mark of a part")
        text += texts[0]
    return text


def _is_trained(message: Mapping[str, Any], where: str) -> bool:
    """Whether an answer is trained, by ``train`` or its names in OpenAI's, Axolotl's and LLaMA-Factory's rows."""
    for key in sorted(_UNREAD & message.keys()):
        if message[key] not in (None, "", []):
            raise RowFault(f"{where} has {key!r}, which is not read: only text is, and `train: false` of a message")
    flags = {key: message[key] for key in _TRAIN_FLAGS if message.get(key) is not None}
    for key, value in flags.items():
        if value not in (0, 1):
            raise RowFault(f"{key!r} of {where} must be true or false, 1 or 0, found {reprlib.repr(value)}")
    return all(flags.values())


def check_order(conversation: Conversation, needs_answer: bool) -> None:
    """Raise a RowFault for turns in an order that no chat has."""
    roles = [message["role"] for message in conversation]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if "system" in turns:
        raise RowFault("a system message must come first, found one after other messages")
    if turns[:1] != ["user"]:
        raise RowFault(f"the conversation must begin with a user turn, found {turns[0] if turns else 'none'}")
    if needs_answer and "assistant" not in turns:
        raise RowFault("no assistant turn, so there is nothing to train on")


# ---- tools -----------------------------------------------------------------------------------------------------------


def find_tools(tools: Any, messages: Conversation) -> list[dict[str, Any]] | None:
    """Return the tools of a row: JSON schemas as OpenAI has them, or of functions alone, or either as a JSON string.

    If there are any, the calls in the messages must be of them.
    """
    schemas = None if tools in EMPTY else parse_json(tools, "'tools'")
    schemas = [] if schemas in EMPTY else schemas
    if not isinstance(schemas, list):
        raise RowFault(f"'tools' must be a list of schemas, or a JSON string of one, found {reprlib.repr(schemas)}")
    functions = [_read_function(tool, f"tool {number}") for number, tool in enumerate(schemas, start=1)]
    names = [function["name"] for function in functions]
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    unknown = [call["function"]["name"] for call in calls if call["function"]["name"] not in names]
    if names and unknown:
        raise RowFault(f"calls {unknown[0]!r}, which is not among 'tools': {', '.join(names)}")
    return [{"type": "function", "function": function} for function in functions] or None


def _read_call(call: Any, where: str) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, which is what templates expect."""
    function = _read_function(call, where)
    arguments = parse_json(function.get("arguments"), f"the arguments of {where}")
    if not isinstance(arguments, dict):
        raise RowFault(f"the arguments of {where} must be an object, or a JSON string of one, found {arguments!r:.80}")
    checked: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id") is not None:
        checked["id"] = read_string(call["id"], f"the id of {where}")
    return checked


def _read_function(value: Any, where: str) -> dict[str, Any]:
    """Return the value under ``function``, or the value itself if it is the function alone."""
    if isinstance(value, dict) and value.get("type") in (None, "function"):
        function = value.get("function") or {key: item for key, item in value.items() if key != "type"}
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            return function
    raise RowFault(f"{where} must be a function with a 'name', found {reprlib.repr(value)}")


# ---- preferences -----------------------------------------------------------------------------------------------------


def judge(chat: Chat, label: bool) -> Judged:
    """Put a label on the last answer of a conversation; earlier ones belong to the prompt and are not trained."""
    answer = answer_indices(chat.messages)[-1]
    question = max(i for i in range(answer) if chat.messages[i]["role"] == "user")
    return Judged(_leave_untrained(chat, question), label)


def pair_up(chosen: Chat, rejected: Chat) -> Pair:
    """Return two conversations as a pair; the messages that both begin with are the prompt, which each must answer."""
    conversations = chosen.messages, rejected.messages
    if chosen.messages == rejected.messages:
        raise RowFault("'chosen' and 'rejected' are the same")
    n_prompt = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*conversations, strict=False)))
    if not n_prompt or not all(turns[n_prompt:] and turns[n_prompt]["role"] == "assistant" for turns in conversations):
        raise RowFault("'chosen' and 'rejected' answer different prompts, or one has no answer")
    if chosen.messages[n_prompt - 1]["role"] == "assistant":
        raise RowFault("the prompt ends with an assistant's message: expected a user's or a tool's, to answer")
    return Pair(_leave_untrained(chosen, n_prompt), _leave_untrained(rejected, n_prompt))


def _leave_untrained(chat: Chat, n_prompt: int) -> Chat:
    """Mark the answers among the first ``n_prompt`` messages as not trained."""
    prompt: Conversation = [
        {**message, "train": False} if message["role"] == "assistant" else message
        for message in chat.messages[:n_prompt]
    ]
    return replace(chat, messages=[*prompt, *chat.messages[n_prompt:]])


# ---- single values ---------------------------------------------------------------------------------------------------


def kind_of(value: Any) -> str:
    """Return ``null``, or the name of the value's type."""
    return "null" if value is None else type(value).__name__


def read_string(value: Any, where: str) -> str:
    """Return a string, or raise a RowFault that begins with ``where``."""
    if not isinstance(value, str):
        raise RowFault(f"{where} must be a string, found {kind_of(value)}")
    return value


def size_of(value: Any) -> int:
    """Return the characters of all keys and texts in a value, and 16 for each value."""
    if isinstance(value, dict):
        return 16 + sum(len(str(key)) + size_of(item) for key, item in value.items())
    if isinstance(value, list):
        return 16 + sum(map(size_of, value))
    return 16 + len(value) if isinstance(value, str) else 16


def parse_json(value: Any, where: str) -> Any:
    """Parse a JSON string, or raise a RowFault; return any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return load_json(value)
    except ValueError as error:  # also a number of 5,000 digits
        raise RowFault(f"{where}: not JSON ({error})") from error
