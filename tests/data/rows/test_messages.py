"""Single messages and tools: what of them a chat template gets, and what is refused."""

import json

import pytest

from qlora_lightning.data.rows.bad_rows import RowFault, check_characters
from qlora_lightning.data.rows.formats import RowConverter
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.data.rows.sources import RowSettings

SKY = {"name": "sky", "description": "Tells the weather.", "parameters": {"type": "object", "properties": {}}}
SCHEMA = {"type": "function", "function": SKY}
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"at": "Ulm"}}}
ASKED, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def convert(*messages, **others):
    return RowConverter(RowSettings()).convert(Row({"messages": list(messages), **others}, "a.jsonl", 1))


def answer(**options):
    """Return the answer of a row as it is read."""
    return convert(ASKED, {**SAID, **options}).messages[1]


def asked(**options):
    """Return the question of a row as it is read."""
    return convert({**ASKED, **options}, SAID).messages[0]


def part(text, **options):
    return {"type": "text", "text": text, **options}


def test_only_keys_that_a_template_may_need_are_kept():
    assert asked(id=7, name="me", train=None) == ASKED
    nothing = {"refusal": None, "tool_calls": None, "function_call": None, "weight": None, "reasoning_content": ""}
    assert answer(**nothing) == SAID
    tool = {"role": "tool", "content": "", "name": "sky", "tool_call_id": "c1"}
    assert convert(ASKED, {"role": "assistant", "tool_calls": [CALL]}, {**tool, "extra": 1}, SAID).messages[2] == tool


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        ("developer", "system"),
        ("human", "user"),
        *((speaker, "assistant") for speaker in ("gpt", "chatgpt", "bing", "bard", "bot", "model")),
        *((speaker, "tool") for speaker in ("observation", "function", "function_response")),
    ],
)
def test_roles_have_other_names_under_either_key(speaker, role):
    before = {"system": [], "user": [], "assistant": [ASKED], "tool": [ASKED, SAID]}[role]
    after = [ASKED, SAID] if role == "system" else [SAID]
    for message in ({"role": speaker, "content": "x"}, {"from": speaker, "value": "x"}):
        assert convert(*before, message, *after).messages[len(before)] == {"role": role, "content": "x"}


def test_parts_are_joined():
    parts = [part("é1 ", loss=None), {"type": "text", "value": "two "}, part(""), part("3", id=7, train=None)]
    assert answer(content=parts) == {**SAID, "content": "é1 two 3"}
    assert asked(content=parts) == {**ASKED, "content": "é1 two 3"}


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}, {"weight": 0.0}, {"train": False, "weight": 0}])
def test_an_answer_that_is_not_trained_is_marked(mark):
    assert answer(**mark) == {**SAID, "train": False}
    assert answer(**{key: type(value)(1) for key, value in mark.items()}) == SAID
    assert asked(**mark) == ASKED


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_what_an_assistant_thinks_has_one_name(key):
    assert answer(**{key: "Hm."}) == {**SAID, "reasoning_content": "Hm."}
    assert answer(**{"reasoning_content": "Hm.", "thinking": "", key: "Hm."}) == answer(reasoning="Hm.")
    inside = "Write a <think> tag, then </think>."
    assert answer(**{key: "Hm."}, content=inside) == {**SAID, "content": inside, "reasoning_content": "Hm."}
    with pytest.raises(RowFault, match=r"^message 2 has reasoning beside a <think> block in its content: keep one$"):
        answer(**{key: "Hm."}, content="\n<think>\nHm.\n</think>\n\na")


def test_an_assistant_that_calls_tools_may_say_nothing():
    expected = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    text = json.dumps({"at": "Ulm"})  # arguments as OpenAI writes them
    function = {"name": "sky", "arguments": text}
    for options in (
        {"tool_calls": [CALL]},
        {"tool_calls": [function]},
        {"tool_calls": [{"type": "function", "function": function}]},
        {"function_call": function},
    ):
        assert answer(content=None, **options) == expected
    assert convert(ASKED, {"from": "function_call", "value": json.dumps(function)}).messages[1] == expected
    assert answer(tool_calls=[{**CALL, "id": "c1"}]) == {**SAID, "tool_calls": [{**CALL, "id": "c1"}]}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "oracle", "content": "x"}, "message 2 has the role 'oracle', expected system, user, assistant, tool"),
        ({"role": "user"}, "the user content of message 2 must be a string, found null"),
        ({**SAID, "content": " \n"}, "the answer (message 2) is empty"),
        ({**SAID, "content": "", "reasoning": "Hm."}, "the answer (message 2) is empty"),
        ({**SAID, "content": "a\x00"}, "message 2 contains a NUL character"),
        ({**SAID, "content": "\ud83d"}, "message 2 contains half a character"),
        ({**SAID, "reasoning": ["Hm."]}, "the reasoning of message 2 must be a string, found list"),
        ({**SAID, "thinking": "Hm.", "reasoning": "Ah."}, "has 'reasoning' and 'thinking', which differ: keep one"),
        ({**ASKED, "reasoning": "Hm."}, "message 2 (user) has calls or reasoning, which only an assistant has"),
        ({**ASKED, "tool_calls": [CALL]}, "message 2 (user) has calls or reasoning, which only an assistant has"),
        ({**ASKED, "content": ["x"]}, "part 1 of message 2 is 'x', expected {type: text"),
        ({**ASKED, "content": [part("x"), {"type": "image_url"}]}, "part 2 of message 2 is {'type': 'image_url'}"),
        ({**ASKED, "images": ["a"]}, "message 2 has 'images', which is not read"),
        *(({**SAID, key: 0}, f"has {key!r}, which is not read") for key in ("mask", "loss", "trian", "weights")),
        ({**SAID, "train": "no"}, "'train' of message 2 must be true or false, found 'no'"),
        ({**SAID, "weight": 0.5}, "'weight' of message 2 must be 0 or 1, found 0.5"),
        ({**SAID, "train": True, "weight": 0}, "'train' and 'weight' of message 2 contradict each other"),
        ({**ASKED, "train": True}, "message 2 (user) has train: True, but only answers are trained"),
        ({**ASKED, "weight": 1}, "message 2 (user) has weight: 1, but only answers are trained"),
        ({**SAID, "content": [part("x", train=False)]}, "part 1 of message 2 has 'train', which is not read"),
        ({**SAID, "content": [part("x", weight=0)]}, "part 1 of message 2 has 'weight', which is not read"),
        ({**SAID, "content": [part("x", mask=1)]}, "part 1 of message 2 has 'mask', which is not read"),
        ({"from": "function_call", "value": "sky()"}, "message 2 (function_call): not JSON (Expecting value"),
        ({**SAID, "tool_calls": "sky"}, "the tool_calls of message 2 must be a list, found str"),
        ({**SAID, "tool_calls": [{"arguments": {}}]}, "tool call 1 of message 2 must be a function with a 'name'"),
        ({**SAID, "tool_calls": [{"name": "sky", "arguments": "[]"}]}, "must be an object, or a JSON string of one"),
        ({**SAID, "tool_calls": [{"name": "sky", "arguments": "at"}]}, "arguments of tool call 1 of message 2: not JS"),
        ({**SAID, "tool_calls": [{"name": "f", "arguments": {"at": "\ud83d"}}]}, "contains half a character"),
    ],
)
def test_messages_that_cannot_be_used(message, reason):
    with pytest.raises(RowFault) as fault:
        convert(ASKED, message)
    assert reason in str(fault.value)


@pytest.mark.parametrize(
    "tools", [[SCHEMA], [SKY], [{"type": "function", **SKY}], json.dumps([SCHEMA]), json.dumps([SKY])]
)
def test_tools_are_schemas_as_openai_has_them_or_functions_alone_or_either_as_json(tools):
    assert convert(ASKED, SAID, tools=tools).tools == [SCHEMA]


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_a_row_without_tools_has_none(tools):
    assert convert(ASKED, SAID, tools=tools).tools is None


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize("functions", [[SKY], json.dumps([SKY])])
def test_functions_of_openais_older_calls_are_tools(key, functions):
    called = {"role": "assistant", "content": None, "function_call": {"name": "sky", "arguments": "{}"}}
    row = {key: [ASKED, called], "functions": functions}
    for tools in (None, "", "[]", [SCHEMA]):
        converter = RowConverter(RowSettings())
        assert converter.convert(Row({**row, "tools": tools}, "a.jsonl", 1)).tools == [SCHEMA]
        assert converter.unread_columns == []
    with pytest.raises(RowFault, match="'functions': not JSON"):
        convert(ASKED, SAID, functions="sky")
    with pytest.raises(RowFault, match="the row has 'tools' and 'functions', which differ: keep one"):
        convert(ASKED, SAID, tools=[SCHEMA], functions=[{"name": "sea"}])


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("sky", "'tools': not JSON (Expecting value"),
        ("[" * 200_000, "'tools': not JSON"),
        ({"name": "sky"}, "'tools' must be a list of JSON schemas, found dict"),
        ([SCHEMA, {"function": {"name": 1}}], "tool 2 must be a function with a 'name'"),
        ([{"name": "sky", "description": "\x00"}], "tool 1 contains a NUL character"),
    ],
)
def test_tools_that_cannot_be_used(tools, reason):
    with pytest.raises(RowFault) as fault:
        convert(ASKED, SAID, tools=tools)
    assert reason in str(fault.value)


@pytest.mark.parametrize("place", [lambda text: text, lambda text: {"k": [text]}, lambda text: {text: 1}])
def test_nul_and_half_a_character_are_refused_wherever_they_are(place):
    check_characters(place("é 😀 \u2028 \\u0000"), "it")
    for text, reason in {"a\x00b": "^it contains a NUL character$", "a\ud83d": "^it contains half a character"}.items():
        with pytest.raises(RowFault, match=reason):
            check_characters(place(text), "it")
