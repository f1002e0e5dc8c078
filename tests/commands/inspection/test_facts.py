import numpy as np
import pytest

from qlora_lightning.commands.inspection import facts
from qlora_lightning.commands.inspection.facts import (
    Bar,
    Ends,
    Epoch,
    SplitFacts,
    count_devices,
    count_ends,
    describe_ends,
    describe_epoch,
    find_faults,
    headline,
    histogram,
    percentiles,
    plan_epoch,
    table_rows,
)
from qlora_lightning.data.batches.epoch_plan import EpochPlan
from qlora_lightning.data.rows.bad_rows import BadRow
from qlora_lightning.support.errors import UserError


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
    assert dict(describe_epoch(_epoch(), 8)) == {
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
    assert words in dict(describe_epoch(_epoch(**changes), 1))[key]


def test_the_headline_leaves_out_what_is_not_known(split):
    assert [label for _, label in headline(split("predict", samples=3, tokens=9), None)] == [
        "samples of predict",
        "tokens",
        "tokens in the longest",
    ]
    assert ("10", "steps per epoch") in headline(split(labelled=1, tokens=2), _epoch())


def test_a_stream_has_no_epochs(split):
    stream = _epoch(streaming=True, all_steps=500, epochs=None, accumulate=2)
    assert dict(describe_epoch(stream, 8)) == {
        "batches": "of 8 rows",
        "tokens per batch": "900 on average, 1,000 at most",
        "optimizer steps": "500 in all (max_steps), a step every 2",
    }
    endless = dict(describe_epoch(_epoch(streaming=True, all_steps=None), 8))
    assert "trainer.max_steps is missing" in endless["optimizer steps"]
    assert "steps per epoch" not in dict((label, value) for value, label in headline(split(), stream))


def test_percentiles_are_lengths_that_occur():
    assert percentiles(np.arange(1, 101)) == {
        "min": 1, "5 %": 5, "25 %": 25, "50 %": 50, "75 %": 75, "95 %": 95, "99 %": 99, "max": 100,
    }  # fmt: skip
    assert set(percentiles([7]).values()) == {7}
    assert percentiles([]) == {}


def test_bars_have_one_round_width_and_hold_every_sample():
    assert histogram([72, 79, 80, 80, 99], most_bars=4) == [Bar(70, 79, 2), Bar(80, 89, 2), Bar(90, 99, 1)]
    assert histogram([5, 5, 5]) == [Bar(5, 5, 3)]
    assert histogram([]) == []


def test_one_long_sample_does_not_flatten_the_others():
    bars = histogram([*range(100, 200), *range(100, 200), 30_000])
    assert bars[-1] == Bar(200, None, 1)
    assert len(bars) <= 13
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


def test_a_bar_says_its_range():
    assert [bar.label for bar in (Bar(5, 5, 1), Bar(1000, 1999, 1), Bar(2000, None, 1))] == [
        "5",
        "1,000 to 1,999",
        "2,000 and more",
    ]


def test_stop_tokens_count_where_they_are_labelled(sample_set):
    samples = sample_set("{q}<a}>", "{q}<a>", "{q}<a}b}>", "q}<ab>")
    assert count_ends(samples, [ord("}")], None) == Ends(samples=4, stopping=2, with_bos=None, doubled=0)


def test_a_bos_is_looked_for_at_the_start_alone(sample_set):
    samples = sample_set("^q^<a}>", "^^q<a}>", "q^<a}>", "^")
    assert count_ends(samples, [ord("}")], ord("^")) == Ends(samples=4, stopping=3, with_bos=3, doubled=1)


@pytest.mark.parametrize(
    ("ends", "well", "words"),
    [
        (Ends(9, 9, 9, 0), [True, True], ["every sample trains one", "every sample begins with exactly one."]),
        (Ends(9, 7, 0, 0), [False, True], ["2 of 9 samples do not train one", "no sample begins with it"]),
        (Ends(9, 0, 9, 4), [False, False], ["no sample trains one", "4 of 9 samples begin with two."]),
        (Ends(9, 9, 5, 0), [True, False], ["every sample trains one", "5 of 9 samples begin with one."]),
        (Ends(9, 9, None, 0), [True, True], ["every sample trains one", "this tokenizer has none."]),
        # pieces of a text have neither, which is no fault
        (Ends(9, 7, 5, 0, True), [True, True], ["7 of 9 samples train one", "5 of 9 samples begin with one."]),
        (Ends(9, 0, 5, 1, True), [True, False], ["0 of 9 samples train one", "1 of 9 samples begin with two."]),
    ],
)
def test_each_is_a_sentence(ends, well, words, characters):
    characters.bos_token, characters.bos_token_id = "^", 94
    sentences = describe_ends(ends, characters, [ord("}")])
    assert [holds for holds, _ in sentences] == well
    assert all(word in sentence for word, (_, sentence) in zip(words, sentences, strict=True))
    assert sentences[0][1].startswith("Stop token } (125): ")


@pytest.fixture
def plan(sample_set):
    """Ten samples of 1 to 10 tokens, 55 in all."""
    return lambda **settings: EpochPlan(sample_set(*("x" * n for n in range(1, 11))), **settings)


def test_batches_of_rows(plan):
    epoch = plan_epoch(plan(batch_size=4), {"devices": 1, "max_epochs": 3, "accumulate_grad_batches": 2})
    assert (epoch.batches, epoch.tokens, epoch.mean_tokens, epoch.most_tokens) == (3, 55, 55 / 3, 26)
    assert (epoch.steps, epoch.all_steps, epoch.epochs) == (2, 6, 3)
    assert epoch.fill is None


def test_batches_of_a_budget_are_filled(plan):
    epoch = plan_epoch(plan(tokens_per_batch=11), {"devices": 1})
    assert (epoch.batches, epoch.mean_tokens, epoch.most_tokens) == (5, 11.0, 11)
    assert epoch.fill == 1.0


@pytest.mark.parametrize(
    ("trainer", "steps", "all_steps", "epochs"),
    [
        ({}, 10, 10, 1),
        ({"devices": 2}, 5, 5, 1),
        ({"devices": [0, 1, 2, 3]}, 3, 3, 1),
        ({"devices": "0,1,"}, 5, 5, 1),
        ({"devices": "2", "num_nodes": 2}, 3, 3, 1),
        ({"max_steps": 7, "max_epochs": -1}, 10, 7, None),
        ({"max_steps": 7, "max_epochs": 5}, 10, 7, 5),
        ({"max_steps": 70, "max_epochs": 2}, 10, 20, 2),
        ({"max_epochs": -1}, 10, None, None),
        ({"max_epochs": None, "max_steps": None}, 10, 10, 1),
        ({"limit_train_batches": 4, "accumulate_grad_batches": 3}, 2, 2, 1),
        ({"limit_train_batches": 0.5}, 5, 5, 1),
    ],
)
def test_steps_follow_the_trainer(plan, trainer, steps, all_steps, epochs):
    epoch = plan_epoch(plan(batch_size=1), {"accelerator": "cpu", **trainer})
    assert (epoch.steps, epoch.all_steps, epoch.epochs) == (steps, all_steps, epochs)


def test_a_stream_ends_by_steps_alone(plan):
    assert plan_epoch(plan(batch_size=1), {"max_steps": 70}, streaming=True).all_steps == 70
    assert plan_epoch(plan(batch_size=1), {"max_epochs": 3}, streaming=True).all_steps is None


def test_steps_are_those_that_lightning_makes(plan):
    import lightning

    class Count(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            import torch

            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch, index):
            return self.weight * 1.0

        def configure_optimizers(self):
            import torch

            return torch.optim.SGD(self.parameters(), 0.1)

    settings = {"max_epochs": 2, "accumulate_grad_batches": 4, "devices": 1, "limit_train_batches": 0.7}
    trainer = lightning.Trainer(
        **settings, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Count(), [0] * 10)
    assert trainer.global_step == plan_epoch(plan(batch_size=1), {**settings, "accelerator": "cpu"}).all_steps


def test_all_devices_are_those_of_this_machine(monkeypatch):
    monkeypatch.setattr(facts.torch.cuda, "device_count", lambda: 8)
    assert count_devices({}) == count_devices({"devices": -1, "accelerator": "gpu"}) == 8
    assert count_devices({"devices": "auto", "accelerator": "cpu"}) == 1
    monkeypatch.setattr(facts.torch.cuda, "device_count", lambda: 0)
    assert count_devices({}) == 1


@pytest.mark.parametrize("value", ["two", True, 0, 1.5])
def test_a_setting_that_is_no_count_is_refused(plan, value):
    with pytest.raises(UserError, match=r"trainer\.accumulate_grad_batches is .*: expected"):
        plan_epoch(plan(batch_size=1), {"accumulate_grad_batches": value})
