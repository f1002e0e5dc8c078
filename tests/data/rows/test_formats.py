"""What a row becomes, or why it is rejected: one table; and that it follows from the row and the settings alone."""

import importlib
import json
import sys

import pytest

from qlora_lightning import UserError
from qlora_lightning.data.rows.content import Chat, Text, Tokens
from qlora_lightning.data.rows.files import Row, Source
from qlora_lightning.data.rows.formats import RowConverter

U, A, S, T = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system", "tool"))
SKY = {"name": "sky", "description": "Tells the weather.", "parameters": {"type": "object", "properties": {}}}
SCHEMA = {"type": "function", "function": SKY}
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"at": "Ulm"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
AS_TEXT = {"name": "sky", "arguments": json.dumps({"at": "Ulm"})}  # as OpenAI writes arguments
NO_TRAINING = {**A, "train": False}
TURNS_AS_JSON = json.dumps([U, A])


def said(role, content):
    return {"role": role, "content": content}


def part(text):
    return {"type": "text", "text": text}


def convert(values, needs_answer=True, **settings):
    converter, row = RowConverter(Source("a.jsonl", **settings), needs_answer), Row(values, "a.jsonl", 1)
    try:
        return converter.convert(row)
    finally:
        converter.check()


def check(row, expected, **settings):
    """Compare what a row becomes: messages, or what its rejection says."""
    if not isinstance(expected, str):
        found = convert(row, **settings)
        assert (found.messages if isinstance(found, Chat) and isinstance(expected, list) else found) == expected
        return
    with pytest.raises(UserError) as error:
        convert(row, **settings)
    assert error.value.key
    assert expected in str(error.value)


ROWS = [  # row, what it becomes, settings
    ({"instruction": "u", "input": "more", "output": "a"}, [said("user", "u\n\nmore"), A], {}),
    ({"instruction": "u", "output": "a", "history": [["u", "r"]]}, [U, said("assistant", "r"), U, A], {}),
    ({"instruction": "u", "output": "a", "system": "s"}, [S, U, A], {}),
    ({"prompt": "u", "completion": "a"}, [U, A], {}),
    ({"prompt": [U, A, U], "completion": [A]}, [U, NO_TRAINING, U, A], {}),
    ({"messages": [U, A], "system": "s", "prompt": "p"}, [S, U, A], {}),
    ({"messages": TURNS_AS_JSON}, [U, A], {}),
    ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, [U, A], {}),
    ({"messages": [{"role": None, "from": "human", "content": None, "value": "u"}, A]}, [U, A], {}),  # parquet
    ({"prompt": "u", "completion": "a", "label": 0}, [U, A], {}),  # perhaps a class
    ({"text": "x", "url": "y"}, Text("x"), {"format": "text"}),
    ({"input_ids": [1, 5], "labels": [-100, 5]}, Tokens([1, 5], [-100, 5]), {}),
    # rows to predict may lack the answer
    ({"instruction": "u"}, [U], {"needs_answer": False}),
    ({"prompt": "a", "messages": [U, A]}, [U, A], {"needs_answer": False}),
    # system prompts and roles
    ({"messages": [U, A]}, [said("system", "mine"), U, A], {"system": "mine"}),
    ({"messages": [U, A]}, [said("system", ""), U, A], {"system": ""}),  # in place of a template's own
    ({"messages": [said("developer", "s"), U, A]}, [S, U, A], {"system": "mine"}),
    ({"messages": [S, U, A], "system": "s"}, "a system message and the key 'system' as well", {}),
    ({"messages": [said("me", "u"), said("bot", "a")]}, [U, A], {"roles": {"me": "user"}}),
    ({"messages": [U, said("me", "a")]}, "message 2 has the role 'me'", {"roles": {"me": "asistant"}}),
    # rows that cannot be used
    ({"messages": "text"}, "'messages': not JSON (Expecting value", {}),
    ({"messages": [U, S, A]}, "a system message must come first", {}),
    *(({"messages": messages}, "must begin with a user turn, found none", {}) for messages in ([], [S])),
    ({"messages": [U]}, "no assistant turn, so there is nothing to train on", {}),
    *(
        ({"instruction": "u", "output": "a", key: value}, f"'{key}' must be a string, found {type(value).__name__}", {})
        for key, value in (("input", 3), ("input", []), ("instruction", 0), ("system", 0), ("system", False))
    ),
    ({"instruction": "", "input": "u", "output": "a", "system": "", "history": ""}, [U, A], {}),
    ({"prompt": "u", "completion": "a", "label": False}, "a verdict on the answer is for PreferenceModule", {}),
    ({"prompt": "u", "completion": [A]}, "part 1 of message 2 is", {}),
    *(
        ({"instruction": "u", "output": "a", "history": history}, "'history' must be a list of [question, answer]", {})
        # of two characters, of two keys, with one that is null; and no list
        for history in (["qa"], [{"role": "user", "content": "q"}], [["q", None]], 0, False, {"q": "a"})
    ),
    # a key twice in JSON that is a text: Python's parser would take the last
    *(
        ({"instruction": "u", "output": "a", **row}, f"{key!r}: not JSON (the key 'content' is there twice)", {})
        for key in ("history", "tools")
        for row in ({key: '[{"content": "a", "content": "b"}]'},)
    ),
    *(
        ({key: '[{"role": "user", "content": "a", "content": "b"}]'}, f"{key!r}: not JSON (the key 'content' is", {})
        for key in ("messages", "conversations")
    ),
    ({"instruction": "u"}, "'output' is missing or null (format alpaca, columns instruction)", {"format": "alpaca"}),
    ({"input_ids": [1, 5], "labels": [-100, 5.0]}, "'labels' must be a list of token ids", {}),
    *(({"text": text}, "'text'", {"format": "text"}) for text in ("  ", 3, None)),
    # columns and formats
    ({"q": "u", "a": "a", "input": "no"}, [U, A], {"columns": {"q": "instruction", "a": "output", "input": None}}),
    ({"question": "a", "answer": "u"}, [U, A], {"columns": {"question": "answer", "answer": "question"}}),
    ({"question": "u", "answer": "a"}, "two of question, answer the same name", {"columns": {"question": "answer"}}),
    ({"instuction": "a", "output": "b"}, "a.jsonl:1: no format is recognized by the keys instuction, output", {}),
    ({"instruction": "a", "output": "b", "prompt": "a", "completion": "b"}, "alpaca and prompt_completion: name", {}),
    ({"instruction": "u", "output": "a", "prompt": "a", "completion": "b"}, [U, A], {"format": "alpaca"}),
    ({"instruction": "u", "output": "a"}, "found 'alpacca'. Did you mean 'alpaca'?", {"format": "alpacca"}),
    ({"question": "[{'role': 'user', 'content': 'u'}]", "answer": "a"}, "the question is a list of messages", {}),
    ({"prompt": "u", "completion": '[{"a": 1}]'}, [U, said("assistant", '[{"a": 1}]')], {}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected", "settings"), ROWS)
def test_rows(row, expected, settings):
    check(row, expected, **settings)


MESSAGES = [  # the last messages of a row that begins with a user turn, and what they become
    ({**A, "refusal": None, "tool_calls": None, "weight": None, "reasoning_content": ""}, A),
    ({**A, "train": False}, NO_TRAINING),
    *(({**A, key: 0}, NO_TRAINING) for key in ("weight", "loss_weight", "training", "trainable")),
    (said("assistant", [part("é1 "), part("2"), part("")]), said("assistant", "é1 2")),
    (said("assistant", [{"type": "text", "value": "a"}]), A),
    *(({**A, key: "Hm."}, {**A, "reasoning_content": "Hm."}) for key in ("reasoning_content", "reasoning")),
    *(
        ({"role": "assistant", "content": None, **calls}, CALLED)
        for calls in ({"tool_calls": [CALL]}, {"tool_calls": [AS_TEXT]})
    ),
    ({"from": "function_call", "value": json.dumps(AS_TEXT)}, CALLED),
    ({**A, "tool_calls": [{**CALL, "id": "c1"}]}, {**A, "tool_calls": [{**CALL, "id": "c1"}]}),
    *((said(speaker, "a"), A) for speaker in ("gpt", "chatgpt", "bing", "bard", "bot", "model")),
    (said("oracle", "x"), "message 2 has the role 'oracle', expected system, user, assistant, tool"),
    ({**A, "content": [{"type": "text", "text": "a", "train": False}]}, "only text is read, and no mark of a part"),
    ({"role": "user"}, "the user content of message 2 must be a string, found null"),
    (said("assistant", " \n"), "the answer (message 2) is empty"),
    ({**A, "content": "", "reasoning": "Hm."}, "the answer (message 2) is empty"),
    ({**A, "reasoning": ["Hm."]}, "the reasoning of message 2 must be a string, found list"),
    (
        {**A, "thinking": "Hm.", "content": "\n<think>\nHm.\n</think>\n\na"},
        "reasoning beside a <think> block in its content: keep one",
    ),
    ({**U, "tool_calls": [CALL]}, "message 2 (user) has calls or reasoning, which only an assistant has"),
    (said("user", [part("x"), {"type": "image_url"}]), "part 2 of message 2 is {'type': 'image_url'}"),
    *(({**A, key: [0]}, f"has {key!r}, which is not read") for key in ("images", "mask", "function_call")),
    # a value twice by two names, or of a kind that was read as absent
    ({**A, "from": "human"}, "message 2 has 'role' and 'from', which differ"),
    ({**A, "value": "b"}, "message 2 has 'content' and 'value', which differ"),
    ({**A, "reasoning_content": "Hm.", "reasoning": "Oh."}, "message 2 has 'reasoning_content' and 'reasoning', which"),
    ({**A, "reasoning_content": "Hm.", "reasoning": "Hm.", "thinking": ""}, {**A, "reasoning_content": "Hm."}),
    ({**A, "reasoning": 0}, "the reasoning of message 2 must be a string, found int"),
    ({**A, "tool_calls": 0}, "'tool_calls' of message 2 must be a list, found int"),
    ({**A, "tool_calls": []}, A),
    (
        {**A, "tool_calls": [{"name": "sky", "arguments": '{"at": "Ulm", "at": "Rome"}'}]},
        "the arguments of call 1 of message 2: not JSON (the key 'at' is there twice)",
    ),
    ({"from": "function_call", "value": '{"name": "a", "name": "b"}'}, "(function_call): not JSON (the key 'name' is"),
    ({**A, "weight": 0.5}, "'weight' of message 2 must be true or false, 1 or 0, found 0.5"),
    ({"from": "function_call", "value": "sky()"}, "message 2 (function_call): not JSON (Expecting value"),
    ({**A, "tool_calls": [{"arguments": {}}]}, "call 1 of message 2 must be a function with a 'name'"),
    ({**A, "tool_calls": [{"name": "sky", "arguments": "[]"}]}, "must be an object, or a JSON string of one"),
]


@pytest.mark.parametrize(("message", "expected"), MESSAGES)
def test_messages(message, expected):
    check({"messages": [U, message]}, expected if isinstance(expected, str) else [U, expected])


def test_only_keys_that_a_template_may_need_are_kept():
    tool = {"role": "tool", "content": "", "name": "sky", "tool_call_id": "c1"}
    row = [{"from": "human", "value": "u", "id": 7, "name": "me", "train": None}, CALLED, {**tool, "extra": 1}, A]
    check({"messages": row}, [U, CALLED, tool, A])
    check({"messages": [U, A, said("observation", "t"), A]}, [U, A, T, A])


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        *(
            ({"tools": tools}, [SCHEMA])
            for tools in ([SCHEMA], [SKY], [{"type": "function", **SKY}], json.dumps([SCHEMA]), json.dumps([SKY]))
        ),
        *(({"tools": tools}, None) for tools in (None, [], "", "[]")),
        *(({"tools": tools}, "'tools' must be a list of schemas") for tools in (1, 0, False, SCHEMA, "0")),
        ({"tools": "sky"}, "'tools': not JSON (Expecting value"),
        ({"tools": [{"name": "see"}], "messages": [U, CALLED]}, "calls 'sky', which is not among 'tools': see"),
        ({"tools": [SCHEMA, {"function": {"name": 1}}]}, "tool 2 must be a function with a 'name'"),
    ],
)
def test_tools(columns, expected):
    check({"messages": [U, A], **columns}, expected if isinstance(expected, str) else Chat([U, A], expected))


BEGIN = "from qlora_lightning.data.rows.content import Chat, Text, Tokens; return "


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return [{'role': 'user', 'content': row['q']}, {'role': 'assistant', 'content': 'a'}]", [U, A]),
        (f"{BEGIN}Text('a')", Text("a")),
        (f"{BEGIN}Chat({[U, A]}, [{SKY}])", Chat([U, A], [SCHEMA])),
        ("return row['question']", "cannot be read by the format rows_of_mine.convert: KeyError: 'question'"),
        ("return ('a',)", "message 1 is str, expected an object"),
        ("return None", "returned NoneType, expected a list of messages"),
        ("return {'messages': []}", "returned dict, expected a list of messages"),
    ],
)
def test_a_function_reads_any_row(body, expected, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rows_of_mine", raising=False)
    (tmp_path / "rows_of_mine.py").write_text(f"def convert(row):\n    {body}\n")
    row = {"q": "u", "label": False, "images": ["x"]}
    check(row, expected, format="rows_of_mine.convert", columns={"i": "no column of ours"})
    check(row, "cannot import 'rows_of_mine.convrt' (AttributeError", format="rows_of_mine.convrt")
    check(row, expected, format=importlib.import_module("rows_of_mine").convert)
