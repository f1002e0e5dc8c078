"""Preference rows: two answers to one prompt, the better one first, or one answer with a verdict."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.conversation import Chat, Message, Pair, is_answer
from qlora_lightning.data.rows.formats import Format, exchange, read_alpaca, refuse_messages_as_text

_PROMPT_KEYS = ("prompt", "messages", "conversations")
VERDICTS = {"true": True, "false": False}  # in CSV a verdict is a word


def attach_verdict(chat: Chat, desirable: bool) -> Chat:
    """Put a verdict on the last answer of a conversation; earlier ones belong to the prompt and are not trained."""
    roles = [message["role"] for message in chat.messages]
    answer = max((i for i, role in enumerate(roles) if role == "assistant"), default=0)
    question = max((i for i, role in enumerate(roles[:answer]) if role == "user"), default=0)
    _leave_untrained(chat.messages[:question])
    return chat._replace(desirable=desirable)


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
    _leave_untrained([*chosen.messages[:n_prompt], *rejected.messages[:n_prompt]])
    return Pair(chosen, rejected)


def _leave_untrained(prompt: Sequence[Message]) -> None:
    for message in prompt:
        if message["role"] == "assistant":
            message["train"] = False


def _read_pair(values: dict[str, Any]) -> list[Any]:
    """Read ``chosen`` and ``rejected``, each a text, a message or a list of messages, and put the prompt before each.

    The prompt is ``prompt`` (a text or messages), ``messages``, ``conversations``, or Alpaca's columns (LLaMA-Factory);
    if both are whole conversations, which begin alike (TRL's implicit prompt), it is not read.
    """
    answers = [values[key] for key in ("chosen", "rejected")]
    refuse_messages_as_text(values, ("chosen", "rejected", *_PROMPT_KEYS))
    if [] in answers:
        raise RowFault("'chosen' or 'rejected' is an empty list: expected an answer")
    is_whole = all(isinstance(answer, list) and not is_answer(answer[0]) for answer in answers)
    prompt = [] if is_whole else _read_prompt(values)
    return [[*prompt, *_as_messages(answer)] for answer in answers]


def _read_prompt(values: dict[str, Any]) -> list[Any]:
    if values.get("instruction"):
        return read_alpaca({**values, "output": None})
    prompt = next((values[key] for key in _PROMPT_KEYS if values.get(key)), None)
    if not prompt:
        raise RowFault(
            "a preference row needs a prompt beside 'chosen' and 'rejected', or a whole conversation in each; "
            "name its column by `columns: {theirs: prompt}`"
        )
    return exchange(prompt, None) if isinstance(prompt, str) else prompt


def _as_messages(answer: Any) -> list[Any]:
    if isinstance(answer, list):
        return answer
    return [answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}]


PREFERENCE_FORMAT = Format(
    "preference", (), ("chosen", "rejected"), _read_pair, (*_PROMPT_KEYS, "instruction", "input", "history")
)
