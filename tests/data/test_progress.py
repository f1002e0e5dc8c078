from qlora_lightning.data.progress import watch_rows
from qlora_lightning.data.reader import Row

ROWS = [Row({}, "a.jsonl", 1)] * 2_001


def test_few_rows_are_handed_on_as_they_are():
    assert watch_rows(ROWS[:10], "train") == ROWS[:10]


def test_many_rows_are_handed_on_one_by_one(capsys):
    assert list(watch_rows(ROWS, "train")) == ROWS
    assert capsys.readouterr().out == ""
