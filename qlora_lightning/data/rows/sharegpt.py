"""Rows of the ShareGPT shape as messages: ``conversations``, a list of turns with ``from`` and ``value``."""

import reprlib
from typing import Any

from qlora_lightning.data.reading.bad_rows import RowFault
from qlora_lightning.data.rows.kinds import kind_of
from qlora_lightning.data.rows.shapes import with_system
from qlora_lightning.data.rows.tools import parse_json

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


def from_sharegpt(values: dict[str, Any]) -> Any:
    """Read ``conversations``; a turn from ``function_call`` becomes an assistant message with ``tool_calls``."""
    turns = values["conversations"]
    if not isinstance(turns, list):
        raise RowFault(f"'conversations' must be a list of turns, found {kind_of(turns)}")
    return with_system(values, [_read_turn(turn, number) for number, turn in enumerate(turns, start=1)])


def _read_turn(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        found = ", ".join(map(str, turn)) if isinstance(turn, dict) else kind_of(turn)
        is_message = isinstance(turn, dict) and {"role", "content"} <= turn.keys()
        advice = ": map the column with `columns: {conversations: messages}`" if is_message else ""
        raise RowFault(f"turn {number} must have 'from' and 'value', found {found}{advice}")
    speaker, value = turn["from"], turn["value"]
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowFault(f"turn {number} is from {reprlib.repr(speaker)}, expected {', '.join(_ROLES)}")
    message = {"role": role, "content": value, **{key: turn[key] for key in turn if key not in ("from", "value")}}
    if speaker != "function_call":
        return message
    calls = parse_json(value, f"turn {number} (function_call)")
    return {**message, "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
