"""From the columns of a row to what it becomes: by the row and the settings alone; rows as other people have them."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.conversation import Chat, Text, Tokens
from qlora_lightning.data.rows.formats import RowConverter
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.data.rows.sources import RowSettings
from qlora_lightning.support.errors import UserError

U, A, S, T = ("user", "u"), ("assistant", "a"), ("system", "s"), ("tool", "t")


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def rows(*values):
    return [Row(value, "a.jsonl", line) for line, value in enumerate(values, start=1)]


def convert(values, needs_answer=True, **settings):
    converter, (row,) = RowConverter(RowSettings(**settings), needs_answer), rows(values)
    converter.check([row])
    return converter.convert(row)


def refusal(values, **options):
    with pytest.raises(UserError) as error:
        convert(values, **options)
    return str(error.value)


def says(content):
    return [(message["role"], message["content"]) for message in content.messages]


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ({"instruction": "u", "output": "a"}, turns(U, A)),
        ({"instruction": "u", "input": "more", "output": "a"}, turns(("user", "u\n\nmore"), A)),
        ({"instruction": "u", "output": "a", "history": [["q", "r"]]}, turns(("user", "q"), ("assistant", "r"), U, A)),
        ({"instruction": "u", "output": "a", "history": '[["u", "a"]]'}, turns(U, A, U, A)),
        ({"instruction": "u", "output": "a", "system": "s"}, turns(S, U, A)),
        ({"messages": turns(U, A), "system": "s", "prompt": "p"}, turns(S, U, A)),
        ({"messages": '[{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]'}, turns(U, A)),
        ({"conversations": turns(U, A), "system": "s"}, turns(S, U, A)),
    ],
)
def test_rows_are_recognised_by_their_columns(values, messages):
    assert convert(values) == Chat(messages)


def test_of_a_prompt_that_is_a_conversation_only_the_completion_is_trained():
    first, *rest = convert({"prompt": turns(U, A, U), "completion": turns(A)}).messages
    assert first == {"role": "user", "content": "u"}
    assert rest == [{"role": "assistant", "content": "a", "train": False}, *turns(U, A)]


def test_rows_to_predict_may_lack_the_answer():
    for values in ({"instruction": "u"}, {"question": "u"}, {"prompt": "u"}, {"messages": turns(U)}):
        assert convert(values, needs_answer=False) == Chat(turns(U))
    assert convert({"prompt": "a", "messages": turns(U, A)}, needs_answer=False) == Chat(turns(U, A))
    assert "hold no prompt" in refusal({"text": "x"}, format="text", needs_answer=False)


def test_the_system_prompt_goes_to_rows_without_one():
    assert convert({"messages": turns(U, A)}, system="mine") == Chat(turns(("system", "mine"), U, A))
    assert convert({"messages": turns(U, A), "system": "s"}, system="mine") == Chat(turns(S, U, A))
    assert "a system message and the key 'system' as well" in refusal({"messages": turns(S, U, A), "system": "s"})
    assert convert({"messages": turns(("developer", "s"), U, A)}, system="mine") == Chat(turns(S, U, A))


def test_roles_of_other_names_are_a_setting():
    row = {"messages": turns(("client", "u"), ("agent", "a"))}
    assert convert(row, roles={"client": "user", "agent": "assistant"}) == Chat(turns(U, A))
    with pytest.raises(UserError, match=r"roles: .* found 'asistant'. Did you mean 'assistant'?"):
        RowConverter(RowSettings(roles={"agent": "asistant"}))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"messages": "text"}, "'messages': not JSON (Expecting value"),
        ({"messages": turns(U, S, A)}, "a system message must come first"),
        ({"messages": turns(S)}, "must begin with a user turn, found none"),
        ({"messages": turns(U, T, A)}, "no assistant message that calls the tool is before it"),
        ({"instruction": "u", "output": "a", "input": 3}, "'input' must be a string, found int"),
        ({"instruction": "u", "output": "a", "history": ["q"]}, "'history' must be a list of [question, answer] pairs"),
        ({"prompt": "u", "completion": turns(A)}, "part 1 of message 2 is"),
    ],
)
def test_rows_that_are_none(values, reason):
    with pytest.raises(RowFault, match=re.escape(reason)):
        convert(values)


# What becomes of a row follows from it alone

MIXED = [
    {"id": 7},
    {"question": "u", "answer": "a"},
    {"messages": turns(U, A), "note": 1},
    {"question": "u"},
    {"instruction": "u", "output": "a"},
    {"messages": turns(U)},
]


def outcomes(converter, some):
    found = []
    for row in some:
        try:
            found.append(converter.convert(row))
        except UserError as error:
            found.append((type(error), str(error)))
    return found


def test_what_becomes_of_a_row_does_not_depend_on_the_rows_before_it():
    all_rows = rows(*MIXED)
    whole = RowConverter(RowSettings())
    whole.check(all_rows)
    expected = outcomes(whole, all_rows)
    assert [type(each) for each in expected] == [tuple, Chat, Chat, tuple, Chat, tuple]
    for begin in range(len(all_rows)):
        assert outcomes(RowConverter(RowSettings()), all_rows[begin:]) == expected[begin:]
    assert outcomes(RowConverter(RowSettings()), all_rows[::-1]) == expected[::-1]
    assert whole.formats == ["question_answer", "messages", "alpaca"]
    assert whole.unread_columns == ["note"]


def test_a_row_that_fits_no_format_or_two_is_refused_and_a_named_format_reports_what_it_lacks():
    message = refusal({"instuction": "a", "output": "b"})
    assert "a.jsonl:1: no format is recognised by the keys instuction, output; expected instruction + output" in message
    assert "Did you mean 'instruction' by 'instuction'?" in message
    with pytest.raises(RowFault, match="'output' is missing or null"):
        RowConverter(RowSettings()).convert(*rows({"instruction": "a", "respose": "b"}))
    both = {"instruction": "a", "output": "b", "prompt": "a", "completion": "b"}
    assert "a.jsonl:1 fits more than one format, alpaca and prompt_completion: name one" in refusal(both)
    assert convert(both, format="alpaca") == Chat(turns(("user", "a"), ("assistant", "b")))
    lacking = refusal({"instruction": "u"}, format="alpaca")
    assert lacking == "'output' is missing or null (format alpaca, columns instruction)"
    with pytest.raises(UserError, match=r"found 'alpacca'\. Did you mean 'alpaca'\?"):
        RowConverter(RowSettings("alpacca"))


# Columns


def test_columns_get_our_names_change_places_or_are_left_out():
    row = {"q": "u", "a": "a", "input": "no"}
    assert convert(row, columns={"q": "instruction", "a": "output", "input": None}) == Chat(turns(U, A))
    swapped = {"question": "a", "answer": "u"}
    assert convert(swapped, columns={"question": "answer", "answer": "question"}) == Chat(turns(U, A))
    others = {"query": "instruction", "questions": "question"}  # for other sources
    assert convert({"question": "u", "answer": "a"}, columns=others) == Chat(turns(U, A))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"question": "inptu"}, "columns: no format reads 'inptu'; expected instruction, output, "),
        (
            {"qestion": "prompt"},
            "columns: no row has 'qestion', found question, answer, label. Did you mean 'question'",
        ),
        ({"question": "answer"}, "a.jsonl:1: `columns:` gives two of question, answer, label the same name."),
    ],
)
def test_columns_that_make_no_sense(columns, said):
    assert said in refusal({"question": "u", "answer": "a", "label": 1}, columns=columns)


# Functions


@pytest.fixture
def function(tmp_path, monkeypatch):
    """Write a format function and return its dotted path."""
    monkeypatch.chdir(tmp_path)

    def function(body, name="rows_of_mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        Path(f"{name}.py").write_text(f"def convert(row):\n    {body}\n")
        return f"{name}.convert"

    return function


def test_a_function_in_the_current_folder_reads_any_row(function):
    before = list(sys.path)
    path = function("return [{'role': 'user', 'content': row['q']}, {'role': 'assistant', 'content': 'a'}]")
    row = {"q": "u", "label": False, "images": ["x"]}
    assert convert(row, format=path, columns={"i": "no column of ours"}) == Chat(turns(U, A))
    assert sys.path == before
    with pytest.raises(UserError, match=r"cannot import 'rows_of_mine.convrt': AttributeError"):
        RowConverter(RowSettings("rows_of_mine.convrt"))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return row['question']", "cannot be read by the format rows_of_mine.convert: KeyError: 'question'"),
        ("return ('a',)", "expected a list of messages by the format rows_of_mine.convert, found ('a',)"),
        ("return [{'role': 'user', 'content': 'u'}]", "no assistant turn, so there is nothing to train on"),
    ],
)
def test_what_a_function_does_wrong_is_the_reason(function, body, reason):
    assert refusal({"q": "u"}, format=function(body)).endswith(reason)


def test_a_function_may_return_text_tokens_or_a_chat_with_tools(function):
    begin = "from qlora_lightning.data.rows.conversation import Chat, Text, Tokens; return "
    assert convert({}, format=function(f"{begin}Text('a')")) == Text("a")
    assert convert({}, format=function(f"{begin}Tokens([1], [1])")) == Tokens([1], [1])
    chat = f"{begin}Chat({turns(U, A)}, [{{'name': 'f'}}])"
    assert convert({}, format=function(chat)).tools == [{"type": "function", "function": {"name": "f"}}]


# Rows as other people's data sets have them


def called(at):
    return {"id": at, "type": "function", "function": {"name": "sky", "arguments": json.dumps({"at": at})}}


OPENAI = {  # of OpenAI's guide to fine-tuning with tools
    "messages": [
        {"role": "developer", "content": "You tell the weather."},
        {"role": "user", "content": [{"type": "text", "text": "Ulm and Rome?"}]},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [called("Ulm"), called("Rome")]},
        {"role": "tool", "tool_call_id": "Ulm", "content": "rain"},
        {"role": "tool", "tool_call_id": "Rome", "content": "sun"},
        {"role": "assistant", "content": "Rain and sun.", "weight": 1},
    ],
    "tools": [{"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}}],
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


def test_raw_text_is_read_where_it_is_named():
    row = {"text": "### Human: Hi\n### Assistant: Hello", "url": "x"}
    assert "Raw text, every token of which is trained, is read by `format: text`" in refusal(row)
    assert convert(row, format="text") == Text(row["text"])
    assert convert({"content": "A book."}, format="text", columns={"content": "text"}) == Text("A book.")
    for text in ("  ", 3, None):
        assert "'text'" in refusal({"text": text}, format="text")


def test_tokens():
    row = {"input_ids": [1, 5, 6], "labels": [-100, 5, 6], "attention_mask": [1, 1, 1]}
    assert convert(row) == Tokens([1, 5, 6], [-100, 5, 6])
    assert convert({**row, "attention_mask": None}) == Tokens([1, 5, 6], [-100, 5, 6])
    for key, value in {"attention_mask": [1, 1, 0], "input_ids": [1, 5, -6], "labels": [-100, 5.0, 6]}.items():
        with pytest.raises(RowFault, match=key):
            convert({**row, key: value})
    with pytest.raises(RowFault, match="'input_ids' must be a list of token ids"):
        convert({**row, "input_ids": []})


# Shapes that are not guessed: the message has the line to paste


def test_a_row_of_other_names_is_refused_with_the_columns_that_read_it():
    row = {"id": "1", "system_prompt": "Be brief.", "question": "Who?", "response": "Ada"}  # OpenOrca
    line = "columns: {question: instruction, response: output, system_prompt: system}"
    assert f"`{line}`" in refusal(row)
    found = says(convert(row, **yaml.safe_load(line)))
    assert found == [("system", "Be brief."), ("user", "Who?"), ("assistant", "Ada")]
