"""Single messages: what of them a chat template gets, and what is refused."""

import pytest

from qlora_lightning.data.rows.bad_rows import RowFault, check_characters
from qlora_lightning.data.rows.conversation import check_message

CALL = {"type": "function", "function": {"name": "sky", "arguments": {"at": "Ulm"}}}


def refusal(message):
    with pytest.raises(RowFault) as fault:
        check_message(message, 2)
    return str(fault.value)


def answer(**options):
    return {"role": "assistant", "content": "a", **options}


def part(text, **options):
    return {"type": "text", "text": text, **options}


def test_only_keys_that_a_template_may_need_are_kept():
    assert check_message({"role": "user", "content": "q", "id": 7, "name": "me", "train": None}, 1) == {
        "role": "user",
        "content": "q",
    }
    nothing = {"refusal": None, "tool_calls": None, "function_call": None, "weight": None, "reasoning_content": ""}
    assert check_message(answer(**nothing), 2) == answer()


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
    assert check_message({"role": speaker, "content": "x"}, 1) == {"role": role, "content": "x"}
    assert check_message({"from": speaker, "value": "x"}, 1) == {"role": role, "content": "x"}


def test_parts_are_joined_whoever_wrote_them():
    openai, llama_factory = [part("one "), part("two")], [{"type": "text", "value": "one two"}]
    for parts in (openai, llama_factory):
        assert check_message({"role": "user", "content": parts}, 1) == {"role": "user", "content": "one two"}


def test_parts_that_are_not_trained_are_stretches_of_characters():
    parts = [part("é1 ", train=False), part("two ", train=True), part(""), part("3", train=False), part("4")]
    checked = check_message(answer(content=parts), 2)
    assert checked == answer(content="é1 two 34", untrained=[(0, 3), (7, 8)])
    text = checked["content"]
    assert [text[start:end] for start, end in checked["untrained"]] == ["é1 ", "3"]
    assert check_message({"role": "user", "content": parts[:1]}, 1) == {"role": "user", "content": "é1 "}
    wholly = check_message(answer(content=[part("a", train=False), part("b", train=False)]), 2)
    assert wholly["train"] is False
    assert "train" in refusal({"role": "user", "content": parts})
    assert "expected true or false" in refusal(answer(content=[part("a", train="no")]))


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}, {"weight": 0.0}, {"train": False, "weight": 0}])
def test_an_answer_that_is_not_trained_is_marked(mark):
    assert check_message(answer(**mark), 2) == answer(train=False)
    assert check_message({"from": "gpt", "value": "a", **mark}, 2) == answer(train=False)
    assert check_message(answer(**{key: type(value)(1) for key, value in mark.items()}), 2) == answer()


@pytest.mark.parametrize("role", ["system", "user"])
def test_only_answers_are_trained(role):
    message = {"role": role, "content": "q"}
    assert check_message({**message, "train": False}, 2) == message
    assert check_message({**message, "weight": 0}, 2) == message
    assert refusal({**message, "train": True}) == f"message 2 ({role}) has train: True, but only answers are trained"
    assert refusal({**message, "weight": 1}) == f"message 2 ({role}) has weight: 1, but only answers are trained"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_what_an_assistant_thinks_has_one_name(key):
    assert check_message(answer(**{key: "Hm."}), 2) == answer(reasoning_content="Hm.")
    assert "which only an assistant has" in refusal({"role": "user", "content": "q", key: "Hm."})
    assert "must be a string, found list" in refusal(answer(**{key: ["Hm."]}))
    assert check_message(answer(**{key: "Hm.", "reasoning": "Hm."}), 2) == answer(reasoning_content="Hm.")
    if key != "reasoning":
        assert "differ: keep one" in refusal(answer(**{key: "Hm.", "reasoning": "Oh."}))


def test_an_assistant_that_calls_tools_may_say_nothing():
    expected = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    function = {"name": "sky", "arguments": '{"at": "Ulm"}'}
    assert check_message({"role": "assistant", "tool_calls": [CALL]}, 2) == expected
    assert check_message({"role": "assistant", "content": None, "tool_calls": [CALL]}, 2) == expected
    assert check_message({"role": "assistant", "content": None, "function_call": function}, 2) == expected
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
        ({"role": "oracle", "content": "x"}, "message 2 has the role 'oracle', expected system, user, assistant, tool"),
        ({"role": ["user"], "content": "x"}, "message 2 has the role ['user'], expected"),
        ({"role": "user", "content": None}, "the user content of message 2 must be a string, found null"),
        ({"role": "tool", "content": {"sun": 1}}, "the tool content of message 2 must be a string, found dict"),
        ({"role": "user", "content": []}, "the user content of message 2 must be a string, found an empty list"),
        (answer(content=" \n"), "the answer (message 2) is empty"),
        (answer(content="", tool_calls=[]), "the answer (message 2) is empty"),
        (answer(content="", reasoning="Hm."), "the answer (message 2) is empty"),
        (answer(content="a\x00"), "message 2 contains a NUL character"),
        (answer(content="\ud83d"), "message 2 contains half a character"),
        ({"role": "user", "content": ["x"]}, "of message 2 is str, expected 'text': only text is read"),
        ({"role": "user", "content": [part("x"), {"type": "image_url"}]}, "is 'image_url', expected 'text'"),
        ({"role": "user", "content": [{"type": "text"}]}, "of message 2 must be a string, found null"),
        ({"role": "user", "content": "q", "images": ["a"]}, "message 2 has 'images', which is not read: only text is"),
        (answer(mask=True), "message 2 has 'mask', which is not read: write `train: false`"),
        (answer(train="no"), "'train' of message 2 must be true or false, found 'no'"),
        (answer(train=0), "'train' of message 2 must be true or false, found 0"),
        (answer(weight=0.5), "'weight' of message 2 must be 0 or 1, found 0.5"),
        (answer(train=True, weight=0), "'train' and 'weight' of message 2 contradict each other"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "(user) has 'tool_calls', which only an assistant"),
        ({"role": "assistant", "tool_calls": ["sky"]}, "tool call 1 of message 2 must be an object, found str"),
        ({"role": "tool", "content": "x", "name": 1}, "'name' of message 2 must be a string, found int"),
        ({"from": "function_call", "value": "sky()"}, "message 2 (function_call): not JSON (Expecting value"),
    ],
)
def test_faults(message, reason):
    assert reason in refusal(message)


@pytest.mark.parametrize("place", [lambda text: text, lambda text: {"k": [text]}, lambda text: {text: 1}])
def test_nul_and_half_a_character_are_refused_wherever_they_are(place):
    check_characters(place("é 😀 \u2028"), "it")
    with pytest.raises(RowFault, match=r"^it contains a NUL character$"):
        check_characters(place("a\x00b"), "it")
    with pytest.raises(RowFault, match=r"^it contains half a character \(a lone surrogate"):
        check_characters(place("a\ud83d"), "it")
