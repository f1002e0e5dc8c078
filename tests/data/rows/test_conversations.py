import pytest

from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.formats import FORMATS, Format, to_conversation

CALL = {"type": "function", "function": {"name": "sky", "arguments": {"at": "Ulm"}}}


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def convert(messages, **kwargs):
    return to_conversation({"messages": messages}, FORMATS["messages"], **kwargs)


def call_function(function):
    return to_conversation({}, Format("mine", (), (), function))


U, A, S, T = ("user", "u"), ("assistant", "a"), ("system", "s"), ("tool", "t")
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_a_good_conversation_is_copied_with_the_keys_that_matter():
    given = turns(S, U, A)
    given[1]["id"] = 1
    assert convert(given) == turns(S, U, A)


def test_the_system_prompt_goes_to_rows_without_one():
    assert convert(turns(U, A), system="mine") == turns(("system", "mine"), U, A)
    assert convert(turns(S, U, A), system="mine") == turns(S, U, A)


def test_a_sharegpt_row_with_tools_from_its_keys_to_its_messages():
    row = {
        "system": "s",
        "conversations": [
            {"from": "human", "value": "Sunny?"},
            {"from": "function_call", "value": '{"name": "sky", "arguments": {"at": "Ulm"}}'},
            {"from": "observation", "value": "yes"},
            {"from": "gpt", "value": "It is."},
        ],
    }
    assert to_conversation(row, FORMATS["sharegpt"]) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "Sunny?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "yes"},
        {"role": "assistant", "content": "It is."},
    ]


def test_several_tools_may_answer_one_after_another():
    messages = [*turns(U), CALLING, *turns(T, T, A)]
    assert convert(messages) == messages


def test_two_messages_of_one_role_are_left_to_the_template():
    assert convert(turns(U, U, A, A)) == turns(U, U, A, A)


def test_a_conversation_without_trained_answer_is_one_all_the_same():
    messages = [*turns(U), {"role": "assistant", "content": "a", "train": False}]
    assert convert(messages) == messages


@pytest.mark.parametrize("messages", [turns(U), [*turns(U), CALLING, *turns(T)], turns(S, U, A)])
def test_rows_to_predict_may_end_with_anybody_but_the_system(messages):
    assert convert(messages, needs_answer=False) == messages


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "expected a list of messages, found an empty list"),
        ("text", "expected a list of messages, found str"),
        (["text"], "message 1 must have 'role' and 'content', found str"),
        (turns(U, ("assistant", " \n")), r"the answer \(message 2\) is empty"),
        (turns(U, S, A), "a system message must come first, found one as message 2"),
        (turns(S, A, U), "begins with an assistant turn"),
        (turns(S), "nothing but a system message"),
        (turns(U), "no assistant turn"),
        (turns(U, T, A), "message 2 is a tool's, but no assistant message that calls it stands before it"),
        (turns(T, A), "message 1 is a tool's"),
    ],
)
def test_faults(messages, reason):
    with pytest.raises(RowFault, match=reason):
        convert(messages)


def test_missing_keys_name_the_format():
    with pytest.raises(RowFault, match=r"lacks 'output' of the format alpaca \(found instruction\)"):
        to_conversation({"instruction": "a"}, FORMATS["alpaca"])


def test_what_a_function_returns_is_checked_like_any_row():
    assert call_function(lambda row: turns(U, A)) == turns(U, A)
    with pytest.raises(RowFault, match="no assistant turn"):
        call_function(lambda row: turns(U))
    with pytest.raises(RowFault, match="expected a list of messages from the format function mine, found tuple"):
        call_function(lambda row: tuple(turns(U, A)))


def test_what_a_function_raises_is_the_reason():
    with pytest.raises(RowFault, match=r"^format function mine raised KeyError: 'question'$"):
        call_function(lambda row: row["question"])
    with pytest.raises(RowFault, match=r"^format function mine raised NotImplementedError$"):
        call_function(_raise(NotImplementedError()))
    with pytest.raises(RowFault, match=r"^format function mine raised ValueError: two lines x{290}$"):
        call_function(_raise(ValueError("two\n lines " + "x" * 10_000)))


def _raise(error):
    def function(row):
        raise error

    return function
