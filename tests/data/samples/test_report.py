import json

from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.bad_rows import BadRow

FULL = Report(
    "val",
    rows=7_473,
    samples=7_465,
    formats=["alpaca", "messages"],
    tokens=2_000,
    labelled=500,
    shortened=3,
    lost_tokens=90,
    lost_labels=12,
    turn_by_turn=4,
    dropped={"longer than max_length (too_long: drop)": 8},
    bad_rows=2,
    bad=[BadRow("a.jsonl:3", "empty"), BadRow("a.jsonl:9", "not JSON")],
    duplicates=6,
    duplicate_pairs=[(f"a.jsonl:{line}", "a.jsonl:1") for line in range(2, 8)],
    overlap=1,
    overlap_pairs=[("a.jsonl:5", "t.jsonl:7")],
)


def test_a_split_without_surprises_is_one_line():
    report = Report("train", rows=2, samples=2, formats=["alpaca"], tokens=40, labelled=10)
    assert report.describe() == "train: 2 rows (alpaca), 40 tokens, 25% labelled"
    assert Report("predict", rows=1, samples=1, tokens=9).describe() == "predict: 1 rows, 9 tokens"


def test_each_thing_to_look_at_has_a_line():
    assert FULL.describe().splitlines() == [
        "val: 7,473 rows (alpaca, messages), 2,000 tokens, 25% labelled, 7,465 samples, "
        "3 shortened (12 labelled tokens lost), 4 rendered turn by turn",
        "  8 rows dropped: longer than max_length (too_long: drop)",
        "  2 bad rows skipped: a.jsonl:3 (empty), a.jsonl:9 (not JSON)",
        "  6 rows equal an earlier one: a.jsonl:2 = a.jsonl:1, a.jsonl:3 = a.jsonl:1, a.jsonl:4 = a.jsonl:1, "
        "a.jsonl:5 = a.jsonl:1, a.jsonl:6 = a.jsonl:1, …",
        "  1 rows are trained on too, so val_loss is too good: a.jsonl:5 = t.jsonl:7",
    ]


def test_reasons_are_counted():
    report = Report("train")
    for reason in ("a", "b", "a"):
        report.drop(reason)
    assert report.dropped == {"a": 2, "b": 1}


def test_back_from_json_it_is_the_same():
    again = Report.from_dict(json.loads(json.dumps(FULL.as_dict())))
    assert again == FULL
    assert again.bad[0].where == "a.jsonl:3"
    assert again.duplicate_pairs[0] == ("a.jsonl:2", "a.jsonl:1")
