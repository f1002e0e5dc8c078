import pytest

from qlora_lightning.data.rows.bad_rows import BadRow, refuse
from qlora_lightning.support.errors import UserError


def test_no_bad_row_is_no_error():
    refuse([])


def test_twenty_bad_rows_are_listed_and_the_rest_counted():
    with pytest.raises(UserError) as error:
        refuse([BadRow(f"a.jsonl:{line}", "empty") for line in range(1, 26)])
    lines = str(error.value).splitlines()
    assert lines[0] == "25 rows cannot be used:"
    assert lines[1] == "  a.jsonl:1: empty"
    assert lines[20:22] == ["  a.jsonl:20: empty", "  and 5 more"]
    assert "on_bad_row: skip" in lines[22]
