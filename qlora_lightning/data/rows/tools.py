"""Tools: the schemas that a row offers, and the calls that an assistant message makes."""

import json
import re
import reprlib
from typing import Any

from qlora_lightning.data.rows.bad_rows import RowFault, check_characters, kind_of, parse_json, read_string


def find_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return the tools of a row as a chat template takes them, or None if it has none.

    They are a list of JSON schemas, or such a list as a JSON string: each as OpenAI has it (``type`` and ``function``),
    or the function alone (``name``, ``description``, ``parameters``).
    """
    tools = parse_json(tools or [], "'tools'") or []
    if not isinstance(tools, list):
        raise RowFault(f"'tools' must be a list of JSON schemas, found {kind_of(tools)}")
    functions = [_read_function(tool, f"tool {number}") for number, tool in enumerate(tools, start=1)]
    return [{"type": "function", "function": function} for function in functions] or None


def read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return the ``tool_calls`` of a message with their arguments as objects, which is what templates expect.

    They are a list of ``{"type": "function", "function": {"name": …, "arguments": …}}``, with an ``id`` or without; the
    arguments are an object or, as OpenAI writes them, a JSON string of one.
    """
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


_GLAIVE_TURN = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE): ?")
_GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_GLAIVE_CALL = re.compile(r"""\{\s*"name": *("[^"]*"), *"arguments": *'(.*)'\s*\}""", re.DOTALL)


def read_glaive(system: str, chat: str) -> tuple[list[Any], list[Any]]:
    """Return messages and tools of a row of glaive-function-calling, in which both are text."""
    text = system.strip().removeprefix("SYSTEM:").strip()
    prompt, brace, functions = text.partition("{")
    messages: list[dict[str, Any]] = []
    if prompt:
        # "… with access to the following functions. Use them if required -": the chat template says it
        begin, announced, _ = prompt.partition(" with access to the following functions")
        messages.append({"role": "system", "content": f"{begin.rstrip(',')}." if announced else prompt})
    _, *turns = _GLAIVE_TURN.split(chat)
    for speaker, said in zip(turns[::2], turns[1::2], strict=True):
        content, call, function = said.replace("<|endoftext|>", "").partition("<functioncall>")
        message: dict[str, Any] = {"role": _GLAIVE_ROLES[speaker], "content": content.strip()}
        if call:
            message["tool_calls"] = [_read_glaive_call(function.strip())]
        messages.append(message)
    # one function after the other, each on lines of its own: a line does not end inside a JSON string
    array = re.sub(r"\}\s*\n\s*\{", "},{", f"[{brace}{functions}]")
    return messages, parse_json(array, "the functions in 'system'")


def _read_glaive_call(text: str) -> Any:
    quoted = _GLAIVE_CALL.fullmatch(text)  # arguments in single quotes
    if quoted:
        return {"name": json.loads(quoted[1]), "arguments": quoted[2].replace("\\'", "'")}
    call = parse_json(text, "a <functioncall>")
    return {"arguments": {}, **call} if isinstance(call, dict) else call
