import pytest

from qlora_lightning.data.rows.formats import KEYS, choose_format
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.support.errors import UserError


def rows(*values):
    return [Row(value, "a.jsonl", line) for line, value in enumerate(values, start=1)]


def refusal(*values, name="auto"):
    with pytest.raises(UserError) as error:
        choose_format(rows(*values), name)
    return str(error.value)


def chosen(*values, **kwargs):
    return choose_format(rows(*values), "auto", **kwargs).name


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"instruction": "q", "output": "a"}, "alpaca"),
        ({"instruction": "q", "input": "", "output": "a", "system": "s", "history": []}, "alpaca"),
        ({"messages": [], "tools": []}, "messages"),
        ({"conversations": [], "system": "s", "tools": "[]"}, "sharegpt"),
        ({"prompt": "q", "completion": "a", "id": 7}, "prompt_completion"),
        ({"question": "q", "answer": "a"}, "question_answer"),
        ({"messages": [], "prompt": "q"}, "messages"),  # a prompt alone is no row to train on
    ],
)
def test_rows_are_recognised_by_their_keys(values, name):
    assert chosen(values) == name


def test_rows_without_a_shape_do_not_hide_the_others():
    assert chosen({"id": 7}, {"question": "q", "answer": "a"}) == "question_answer"


def test_a_name_is_taken_as_it_is():
    assert choose_format(rows({"id": 7}), "alpaca").name == "alpaca"


def test_rows_to_predict_may_lack_the_answer():
    assert chosen({"instruction": "a"}, needs_answer=False) == "alpaca"
    assert chosen({"question": "a"}, needs_answer=False) == "question_answer"
    assert chosen({"prompt": "a", "messages": []}, needs_answer=False) == "messages"  # by all keys, as in training


def test_ambiguous_keys_name_both_formats():
    message = refusal({"instruction": "a", "output": "b", "prompt": "a", "completion": "b"})
    assert message == "a.jsonl:1 fits more than one format, alpaca and prompt_completion: name one in `format:`."


def test_an_ambiguous_row_is_refused_wherever_it_stands():
    message = refusal({"messages": []}, {"messages": []}, {"messages": [], "conversations": []})
    assert message.startswith("a.jsonl:3 fits more than one format, messages and sharegpt")


def test_unrecognised_keys_name_found_expected_and_nearest():
    message = refusal({"instuction": "a", "output": "b"})
    assert "by the keys instuction, output" in message
    assert (
        "expected instruction + output (alpaca), messages (messages), conversations (sharegpt), "
        "prompt + completion (prompt_completion), question + answer (question_answer)."
    ) in message
    assert (
        "Did you mean 'instruction' by 'instuction'? Map other names with `columns: {their name: our name}`" in message
    )


def test_an_unknown_name_suggests_the_nearest():
    assert "found 'alpacca'. Did you mean 'alpaca'?" in refusal({}, name="alpacca")


def test_a_dotted_path_is_a_format_of_its_own():
    form = choose_format(rows({"m": 5}), "json.dumps")
    assert (form.name, form.keys(needs_answer=True), form.convert({"m": 5})) == ("json.dumps", (), '{"m": 5}')


def test_every_key_that_some_format_reads_is_known_once():
    names = "instruction output input history messages conversations prompt completion question answer system tools"
    assert list(KEYS) == names.split()
