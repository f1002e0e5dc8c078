"""Rows as other people's data sets have them: read, or refused with a line that reads them when it is pasted."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.conversation import Chat, Text, Tokens
from qlora_lightning.data.rows.formats import RowConverter
from qlora_lightning.data.rows.readers import Row, read_rows
from qlora_lightning.data.rows.sources import RowSettings
from qlora_lightning.support.errors import UserError


def convert(values, needs_answer=True, **settings):
    converter, row = RowConverter(RowSettings(**settings), needs_answer), Row(values, "a.jsonl", 1)
    converter.check([row])
    return converter.convert(row)


def refusal(values, **options):
    with pytest.raises(UserError) as error:
        convert(values, **options)
    return str(error.value)


def says(content):
    return [(message["role"], message["content"]) for message in content.messages]


# Conversations

OPENAI = {  # of OpenAI's guide to fine-tuning with tools
    "messages": [
        {"role": "developer", "content": "You tell the weather."},
        {"role": "user", "content": [{"type": "text", "text": "Ulm and Rome?"}]},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": [
                {
                    "id": f"call_{at}",
                    "type": "function",
                    "function": {"name": "sky", "arguments": json.dumps({"at": at})},
                }
                for at in ("Ulm", "Rome")
            ],
        },
        {"role": "tool", "tool_call_id": "call_Ulm", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_Rome", "content": "sun"},
        {"role": "assistant", "content": "Rain and sun.", "weight": 1},
    ],
    "tools": [
        {"type": "function", "function": {"name": "sky", "parameters": {"type": "object", "properties": {"at": {}}}}}
    ],
    "parallel_tool_calls": True,
}


@pytest.mark.parametrize("row", [OPENAI, {key: json.dumps(value) for key, value in OPENAI.items()}])
def test_openai_files_with_tools_and_parallel_calls(row):
    content = convert(row)
    assert [role for role, _ in says(content)] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    calls = content.messages[2]["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == [{"at": "Ulm"}, {"at": "Rome"}]
    assert [message["tool_call_id"] for message in content.messages[3:5]] == [call["id"] for call in calls]
    assert content.tools == OPENAI["tools"]


GLAIVE = {  # of glaiveai/glaive-function-calling-v2
    "system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n{\n"
    '    "name": "get_exchange_rate",\n    "description": "Get the rate",\n    "parameters": {"type": "object"}\n}\n\n'
    '{\n    "name": "get_news",\n    "parameters": {}\n}\n',
    "chat": "USER: What is the rate from USD to EUR?\n\n\nASSISTANT: <functioncall> "
    '{"name": "get_exchange_rate", "arguments": \'{"from": "USD", "to": "EUR\\\'s"}\'} <|endoftext|>\n\n\n'
    'FUNCTION RESPONSE: {"rate": 0.85}\n\n\nASSISTANT: It is 0.85.\n\nAnything else? <|endoftext|>\n\n\n'
    "USER: No, thanks.\n\n\nASSISTANT: You're welcome! <|endoftext|>\n\n\n\n",
}


def test_glaive_function_calling():
    content = convert(GLAIVE)
    assert says(content) == [
        ("system", "You are a helpful assistant."),
        ("user", "What is the rate from USD to EUR?"),
        ("assistant", ""),
        ("tool", '{"rate": 0.85}'),
        ("assistant", "It is 0.85.\n\nAnything else?"),
        ("user", "No, thanks."),
        ("assistant", "You're welcome!"),
    ]
    function = {"name": "get_exchange_rate", "arguments": {"from": "USD", "to": "EUR's"}}
    assert content.messages[2]["tool_calls"] == [{"type": "function", "function": function}]
    assert [tool["function"]["name"] for tool in content.tools] == ["get_exchange_rate", "get_news"]
    plain = {**GLAIVE, "system": "SYSTEM: You are a helpful assistant, with no access to external functions.\n"}
    assert convert(plain).messages[0]["content"].endswith("with no access to external functions.")
    assert convert(plain).tools is None
    with pytest.raises(RowFault, match="the functions in 'system' are not JSON"):
        convert({**GLAIVE, "system": "SYSTEM: Use {these}"})


def test_llama_factory_tools_and_parts():
    row = {  # of its glaive_toolcall_en_demo.json, with a part as its mllm_demo.json has one
        "conversations": [
            {"from": "human", "value": [{"type": "text", "value": "Sunny?"}]},
            {"from": "function_call", "value": '{"name": "sky", "arguments": {"at": "Ulm"}}'},
            {"from": "observation", "value": '{"sun": 1}'},
            {"from": "gpt", "value": "It is."},
        ],
        "tools": '[{"name": "sky", "description": "Tells the weather.", "parameters": {"type": "object"}}]',
    }
    content = convert(row)
    assert says(content) == [("user", "Sunny?"), ("assistant", ""), ("tool", '{"sun": 1}'), ("assistant", "It is.")]
    call = {"type": "function", "function": {"name": "sky", "arguments": {"at": "Ulm"}}}
    assert content.messages[1]["tool_calls"] == [call]
    assert content.tools[0]["function"]["name"] == "sky"


def test_reasoning_of_an_answer():
    row = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "reasoning": "Hm.", "content": "4"}]}
    assert convert(row).messages[1] == {"role": "assistant", "content": "4", "reasoning_content": "Hm."}


def test_a_table_with_conversations_as_json_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text(
        'messages;weight\n"[{""role"": ""user"", ""content"": ""u""}, '
        '{""role"": ""assistant"", ""content"": ""a""}]";0,5\n'.replace("0,5", "0.5")
    )
    (row,) = read_rows("a.csv")
    content = convert(row.values)
    assert says(content) == [("user", "u"), ("assistant", "a")]
    assert content.weight == 0.5


# Text, segments, tokens


def test_raw_text_is_read_where_it_is_named():
    row = {"text": "### Human: Hi\n### Assistant: Hello", "url": "x"}
    assert "Raw text, every token of which is trained, is read by `format: text`" in refusal(row)
    assert convert(row, format="text") == Text(((row["text"], True),), whole=True)
    assert convert({"content": "A book."}, format="text", columns={"content": "text"}).segments == (("A book.", True),)
    for text in ("  ", 3, None):
        with pytest.raises(RowFault, match="'text'"):
            convert({"text": text}, format="text")
    assert "hold no prompt" in refusal(row, format="text", needs_answer=False)


def test_segments():
    ours = {"segments": [{"text": "Q: ", "train": False}, {"text": "A</s>", "train": True}]}
    axolotl = {"segments": [{"label": False, "text": "Q: "}, {"label": True, "text": "A</s>"}]}
    expected = Text((("Q: ", False), ("A</s>", True)), whole=False)
    for row in (ours, axolotl, {"segments": json.dumps(ours["segments"])}):
        assert convert(row) == expected
    for segments in ([], "x", [{"text": "a"}], [{"text": "a", "train": 1}], [{"text": 1, "train": True}], ["a"]):
        with pytest.raises(RowFault):
            convert({"segments": segments})


def test_tokens():
    row = {"input_ids": [1, 5, 6], "labels": [-100, 5, 6], "attention_mask": [1, 1, 1]}
    assert convert(row) == Tokens([1, 5, 6], [-100, 5, 6])
    assert convert({**row, "attention_mask": None, "weight": 0.5}) == Tokens([1, 5, 6], [-100, 5, 6], 0.5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention_mask": [1, 1, 0]}, "'attention_mask' has zeros: expected rows without padding"),
        ({"input_ids": [1, 5, -6]}, "'input_ids' must be a list of token ids, found [1, 5, -6]"),
        ({"input_ids": []}, "'input_ids' must be a list of token ids, found []"),
        ({"labels": [-100, 5.0, 6]}, "'labels' must be a list of token ids"),
    ],
)
def test_tokens_that_are_none(change, reason):
    with pytest.raises(RowFault, match=re.escape(reason)):
        convert({"input_ids": [1, 5, 6], "labels": [-100, 5, 6], **change})


# Shapes that are not guessed: the message has the line to paste


def paste(message):
    """Return the settings that a message offers."""
    (offer,) = re.findall(r"`(?:data\.)?(columns: \{[^`]*\})`[,?.]", message)
    return yaml.safe_load(offer)


@pytest.mark.parametrize(
    ("row", "line", "prompt"),
    [
        (  # databricks-dolly-15k
            {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada", "category": "closed_qa"},
            "columns: {context: input, response: output}",
            "Who?\n\nAda wrote it.",
        ),
        (  # MetaMathQA
            {"query": "Who?", "response": "Ada", "type": "GSM_Rephrased", "original_question": "Who?"},
            "columns: {query: instruction, response: output}",
            "Who?",
        ),
        (  # OpenOrca
            {"id": "1", "system_prompt": "Be brief.", "question": "Who?", "response": "Ada"},
            "columns: {question: instruction, response: output, system_prompt: system}",
            "Who?",
        ),
        ({"input": "Who?", "output": "Ada"}, "columns: {input: instruction}", "Who?"),
        ({"prompt": "Who?", "response": "Ada"}, "columns: {prompt: instruction, response: output}", "Who?"),
    ],
)
def test_a_row_of_other_names_is_refused_with_the_columns_that_read_it(row, line, prompt):
    message = refusal(row)
    assert line in message
    content = convert(row, **paste(message))
    assert says(content)[-2:] == [("user", prompt), ("assistant", "Ada")]


def test_squad_is_refused_with_a_function_that_reads_it(tmp_path, monkeypatch):
    row = {
        "id": "57",
        "title": "Notes",
        "context": "Ada wrote it.",
        "question": "Who?",
        "answers": {"text": ["Ada"], "answer_start": [0]},
    }
    message = refusal(row)
    assert "`format: squad.convert`, with a file squad.py" in message
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "squad", raising=False)
    Path("squad.py").write_text(message[message.index("def convert") : message.index(" Map other names")])
    assert says(convert(row, format="squad.convert")) == [("user", "Ada wrote it.\n\nWho?"), ("assistant", "Ada")]


# Other tasks

ASKED, SAID = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada"}


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "Who?", "chosen": "Ada", "rejected": "Bob"}, {"chosen": "completion"}),
        ({"instruction": "Who?", "input": "", "chosen": "Ada", "rejected": "Bob"}, {"chosen": "output"}),
        ({"prompt": "Who?", "chosen": [ASKED, SAID], "rejected": [ASKED, SAID]}, {"chosen": "messages"}),
        ({"prompt": [ASKED], "chosen": [SAID], "rejected": [SAID]}, {"chosen": "completion"}),
    ],
)
def test_preferences_are_refused_and_the_chosen_ones_can_be_trained(row, columns):
    assert refusal(row).startswith("a.jsonl:1 has 'rejected', so it is a preference row, which is no instruction")
    content = convert(row, columns={**columns, "rejected": None})
    assert says(content)[-2:] == [("user", "Who?"), ("assistant", "Ada")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Who?", "completion": "Ada", "label": True}, "says whether its answer is good"),
        ({"prompt": "Who?", "completion": "Ada", "label": "False"}, "says whether its answer is good"),  # of CSV
        ({"messages": [ASKED, SAID], "kto_tag": False}, "says whether its answer is good"),
        ({"messages": [ASKED, SAID], "images": ["a.png"]}, "but only text is read"),
        ({"messages": [ASKED, SAID], "image": {"bytes": b"x", "path": None}}, "but only text is read"),
    ],
)
def test_judged_rows_and_pictures_are_refused_and_the_column_can_be_left_out(row, said):
    assert said in refusal(row)
    left_out = dict.fromkeys(row.keys() & {"label", "kto_tag", "image", "images"})
    assert says(convert(row, columns=left_out)) == [("user", "Who?"), ("assistant", "Ada")]


def test_columns_of_other_tasks_that_hold_nothing_are_no_matter():
    nothing = {"images": [], "video": None, "label": "positive", "chosen": None, "rejected": ""}
    assert says(convert({"messages": [ASKED, SAID], **nothing})) == [("user", "Who?"), ("assistant", "Ada")]
    judged = {"prompt": "Who?", "completion": "Ada", "label": True}
    assert says(convert(judged, needs_answer=False)) == [("user", "Who?"), ("assistant", "Ada")]
    assert isinstance(convert({"messages": [ASKED, SAID]}), Chat)
