import json

import pytest

from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.tools import find_tools, parse_json, read_calls

SKY = {"name": "sky", "description": "Tells the weather.", "parameters": {"type": "object", "properties": {}}}
SCHEMA = {"type": "function", "function": SKY}


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_a_row_without_tools_has_none(tools):
    assert find_tools(tools) is None


@pytest.mark.parametrize(
    "tools", [[SCHEMA], [SKY], [{"type": "function", **SKY}], json.dumps([SCHEMA]), json.dumps([SKY])]
)
def test_tools_are_schemas_as_openai_has_them_or_functions_alone_or_either_as_json(tools):
    assert find_tools(tools) == [
        {
            "type": "function",
            "function": {
                "name": "sky",
                "description": "Tells the weather.",
                "parameters": {"type": "object", "properties": {}},
            },
        }
    ]


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("sky", "'tools': not JSON (Expecting value"),
        ({"name": "sky"}, "'tools' must be a list of JSON schemas, found dict"),
        (["sky"], "tool 1 must be an object, found str"),
        ([SCHEMA, {"type": "function"}], "tool 2 must have a function with a 'name', found type"),
        ([{"function": {"name": 1}}], "tool 1 must have a function with a 'name', found function"),
        ([{"type": "web_search"}], "tool 1 is of the type 'web_search', expected 'function'"),
        ([{"name": "sky", "description": "\x00"}], "'tools' contains a NUL character"),
    ],
)
def test_faults_of_tools(tools, reason):
    with pytest.raises(RowFault) as fault:
        find_tools(tools)
    assert reason in str(fault.value)


@pytest.mark.parametrize("arguments", [{"at": "Ulm"}, '{"at": "Ulm"}'])
def test_arguments_become_an_object(arguments):
    call = {"id": "c1", "type": "function", "function": {"name": "sky", "arguments": arguments}}
    assert read_calls([call], "message 2") == [
        {"id": "c1", "type": "function", "function": {"name": "sky", "arguments": {"at": "Ulm"}}}
    ]


def test_a_call_may_be_the_function_alone():
    assert read_calls([{"name": "sky", "arguments": {}}], "message 2") == [
        {"type": "function", "function": {"name": "sky", "arguments": {}}}
    ]


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ("sky", "the tool_calls of message 2 must be a list, found str"),
        ([None], "tool call 1 of message 2 must be an object, found null"),
        ([{"arguments": {}}], "tool call 1 of message 2 must have a function with a 'name', found arguments"),
        ([{"name": "sky"}], "the arguments of tool call 1 of message 2 must be an object, or a JSON string of one"),
        ([{"name": "sky", "arguments": "[]"}], "a JSON string of one, found an empty list"),
        ([{"name": "sky", "arguments": "at"}], "the arguments of tool call 1 of message 2: not JSON (Expecting value"),
        ([{"name": "sky", "arguments": {"at": "\ud83d"}}], "tool call 1 of message 2 contains half a character"),
        ([{"name": "sky", "arguments": {}, "id": 1}], "the id of tool call 1 of message 2 must be a string, found int"),
    ],
)
def test_faults_of_calls(calls, reason):
    with pytest.raises(RowFault) as fault:
        read_calls(calls, "message 2")
    assert reason in str(fault.value)


@pytest.mark.parametrize("text", ["1" * 5000, "[" * 200_000])
def test_json_that_python_will_not_read_is_a_fault_too(text):
    with pytest.raises(RowFault, match="it: not JSON"):
        parse_json(text, "it")
