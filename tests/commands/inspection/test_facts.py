"""Figures of splits, and the sentences that are made of them."""

from collections import Counter

import numpy as np
import pytest

from qlora_lightning.commands.epoch import Epoch
from qlora_lightning.commands.inspection.facts import (
    Bar,
    SplitFacts,
    count_ends,
    describe_ends,
    describe_epoch,
    find_faults,
    histogram,
    percentiles,
    table_rows,
)
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.bad_rows import BadRow


def split(name="train", **changes):
    return SplitFacts(name, Report(name, **changes), {"max": 9}, {}, [])


def test_the_table_has_a_column_a_split_and_no_rows_of_zeros():
    rows = dict(table_rows([split(rows=12, samples=10, tokens=2000, labelled=500), split("val", rows=3, overlap=1)]))
    assert rows["rows read"] == ["12", "3"]
    assert rows["labelled share"] == ["25.0%", "–"]
    assert rows["also in train"] == ["", "1"]
    assert "turn by turn" not in rows
    assert "also in train" not in dict(table_rows([split()]))


def test_faults_are_listed_with_their_lines_and_a_count_of_the_rest():
    bad = {"bad": [BadRow("a.jsonl:3", "not JSON")], "bad_rows": 25}
    train = split(**bad, dropped={"too long": 2}, lost_labels=5, labelled=95)
    val = split("val", duplicates=1, duplicate_pairs=[("v:2", "v:1")], overlap=1, overlap_pairs=[("v:9", "a:4")])
    assert find_faults([train, val, split("test")]) == [
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


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({}, "batches per epoch", "10 of 1 row"),
        ({}, "tokens per epoch", "9,000, no padding"),
        ({}, "optimizer steps", "10 per epoch; 30 in all (3 epochs)"),
        ({"budget": 1000}, "batches per epoch", "10 of up to 1,000 tokens"),
        ({"budget": 1000}, "tokens per batch", "900 on average, 1,000 at most; 90.0% of tokens_per_batch"),
        ({"devices": 4}, "batches per epoch", "10 of 1 row on each of 4 devices"),
        ({"accumulate": 2, "steps": 5, "all_steps": 5, "epochs": 1}, "optimizer steps", "5 per epoch, a step every 2"),
        ({"all_steps": 7, "epochs": None}, "optimizer steps", "7 in all (max_steps)"),
        ({"all_steps": None, "epochs": None}, "optimizer steps", "no end (max_epochs and max_steps are -1)"),
        ({"streaming": True, "all_steps": 500, "accumulate": 2}, "optimizer steps", "500 in all (max_steps), a step"),
        ({"streaming": True, "all_steps": None}, "optimizer steps", "trainer.max_steps is missing"),
    ],
)
def test_an_epoch_in_words(changes, key, words):
    usual = {"batches": 10, "mean_tokens": 900.0, "most_tokens": 1000, "budget": None, "tokens": 9000, "devices": 1}
    epoch = Epoch(**{**usual, "accumulate": 1, "steps": 10, "all_steps": 30, "epochs": 3, **changes})
    assert words in dict(describe_epoch(epoch, 1))[key]


def test_percentiles_are_lengths_that_occur():
    found = {"min": 1, "5 %": 5, "25 %": 25, "50 %": 50, "75 %": 75, "95 %": 95, "99 %": 99, "max": 100}
    assert percentiles(np.arange(1, 101)) == found
    assert percentiles([]) == {}


def test_bars_have_one_round_width_and_one_long_sample_does_not_flatten_the_others():
    assert histogram([72, 79, 80, 80, 99], most_bars=4) == [Bar(70, 79, 2), Bar(80, 89, 2), Bar(90, 99, 1)]
    assert histogram([]) == []
    bars = histogram([*range(100, 200), *range(100, 200), 30_000])
    assert bars[-1] == Bar(200, None, 1)
    assert {bar.samples for bar in bars[:-1]} == {20}


def test_bars_are_complete_for_any_lengths():
    generator = np.random.default_rng(0)
    for scale in (1, 10, 1_000, 100_000):
        lengths = generator.integers(1, scale + 1, 300) ** 2
        bars = histogram(lengths)
        assert sum(bar.samples for bar in bars) == 300
        assert len(bars) <= 13
        for bar in bars:
            high = bar.high if bar.high is not None else lengths.max()
            assert bar.samples == np.count_nonzero((lengths >= bar.low) & (lengths <= high))


def test_stop_tokens_count_if_they_are_labelled_and_a_bos_at_the_start_alone(sample_set):
    samples = sample_set("{q}<a}>", "{q}<a>", "{q}<a}b}>", "q}<ab>")
    assert count_ends(samples, [ord("}")], None) == Counter(all=4, stopping=2)
    samples = sample_set("^q^<a}>", "^^q<a}>", "q^<a}>", "^")
    assert count_ends(samples, [ord("}")], ord("^")) == Counter(all=4, stopping=3, begun=3, doubled=1)


@pytest.mark.parametrize(
    ("counts", "has_template", "well", "words"),
    [
        ((9, 9, 0), True, [True, True], ["every sample trains one", "every sample begins with exactly one."]),
        ((7, 0, 0), True, [False, True], ["2 of 9 samples do not train one", "no sample begins with it"]),
        ((0, 9, 4), True, [False, False], ["no sample trains one", "4 of 9 samples begin with two."]),
        ((9, 5, 0), True, [True, False], ["every sample trains one", "5 of 9 samples begin with one."]),
        # pieces of a text have neither, which is no fault
        ((7, 5, 0), False, [True, True], ["7 of 9 samples train one", "5 of 9 samples begin with one."]),
        ((0, 5, 1), False, [True, False], ["0 of 9 samples train one", "1 of 9 samples begin with two."]),
    ],
)
def test_stop_token_and_bos_are_a_sentence_each(counts, has_template, well, words, characters):
    characters.bos_token, characters.bos_token_id = "^", 94
    counted = Counter(dict(zip(("stopping", "begun", "doubled"), counts, strict=True)), all=9)
    sentences = describe_ends(counted, characters, [ord("}")], has_template)
    assert [holds for holds, _ in sentences] == well
    assert all(word in sentence for word, (_, sentence) in zip(words, sentences, strict=True))
    assert sentences[0][1].startswith("Stop token } (125): ")
