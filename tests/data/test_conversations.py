import pytest

from qlora_lightning.data.bad_rows import RowFault
from qlora_lightning.data.conversations import to_conversation
from qlora_lightning.data.formats import FORMATS, Format


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def convert(messages, **kwargs):
    return to_conversation({"messages": messages}, FORMATS["messages"], **kwargs)


U, A, S = ("user", "u"), ("assistant", "a"), ("system", "s")


def test_a_good_conversation_is_copied_with_role_and_content_only():
    given = turns(S, U, A)
    given[1]["weight"] = 1
    assert convert(given) == turns(S, U, A)


def test_the_system_prompt_goes_to_rows_without_one():
    assert convert(turns(U, A), system="mine") == turns(("system", "mine"), U, A)
    assert convert(turns(S, U, A), system="mine") == turns(S, U, A)


def test_rows_to_predict_may_end_with_the_user():
    assert convert(turns(U), needs_answer=False) == turns(U)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "found an empty list"),
        ("text", "found str"),
        (["text"], "message 1 must have 'role' and 'content', found str"),
        ([{"from": "human", "value": "x"}], "found from, value"),
        (turns(("tool", "x")), "has the role 'tool', expected system, user, assistant"),
        (turns(U, ("assistant", " \n")), "the answer .message 2. is empty"),
        (turns(U, ("assistant", None)), "the assistant content of message 2 must be a string, found null"),
        (turns(("user", "a\x00"), A), "NUL"),
        (turns(("user", "\ud83d"), A), "half a character"),
        (turns(U, S, A), "a system message must come first, found one as message 2"),
        (turns(S, A, U), "begins with an assistant turn"),
        (turns(S), "nothing but a system message"),
        (turns(U), "no assistant turn"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], "calls tools"),
    ],
)
def test_faults(messages, reason):
    with pytest.raises(RowFault, match=reason):
        convert(messages)


def test_missing_keys_name_the_format():
    with pytest.raises(RowFault, match=r"lacks 'output' of the format alpaca \(found instruction\)"):
        to_conversation({"instruction": "a"}, FORMATS["alpaca"])


def test_what_a_function_raises_is_the_reason():
    with pytest.raises(RowFault, match="format function mine raised KeyError: 'question'"):
        to_conversation({}, Format("mine", (), (), lambda row: row["question"]))
