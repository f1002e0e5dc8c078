import pytest

from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.conversation import check_message, without_marks

CALL = {"type": "function", "function": {"name": "sky", "arguments": {"at": "Ulm"}}}


def refusal(message):
    with pytest.raises(RowFault) as fault:
        check_message(message, 2)
    return str(fault.value)


def answer(**options):
    return {"role": "assistant", "content": "a", **options}


def test_only_keys_that_a_template_may_need_are_kept():
    assert check_message({"role": "user", "content": "q", "id": 7, "name": "me", "train": None}, 1) == {
        "role": "user",
        "content": "q",
    }
    assert check_message(answer(refusal=None, tool_calls=None, function_call=None, weight=None), 2) == answer()


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert check_message({"role": "user", "content": parts}, 1) == {"role": "user", "content": "one two"}


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}, {"weight": 0.0}, {"train": False, "weight": 0}])
def test_an_answer_that_is_not_trained_is_marked(mark):
    assert check_message(answer(**mark), 2) == {"role": "assistant", "content": "a", "train": False}


@pytest.mark.parametrize("mark", [{"train": True}, {"weight": 1}, {"train": True, "weight": 1}])
def test_an_answer_that_is_trained_needs_no_mark(mark):
    assert check_message(answer(**mark), 2) == answer()


@pytest.mark.parametrize("role", ["system", "user"])
def test_only_answers_are_trained(role):
    message = {"role": role, "content": "q"}
    assert check_message({**message, "train": False}, 2) == message
    assert check_message({**message, "weight": 0}, 2) == message
    assert refusal({**message, "train": True}) == f"message 2 ({role}) has 'train: true', but only answers are trained"
    assert refusal({**message, "weight": 1}) == f"message 2 ({role}) has 'weight: 1', but only answers are trained"


def test_an_assistant_that_calls_tools_may_say_nothing():
    expected = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert check_message({"role": "assistant", "tool_calls": [CALL]}, 2) == expected
    assert check_message({"role": "assistant", "content": None, "tool_calls": [CALL]}, 2) == expected
    assert check_message(answer(tool_calls=[CALL]), 2) == answer(tool_calls=[CALL])


def test_a_tool_keeps_its_name_and_the_id_of_the_call():
    message = {"role": "tool", "content": "", "name": "sky", "tool_call_id": "c1"}
    assert check_message({**message, "extra": 1}, 3) == message
    assert check_message({"role": "tool", "content": "sun", "name": None}, 3) == {"role": "tool", "content": "sun"}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("text", "message 2 must have 'role' and 'content', found str"),
        ({"role": "user"}, "message 2 must have 'role' and 'content', found role"),
        ({"from": "human", "value": "x"}, "found from, value: these are turns of ShareGPT, which stand under"),
        ({"role": "bot", "content": "x"}, "message 2 has the role 'bot', expected system, user, assistant, tool"),
        ({"role": ["user"], "content": "x"}, "message 2 has the role ['user'], expected"),
        ({"role": "user", "content": None}, "the user content of message 2 must be a string, found null"),
        ({"role": "tool", "content": {"sun": 1}}, "the tool content of message 2 must be a string, found dict"),
        ({"role": "user", "content": []}, "the user content of message 2 must be a string, found an empty list"),
        (answer(content=" \n"), "the answer (message 2) is empty"),
        (answer(content="", tool_calls=[]), "the answer (message 2) is empty"),
        (answer(content="a\x00"), "message 2 contains a NUL character"),
        (answer(content="\ud83d"), "message 2 contains half a character"),
        ({"role": "user", "content": ["x"]}, "part 1 of message 2 is str, expected 'text': only text is read"),
        (
            {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]},
            "part 2 of message 2 is 'image_url', expected 'text': only text is read",
        ),
        (
            {"role": "user", "content": [{"type": "text"}]},
            "the text of part 1 of message 2 must be a string, found null",
        ),
        (answer(train="no"), "'train' of message 2 must be true or false, found 'no'"),
        (answer(train=0), "'train' of message 2 must be true or false, found 0"),
        (answer(weight=0.5), "'weight' of message 2 must be 0 or 1, found 0.5"),
        (answer(weight=True), "'weight' of message 2 must be 0 or 1, found True"),
        (answer(train=True, weight=0), "'train' and 'weight' of message 2 contradict each other"),
        (
            {"role": "user", "content": "x", "tool_calls": [CALL]},
            "message 2 (user) has 'tool_calls', which only an assistant makes",
        ),
        ({"role": "assistant", "tool_calls": ["sky"]}, "tool call 1 of message 2 must be an object, found str"),
        ({"role": "tool", "content": "x", "name": 1}, "'name' of message 2 must be a string, found int"),
        (answer(function_call={"name": "sky"}), "message 2 has 'function_call', which is not read: write it as"),
        (answer(reasoning_content="hm"), "message 2 has 'reasoning_content', which is not read: write it into"),
    ],
)
def test_faults(message, reason):
    assert reason in refusal(message)


def test_templates_never_see_the_mark():
    marked = answer(train=False, tool_calls=[CALL])
    assert without_marks([{"role": "user", "content": "q"}, marked]) == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "tool_calls": [CALL]},
    ]
    assert marked["train"] is False
