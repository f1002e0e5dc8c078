import pytest

from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.formats import check_columns, rename_columns
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.support.errors import UserError


def rows(*values):
    return [Row(value, "a.jsonl", line) for line, value in enumerate(values, start=1)]


def refusal(columns, *values, **kwargs):
    with pytest.raises(UserError) as error:
        check_columns(rows(*values), columns, **kwargs)
    return str(error.value)


def test_columns_get_our_names_and_others_stay():
    row = {"question": "q", "id": 7, "reply": "a"}
    assert rename_columns(row, {"question": "prompt", "reply": "completion"}) == {
        "prompt": "q",
        "id": 7,
        "completion": "a",
    }
    assert row == {"question": "q", "id": 7, "reply": "a"}


def test_columns_mapped_to_null_are_left_out():
    row = {"question": "q", "label": True, "prompt": "p"}
    assert rename_columns(row, {"question": "prompt", "label": None, "prompt": None}) == {"prompt": "q"}
    check_columns(rows(row), {"label": None, "prompt": None})
    assert refusal({"lable": None}, row).endswith("Did you mean 'label'?")


def test_a_row_without_the_column_stays_and_two_columns_may_change_places():
    assert rename_columns({"id": 7}, {"question": "prompt"}) == {"id": 7}
    assert rename_columns({"question": "a", "answer": "q"}, {"question": "answer", "answer": "question"}) == {
        "answer": "a",
        "question": "q",
    }


@pytest.mark.parametrize("row", [{"question": "q", "prompt": "p"}, {"prompt": "p", "question": "q"}])
def test_a_column_that_would_be_overwritten_is_refused(row):
    first, second = row
    reason = f"has {first!r} and {second!r}, which would both be 'prompt' by `columns:`"
    with pytest.raises(RowFault) as fault:
        rename_columns(row, {"question": "prompt"})
    assert str(fault.value) == reason
    assert refusal({"question": "prompt"}, {"question": "q"}, row) == f"columns: a.jsonl:2 {reason}."


def test_a_column_that_any_row_has_is_accepted():
    check_columns(rows({"id": 7}, {"question": "q"}), {"question": "prompt"})
    check_columns(rows({"id": 7}), {})


def test_a_column_that_no_row_has_names_the_nearest():
    assert refusal({"qestion": "prompt"}, {"question": "q"}, {"answer": "a"}) == (
        "columns: no row has 'qestion', found question, answer. Did you mean 'question'?"
    )


def test_two_columns_with_one_name_are_refused():
    assert refusal({"question": "prompt", "query": "prompt"}, {"question": "q"}) == (
        "columns: 'question' and 'query' are both mapped to 'prompt': keep one of them."
    )


def test_a_name_that_is_read_nowhere_is_refused_unless_a_function_reads_the_rows():
    assert refusal({"context": "inptu"}, {"context": "c"}).endswith("Did you mean 'input'?")
    check_columns(rows({"context": "c"}), {"context": "inptu"}, format="package.function")


@pytest.mark.parametrize("columns", [["question"], {"question": 1}, {1: "prompt"}])
def test_what_is_no_mapping_of_names_is_refused(columns):
    assert refusal(columns, {"question": "q"}).startswith("columns: expected {their name: our name}, found ")
