import pytest

from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.formats import from_sharegpt


def turns(*pairs):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in pairs]}


def test_speakers_become_roles():
    assert from_sharegpt(turns(("system", "s"), ("human", "q"), ("gpt", "a"), ("user", "r"), ("assistant", "b"))) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "b"},
    ]


def test_the_system_of_the_row_stands_first():
    assert from_sharegpt({**turns(("human", "q")), "system": "s"}) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
    ]


@pytest.mark.parametrize("speaker", ["tool", "observation"])
def test_a_function_call_becomes_tool_calls_and_its_result_a_tool_message(speaker):
    row = turns(
        ("human", "Sunny?"), ("function_call", '{"name": "sky", "arguments": {"at": "Ulm"}}'), (speaker, '{"sun": 1}')
    )
    call = {"name": "sky", "arguments": {"at": "Ulm"}}
    messages = from_sharegpt(row)
    assert [(message["role"], message["content"]) for message in messages] == [
        ("user", "Sunny?"),
        ("assistant", ""),
        ("tool", '{"sun": 1}'),
    ]
    assert messages[1]["tool_calls"] == [call]


def test_several_calls_in_one_turn_and_a_call_that_is_no_string():
    calls = [{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}]
    assert from_sharegpt(turns(("function_call", calls)))[0]["tool_calls"] == calls
    assert from_sharegpt(turns(("function_call", calls[0])))[0]["tool_calls"] == calls[:1]


def test_marks_stay_on_the_message():
    row = {"conversations": [{"from": "gpt", "value": "a", "train": False}]}
    assert from_sharegpt(row)[0]["train"] is False


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": "x"}, "'conversations' must be a list of turns, found str"),
        ({"conversations": ["x"]}, "turn 1 must have 'from' and 'value', found str"),
        ({"conversations": [{"from": "gpt"}]}, "turn 1 must have 'from' and 'value', found from"),
        (
            {"conversations": [{"role": "user", "content": "x"}]},
            "found role, content: map the column with `columns: {conversations: messages}`",
        ),
        (turns(("human", "q"), ("bing", "a")), "turn 2 is from 'bing', expected human, user, gpt, assistant, system"),
        (turns((["human"], "q")), "turn 1 is from ['human'], expected human"),
        (turns(("function_call", "sky()")), "turn 1 (function_call): not JSON (Expecting value)"),
    ],
)
def test_faults(row, reason):
    with pytest.raises(RowFault) as fault:
        from_sharegpt(row)
    assert reason in str(fault.value)
