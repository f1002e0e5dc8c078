import pytest

from qlora_lightning.commands.inspect.epoch import Epoch
from qlora_lightning.commands.inspect.facts import SplitFacts, find_faults, headline, table_rows, word_epoch
from qlora_lightning.data.rows.bad_rows import BadRow


@pytest.fixture
def split(report):
    return lambda name="train", **changes: SplitFacts(name, report(name, **changes), {"max": 9}, {}, [], None)


def test_the_table_has_a_column_a_split_and_no_rows_of_zeros(split):
    rows = dict(table_rows([split(rows=12, samples=10, tokens=2000, labelled=500), split("val", rows=3, overlap=1)]))
    assert rows["rows read"] == ["12", "3"]
    assert rows["labelled share"] == ["25.0%", "–"]
    assert rows["also in train"] == ["", "1"]
    assert "turn by turn" not in rows
    assert "  labels lost" not in rows
    assert "also in train" not in dict(table_rows([split()]))


def test_faults_are_listed_with_their_places_and_a_count_of_the_rest(split):
    faults = find_faults(
        [
            split(
                bad=[BadRow("a.jsonl:3", "not JSON")], bad_rows=25, dropped={"too long": 2}, lost_labels=5, labelled=95
            ),
            split("val", duplicates=1, duplicate_pairs=[("v:2", "v:1")], overlap=1, overlap_pairs=[("v:9", "a:4")]),
        ]
    )
    assert [(fault.title, fault.lines, fault.grave) for fault in faults] == [
        ("train: 25 bad rows", ["a.jsonl:3: not JSON", "and 24 more"], True),
        ("train: 2 rows dropped", ["2: too long"], False),
        (
            "train: answers were cut",
            ["5 labelled tokens lost, 5.0% of all: a larger max_length would keep them"],
            False,
        ),
        ("val: 1 row equal to an earlier one", ["v:2 = line 1"], False),
        ("val: 1 row also in train, so val_loss is too good", ["v:9 = a:4"], False),
    ]
    assert find_faults([split()]) == []


def _epoch(**changes):
    one = dict(batches=10, mean_tokens=900.0, most_tokens=1000, budget=None, tokens=9000, devices=1, accumulate=1)
    return Epoch(**one | {"steps": 10, "all_steps": 30, "epochs": 3} | changes)


def test_an_epoch_of_rows_in_words():
    assert dict(word_epoch(_epoch(), 8)) == {
        "batches per epoch": "10 of 8 rows",
        "tokens per batch": "900 on average, 1,000 at most",
        "tokens per epoch": "9,000, no padding",
        "optimizer steps": "10 per epoch; 30 in all (3 epochs)",
    }


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"budget": 1000}, "batches per epoch", "10 of up to 1,000 tokens"),
        ({"budget": 1000}, "tokens per batch", "900 on average, 1,000 at most; 90.0% of tokens_per_batch"),
        ({"devices": 4}, "batches per epoch", "10 of 1 row on each of 4 devices"),
        ({"accumulate": 2, "steps": 5, "all_steps": 5, "epochs": 1}, "optimizer steps", "5 per epoch, a step every 2"),
        ({"all_steps": 7, "epochs": None}, "optimizer steps", "7 in all (max_steps)"),
        ({"all_steps": None, "epochs": None}, "optimizer steps", "no end (max_epochs and max_steps are -1)"),
    ],
)
def test_other_epochs_in_words(changes, key, words):
    assert words in dict(word_epoch(_epoch(**changes), 1))[key]


def test_the_headline_leaves_out_what_is_not_known(split):
    assert [label for _, label in headline(split("predict", samples=3, tokens=9), None)] == [
        "samples of predict",
        "tokens",
        "tokens in the longest",
    ]
    assert ("10", "steps per epoch") in headline(split(labelled=1, tokens=2), _epoch())


def test_a_stream_has_no_epochs(split):
    stream = _epoch(streaming=True, all_steps=500, epochs=None, accumulate=2)
    assert dict(word_epoch(stream, 8)) == {
        "batches": "of 8 rows",
        "tokens per batch": "900 on average, 1,000 at most",
        "optimizer steps": "500 in all (max_steps), a step every 2",
    }
    assert (
        "trainer.max_steps is missing" in dict(word_epoch(_epoch(streaming=True, all_steps=None), 8))["optimizer steps"]
    )
    assert "steps per epoch" not in dict((label, value) for value, label in headline(split(), stream))
