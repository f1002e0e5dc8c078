import pytest

from qlora_lightning.data.prepare import (
    as_row,
    check_combinations,
    check_usable,
    check_word,
    recount,
    refuse_unusable,
)
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.bad_rows import BadRow
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.data.samples import SampleSetBuilder
from qlora_lightning.support.errors import UserError

NOTHING = {
    "val": None,
    "val_fraction": None,
    "batch_size": None,
    "tokens_per_batch": None,
    "group_by_length": False,
    "streaming": False,
}


def test_a_word_is_one_of_the_known_ones():
    check_word("on_bad_row", "skip", ("error", "skip"))
    with pytest.raises(UserError, match="on_bad_row: expected error or skip, found 'ignore'"):
        check_word("on_bad_row", "ignore", ("error", "skip"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"val": "v.jsonl", "val_fraction": 0.1}, "val and val_fraction are both given"),
        ({"batch_size": 2, "tokens_per_batch": 512}, "batch_size and tokens_per_batch are both given"),
        ({"batch_size": 0}, "batch_size: expected at least 1, found 0"),
        ({"tokens_per_batch": -1}, "tokens_per_batch: expected at least 1, found -1"),
        ({"streaming": True, "val_fraction": 0.1}, "val_fraction needs all rows"),
        ({"streaming": True, "own_rows": True}, "streaming reads the files of data.train itself"),
        ({"streaming": True, "group_by_length": True}, "group_by_length needs all rows"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        check_combinations(**NOTHING | settings)


@pytest.mark.parametrize(
    "settings",
    [{"val": "v.jsonl", "batch_size": 2, "group_by_length": True}, {"tokens_per_batch": 512, "streaming": True}],
)
def test_other_settings_go_together(settings):
    check_combinations(**NOTHING | settings)


def test_samples_of_another_split_are_counted_anew():
    builder = SampleSetBuilder()
    for row, ids in ((4, [1, 2, 3]), (7, [1, 2, 3]), (9, [1, 2]), (9, [1, 5])):  # row 9 in two pieces
        builder.add(ids, [-100, *ids[1:]], row, 0, "a.jsonl", row + 1)
    whole = Report("train", 30, 12, ["alpaca"], tokens=99, labelled=50, dropped={"too long": 2}, bad_rows=4)
    counted = {
        "samples": 4,
        "formats": ["alpaca"],
        "tokens": 10,
        "labelled": 6,
        "duplicates": 1,
        "duplicate_pairs": [("a.jsonl:8", "a.jsonl:5")],
    }
    assert recount("val", builder.build(), whole) == Report("val", rows=3, **counted)
    train = recount("train", builder.build(), whole)  # what was left out is told here
    assert train == Report("train", rows=3 + 2 + 4, dropped={"too long": 2}, bad_rows=4, **counted)


def test_a_plain_dict_gets_a_place():
    row, bad = Row({}, "a.jsonl", 3), BadRow("a.jsonl:4", "empty")
    assert as_row({"prompt": "q"}, "train", 2) == Row({"prompt": "q"}, "train", 2)
    assert as_row(row, "train", 2) is row
    assert as_row(bad, "train", 2) is bad
    with pytest.raises(UserError, match=r"load_rows\('val'\): expected rows or dicts, found str as row 2"):
        as_row("q", "val", 2)


EMPTY = BadRow("a.jsonl:3", "empty")


def test_bad_rows_stop_unless_they_are_to_be_skipped():
    report = Report("train", rows=30, samples=5, bad=[EMPTY], bad_rows=25)
    refuse_unusable(report, skip=True)
    with pytest.raises(UserError, match=r"25 rows cannot be used:\n  a.jsonl:3: empty\n") as error:
        refuse_unusable(report, skip=False)
    assert "on_bad_row: skip" in str(error.value)


def test_nothing_left_is_refused_with_the_reasons():
    with pytest.raises(UserError, match=r"a.jsonl:3: empty\nCorrect them\.$"):  # skipping is what was done
        refuse_unusable(Report("train", rows=1, bad=[EMPTY], bad_rows=1), skip=True)
    report = Report("val", rows=1_200, dropped={"too long": 1_200})
    with pytest.raises(UserError, match=r"val: none of 1,200 rows is left \(1,200: too long\)"):
        refuse_unusable(report, skip=False)


def test_up_to_5_percent_of_rows_may_teach_nothing():
    dropped = {"every answer is marked `train: false`": 1}
    check_usable(Report("train", rows=20, dropped=dropped, unusable=1))
    with pytest.raises(UserError, match=r"^1 of 19 rows of train have no labelled token \(more than 5%\).*1: every"):
        check_usable(Report("train", rows=19, dropped=dropped, unusable=1))
