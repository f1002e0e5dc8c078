import pytest

from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.formats import from_alpaca, from_messages, from_prompt_completion, from_question_answer

ASKED, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
RULE = {"role": "system", "content": "s"}


def refusal(convert, values):
    with pytest.raises(RowFault) as fault:
        convert(values)
    return str(fault.value)


def test_alpaca_joins_instruction_and_input_by_an_empty_line():
    assert from_alpaca({"instruction": "Add.", "input": "1, 2", "output": "3"}) == [
        {"role": "user", "content": "Add.\n\n1, 2"},
        {"role": "assistant", "content": "3"},
    ]


@pytest.mark.parametrize("extra", [{}, {"input": ""}, {"input": None}, {"system": ""}, {"history": []}])
def test_what_is_empty_adds_nothing_to_alpaca(extra):
    assert from_alpaca({"instruction": "q", "output": "a", **extra}) == [ASKED, SAID]


def test_alpaca_input_alone_is_the_prompt():
    assert from_alpaca({"instruction": "", "input": "q", "output": "a"}) == [ASKED, SAID]


def test_alpaca_history_becomes_earlier_turns_after_the_system_prompt():
    row = {
        "system": "Be brief.",
        "history": [["One?", "1."], ["Two?", "2."]],
        "instruction": "Three?",
        "input": "",
        "output": "3.",
    }
    assert from_alpaca(row) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2."},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "3."},
    ]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"instruction": None}, "'instruction' must be a string, found null"),
        ({"instruction": "q", "input": 0}, "'input' must be a string, found int"),
        ({"instruction": "q", "history": "x"}, "'history' must be a list of [question, answer] pairs, found str"),
        ({"instruction": "q", "history": [["a", "b"], "x"]}, "pairs, found str as pair 2"),
        ({"instruction": "q", "history": [["a"]]}, "pairs, found 1 values as pair 1"),
    ],
)
def test_wrong_types_of_alpaca(values, reason):
    assert reason in refusal(from_alpaca, {"output": "a", **values})


def test_messages_are_handed_on():
    assert from_messages({"messages": [RULE, ASKED, SAID]}) == [RULE, ASKED, SAID]


def test_prompt_and_completion_are_strings_or_messages():
    assert from_prompt_completion({"prompt": "q", "completion": "a"}) == [ASKED, SAID]
    assert from_prompt_completion({"prompt": [RULE, ASKED], "completion": [SAID]}) == [RULE, ASKED, SAID]
    earlier = from_prompt_completion({"prompt": [ASKED, SAID, ASKED], "completion": [SAID]})
    assert earlier == [ASKED, {**SAID, "train": False}, ASKED, SAID]  # the completion alone is trained


def test_prompt_and_completion_of_two_kinds_are_refused():
    reason = refusal(from_prompt_completion, {"prompt": "q", "completion": [SAID]})
    assert reason == "'prompt' and 'completion' must be two strings or two lists of messages, found str and list"


def test_question_and_answer():
    assert from_question_answer({"question": "q", "answer": "a"}) == [ASKED, SAID]


@pytest.mark.parametrize(
    ("convert", "values"),
    [
        (from_alpaca, {"instruction": "q"}),
        (from_messages, {"messages": [ASKED]}),
        (from_prompt_completion, {"prompt": "q"}),
        (from_prompt_completion, {"prompt": [ASKED]}),
        (from_question_answer, {"question": "q"}),
    ],
)
def test_a_row_without_answer_is_a_prompt_and_its_system_stands_first(convert, values):
    assert convert(values) == [ASKED]
    assert convert({**values, "system": "s"}) == [RULE, ASKED]


def test_two_system_prompts_are_refused():
    reason = refusal(from_messages, {"system": "s", "messages": [RULE, ASKED, SAID]})
    assert reason == "has a system message and the key 'system' as well: expected one of them"
