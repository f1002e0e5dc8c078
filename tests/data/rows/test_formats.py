"""From the columns of a row to what it becomes: by the row and the settings alone."""

import sys
from pathlib import Path

import pytest
import yaml

from qlora_lightning.data.rows.bad_rows import BadRow, RowFault, refuse
from qlora_lightning.data.rows.conversation import Chat, Text, Tokens
from qlora_lightning.data.rows.formats import RowConverter, check_columns, import_function
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.data.rows.sources import RowSettings
from qlora_lightning.support.errors import UserError

CALL = {"type": "function", "function": {"name": "sky", "arguments": {"at": "Ulm"}}}
U, A, S, T = ("user", "u"), ("assistant", "a"), ("system", "s"), ("tool", "t")
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def rows(*values):
    return [Row(value, "a.jsonl", line) for line, value in enumerate(values, start=1)]


def convert(values, needs_answer=True, **settings):
    return RowConverter(RowSettings(**settings), needs_answer).convert(Row(values, "a.jsonl", 1))


def fault(values, **options):
    with pytest.raises(RowFault) as error:
        convert(values, **options)
    return str(error.value)


def refusal(*values, needs_answer=True, **settings):
    """Return why a source is refused by its first rows."""
    converter = RowConverter(RowSettings(**settings), needs_answer)
    with pytest.raises(UserError) as error:
        converter.check(rows(*values))
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ({"instruction": "u", "output": "a"}, turns(U, A)),
        ({"instruction": "u", "input": "", "output": "a"}, turns(U, A)),
        ({"instruction": "u", "input": "more", "output": "a"}, turns(("user", "u\n\nmore"), A)),
        ({"instruction": "", "input": "u", "output": "a"}, turns(U, A)),
        ({"instruction": "u", "output": "a", "history": [["q", "r"]]}, turns(("user", "q"), ("assistant", "r"), U, A)),
        ({"instruction": "u", "output": "a", "system": "s"}, turns(S, U, A)),
        ({"messages": turns(S, U, A)}, turns(S, U, A)),
        ({"messages": turns(U, A), "system": "s", "prompt": "p"}, turns(S, U, A)),
        ({"messages": '[{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]'}, turns(U, A)),
        ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, turns(U, A)),
        ({"conversations": turns(U, A), "system": "s"}, turns(S, U, A)),
        ({"prompt": "u", "completion": "a", "id": 7}, turns(U, A)),
        ({"question": "u", "answer": "a"}, turns(U, A)),
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
    assert convert({"messages": [*turns(U), CALLING, *turns(T)]}, needs_answer=False).messages[-1]["role"] == "tool"


def test_the_system_prompt_goes_to_rows_without_one():
    assert convert({"messages": turns(U, A)}, system="mine") == Chat(turns(("system", "mine"), U, A))
    assert convert({"messages": turns(S, U, A)}, system="mine") == Chat(turns(S, U, A))
    assert convert({"messages": turns(U, A), "system": "s"}, system="mine") == Chat(turns(S, U, A))
    assert "a system message and the key 'system' as well" in fault({"messages": turns(S, U, A), "system": "s"})
    assert convert({"messages": turns(("developer", "s"), U, A)}, system="mine") == Chat(turns(S, U, A))


def test_roles_of_other_names_are_a_setting():
    row = {"messages": [{"role": "client", "content": "u"}, {"role": "agent", "content": "a"}]}
    assert convert(row, roles={"client": "user", "agent": "assistant"}) == Chat(turns(U, A))
    with pytest.raises(UserError, match=r"roles: 'agent' is 'asistant', expected .* Did you mean 'assistant'?"):
        RowConverter(RowSettings(roles={"agent": "asistant"}))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "expected a list of messages, found an empty list"),
        (7, "expected a list of messages, found int"),
        ("text", "'messages': not JSON (Expecting value"),
        (turns(U, S, A), "a system message must come first, found one as message 2"),
        (turns(S, A, U), "begins with an assistant turn"),
        (turns(S), "nothing but a system message"),
        (turns(U), "no assistant turn"),
        (turns(U, T, A), "message 2 is a tool's, but no assistant message that calls it stands before it"),
        (turns(T, A), "message 1 is a tool's"),
    ],
)
def test_conversations_that_are_none(messages, reason):
    assert reason in fault({"messages": messages})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"instruction": "u", "output": None}, "'output' is missing or null"),
        ({"instruction": "u", "output": "a", "input": 3}, "'input' must be a string, found int"),
        ({"instruction": "u", "output": "a", "history": ["q"]}, "'history' must be a list of [question, answer] pairs"),
        ({"prompt": "u", "completion": turns(A)}, "must be two strings or two lists of messages, found str and list"),
        ({"messages": turns(U, A), "tools": "sky"}, "'tools': not JSON (Expecting value"),
        ({"id": 7, "text": "x"}, "no format is recognised by its columns id, text"),
    ],
)
def test_rows_that_are_none(values, reason):
    assert reason in fault(values)


def test_a_named_format_says_what_a_row_lacks():
    said = "'output' is missing or null (format alpaca, columns instruction)"
    assert fault({"instruction": "u"}, format="alpaca") == said
    with pytest.raises(UserError, match=r"found 'alpacca'\. Did you mean 'alpaca'\?"):
        RowConverter(RowSettings("alpacca"))


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
    """Streaming, a resumed stream and a whole read see the same rows after other ones."""
    all_rows = rows(*MIXED)
    whole = RowConverter(RowSettings())
    whole.check(all_rows)
    expected = outcomes(whole, all_rows)
    assert [type(each) for each in expected] == [tuple, Chat, Chat, tuple, Chat, tuple]
    for begin in range(len(all_rows)):
        assert outcomes(RowConverter(RowSettings()), all_rows[begin:]) == expected[begin:]
        again = RowConverter(RowSettings())
        again.check(all_rows[1:2])
        assert outcomes(again, all_rows[begin:]) == expected[begin:]
    assert outcomes(RowConverter(RowSettings()), all_rows[::-1]) == expected[::-1]
    assert whole.formats == ["question_answer", "messages", "alpaca"]
    assert whole.unread_columns == ["note"]


def test_a_source_is_refused_if_none_of_its_first_rows_is_recognised():
    RowConverter(RowSettings()).check(rows({"id": 7}, {"question": "u", "answer": "a"}))
    message = refusal({"instuction": "a", "output": "b"})
    assert "a.jsonl:1: no format is recognised by the keys instuction, output; expected instruction + output" in message
    assert "Did you mean 'instruction' by 'instuction'?" in message


def test_a_row_of_two_formats_is_refused():
    with pytest.raises(UserError, match=r"a.jsonl:1 fits more than one format, alpaca and prompt_completion: name one"):
        convert({"instruction": "a", "output": "b", "prompt": "a", "completion": "b"})


# Columns


def test_columns_get_our_names_change_places_or_are_left_out():
    row = {"q": "u", "a": "a", "input": "no"}
    assert convert(row, columns={"q": "instruction", "a": "output", "input": None}) == Chat(turns(U, A))
    assert row == {"q": "u", "a": "a", "input": "no"}
    swapped = {"question": "a", "answer": "u"}
    assert convert(swapped, columns={"question": "answer", "answer": "question"}) == Chat(turns(U, A))


@pytest.mark.parametrize("row", [{"q": "u", "prompt": "p"}, {"prompt": "p", "q": "u"}])
def test_a_column_that_would_be_overwritten_is_refused(row):
    first, second = row
    reason = f"has {first!r} and {second!r}, which would both be 'prompt' by `columns:`"
    assert fault(row, columns={"q": "prompt"}) == reason


@pytest.mark.parametrize(
    ("columns", "values", "said"),
    [
        ({"q": "inptu"}, [{"q": "u"}], "Did you mean 'input'?"),
        ({"qestion": "prompt"}, [{"question": "u"}, {"answer": "a"}], "no row has 'qestion', found question, answer."),
        ({"lable": None}, [{"question": "q", "answer": "a", "label": 1}], "Did you mean 'label'?"),
    ],
)
def test_columns_that_make_no_sense(columns, values, said):
    with pytest.raises(UserError) as error:
        check_columns(rows(*values), columns)
    assert said in str(error.value)


def test_columns_may_be_for_other_sources_or_read_by_a_function():
    check_columns(rows({"question": "u", "answer": "a"}), {"query": "instruction", "response": "output"})
    check_columns(rows({"id": 7}, {"q": "u"}), {"q": "prompt"})
    check_columns(rows({"q": "u"}), {"q": "whatever"}, format="package.function")


# Weights


@pytest.mark.parametrize(("weight", "read"), [(0.5, 0.5), ("2", 2.0), (0, 0.0), (None, 1.0), ("", 1.0)])
def test_a_row_may_have_a_weight(weight, read):
    assert convert({"question": "u", "answer": "a", "weight": weight}) == Chat(turns(U, A), None, read)
    assert convert({"text": "x", "weight": weight}, format="text").weight == read


@pytest.mark.parametrize("weight", [-1, "70 kg", True, float("nan"), [1]])
def test_a_weight_that_is_none_is_refused(weight):
    message = fault({"question": "u", "answer": "a", "weight": weight})
    assert message.startswith("'weight' must be a number, at least 0, found ")
    left_out = yaml.safe_load(message.split("`")[1])
    assert convert({"question": "u", "answer": "a", "weight": weight}, **left_out) == Chat(turns(U, A))


# Functions


@pytest.fixture
def function(tmp_path, monkeypatch):
    """Write a format function and return its dotted path."""
    monkeypatch.chdir(tmp_path)

    def function(body, name="rows_of_mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        Path(f"{name}.py").write_text(f"def convert(row):\n    {body}\nnumber = 3\n")
        return f"{name}.convert"

    return function


def test_a_function_in_the_current_folder_reads_any_row(function):
    before = list(sys.path)
    path = function("return [{'role': 'user', 'content': row['q']}, {'role': 'assistant', 'content': 'a'}]")
    assert convert({"q": "u", "label": False, "images": ["x"], "weight": "x"}, format=path) == Chat(turns(U, A))
    assert sys.path == before
    for name, reason in {
        "rows_of_mine.convrt": "AttributeError: module 'rows_of_mine' has no attribute 'convrt'",
        "rows_of_mine.number": "is int, not a function",
        "no_such_module.convert": "cannot import 'no_such_module.convert': ModuleNotFoundError",
    }.items():
        with pytest.raises(UserError) as error:
            import_function(name)
        assert reason in str(error.value)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return row['question']", "format function rows_of_mine.convert raised KeyError: 'question'"),
        ("raise ValueError('two\\n lines ' + 'x' * 10_000)", "raised ValueError: two lines " + "x" * 290),
        ("return ('a',)", "expected a list of messages from the format function rows_of_mine.convert, found tuple"),
        ("return [{'role': 'user', 'content': 'u'}]", "no assistant turn, so there is nothing to train on"),
    ],
)
def test_what_a_function_does_wrong_is_the_reason(function, body, reason):
    message = fault({"q": "u"}, format=function(body))
    assert message.endswith(reason)


def test_a_function_may_return_text_tokens_or_a_chat_with_tools(function):
    begin = "from qlora_lightning.data.rows.conversation import Chat, Text, Tokens; return "
    text = Text((("a", True),), whole=False, weight=0.5)
    assert convert({}, format=function(f"{begin}Text((('a', True),), False, 0.5)")) == text
    assert convert({}, format=function(f"{begin}Tokens([1], [1])")) == Tokens([1], [1])
    chat = (
        f"{begin}Chat([{{'role': 'user', 'content': 'u'}}, {{'role': 'assistant', 'content': 'a'}}], [{{'name': 'f'}}])"
    )
    assert convert({}, format=function(chat)).tools == [{"type": "function", "function": {"name": "f"}}]


def test_twenty_bad_rows_are_listed_and_the_rest_counted():
    refuse([])
    with pytest.raises(UserError) as error:
        refuse([BadRow(f"a.jsonl:{line}", "empty") for line in range(1, 26)])
    lines = str(error.value).splitlines()
    assert lines[0] == "25 rows cannot be used:"
    assert lines[1] == "  a.jsonl:1: empty"
    assert lines[20:22] == ["  a.jsonl:20: empty", "  and 5 more"]
    assert "on_bad_row: skip" in lines[22]
