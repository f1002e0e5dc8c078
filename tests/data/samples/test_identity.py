import copy

import pytest

from qlora_lightning import InstructionDataModule
from qlora_lightning.base.folder import load_tokenizer
from qlora_lightning.data.samples.identity import hash_samples, identify
from qlora_lightning.data.samples.sample_builder import SampleSetBuilder


def build(ids=((1, 2, 3), (4, 5)), labels=((-100, 2, 3), (-100, 5)), source=0):
    builder = SampleSetBuilder()
    for row, (row_ids, row_labels) in enumerate(zip(ids, labels, strict=True)):
        builder.add(list(row_ids), list(row_labels), row, source, "rows.jsonl", row + 1)
    return builder.build()


def test_equal_samples_have_equal_hashes():
    assert hash_samples(build()) == hash_samples(build())


@pytest.mark.parametrize(
    "other",
    [
        build(ids=((1, 2, 9), (4, 5))),
        build(labels=((-100, -100, 3), (-100, 5))),
        build(ids=((4, 5), (1, 2, 3)), labels=((-100, 5), (-100, 2, 3))),
        build(ids=((1, 2), (3, 4, 5)), labels=((-100, 2), (-100, -100, 5))),
        build(source=1),
    ],
    ids=["token", "label", "order", "boundary", "source"],
)
def test_whatever_is_trained_on_counts(other):
    assert hash_samples(other) != hash_samples(build())


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return load_tokenizer(str(tiny_base))


def test_tokenizer_and_template_are_told_apart(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages }}"
    mine, theirs = identify({}, tokenizer), identify({}, other)
    assert mine["tokenizer"] == theirs["tokenizer"]
    assert mine["chat_template"] != theirs["chat_template"]
    other.eos_token = "<|endoftext|>"
    assert identify({}, other)["tokenizer"] != mine["tokenizer"]


def test_a_tokenizer_that_cannot_be_looked_into_is_left_out():
    class Strange:
        chat_template = None

    assert identify({"train": build()}, Strange()) == {"train": hash_samples(build()), "samples": {"train": 2}}


def test_the_data_module_says_what_it_was_set_up_with(rows_file, tokenizer):
    def identity(**options):
        data = InstructionDataModule(train=str(rows_file), tokenizer=tokenizer, **options)
        data.setup("fit")
        return data.identity

    plain, held_out = identity(), identity(val_fraction=0.25, batch_size=4)
    assert plain.keys() == {"train", "samples", "tokenizer", "chat_template", "settings"}
    assert held_out.keys() == {"train", "val", "samples", "tokenizer", "chat_template", "settings"}
    assert plain["train"] != held_out["train"]
    assert (plain["samples"], held_out["samples"]) == ({"train": 16}, {"train": 12, "val": 4})
    assert (held_out["settings"]["val_fraction"], held_out["settings"]["batch_size"]) == (0.25, 4)
