"""Samples as flat arrays: built, saved, taken, compared, held out."""

import copy
import pickle

import numpy as np
import pytest
import torch

from qlora_lightning.base.folder import load_tokenizer
from qlora_lightning.data.cache import hash_samples, identify
from qlora_lightning.data.samples import (
    SampleSet,
    SampleSetBuilder,
    drop_duplicates,
    find_duplicates,
    find_overlap,
    gather_samples,
    hold_out,
    make_sample,
)
from qlora_lightning.support.errors import UserError


def build(*rows, file="train.jsonl", source=0):
    """One row a line: (ids, labels) and perhaps a weight, or a list of such pieces."""
    builder = SampleSetBuilder()
    for number, row in enumerate(rows):
        for ids, labels, *weight in row if isinstance(row, list) else [row]:
            builder.add(ids, labels, number, source, file, number + 1, *weight)
    return builder.build()


def contents(samples):
    return [
        (sample.ids.tolist(), sample.labels.tolist(), *sample[2:], samples.where(n)) for n, sample in enumerate(samples)
    ]


THREE = (([5, 6, 7], [-100, 6, 7]), ([8, 9], [8, 9]), ([3], [3]))
CONTENTS = [
    ([5, 6, 7], [-100, 6, 7], 0, 0, 1.0, "train.jsonl:1"),
    ([8, 9], [-100, 9], 1, 0, 1.0, "train.jsonl:2"),  # nothing predicts a first token, so it is never labelled
    ([3], [-100], 2, 0, 1.0, "train.jsonl:3"),
]
WEIGHTED = build(([5, 6], [5, 6], 0.5), ([8, 9], [8, 9], 1.0), ([3], [3], 2.0))


def test_flat_arrays_and_the_samples_in_them():
    samples = build(*THREE)
    assert samples.ids.tolist() == [5, 6, 7, 8, 9, 3]
    assert samples.labelled.tolist() == [False, True, True, False, True, False]
    assert samples.starts.tolist() == [0, 3, 5, 6]
    assert (samples.lengths.tolist(), samples.labelled_counts.tolist()) == ([3, 2, 1], [2, 1, 0])
    assert samples.weights is None
    assert contents(samples) == CONTENTS
    assert {samples[0].ids.dtype, samples[0].labels.dtype} == {torch.int32}
    assert (samples[-1].row_id, contents(samples[1:])[0][:2]) == (2, CONTENTS[1][:2])
    with pytest.raises(IndexError):
        samples[3]
    assert len(SampleSetBuilder().build()) == len(gather_samples([])) == 0


def test_weights_of_rows_are_kept_by_whatever_is_done_with_samples(tmp_path):
    WEIGHTED.save(tmp_path)
    joined = SampleSetBuilder()
    joined.extend(build(*THREE))
    joined.extend(WEIGHTED)
    for samples, expected in (
        (WEIGHTED, [0.5, 1, 2]),
        (SampleSet.load(tmp_path), [0.5, 1, 2]),
        (WEIGHTED.take([2, 0]), [2, 0.5]),
        (gather_samples(list(WEIGHTED)), [0.5, 1, 2]),
        (pickle.loads(pickle.dumps(WEIGHTED)), [0.5, 1, 2]),
        (joined.build(), [1, 1, 1, 0.5, 1, 2]),
    ):
        assert samples.weights.tolist() == expected
        assert [sample.weight for sample in samples] == expected
    assert sorted(weight for side in hold_out(WEIGHTED, 0.3, 1) for weight in side.weights.tolist()) == [0.5, 1, 2]
    assert hash_samples(WEIGHTED) != hash_samples(build(*[(ids, labels) for ids, labels, *_ in contents(WEIGHTED)]))


def test_taking_copies_in_the_order_asked_for():
    samples = build(*THREE)
    assert contents(samples.take([2, 0, 2])) == [CONTENTS[2], CONTENTS[0], CONTENTS[2]]
    assert len(samples.take([])) == 0


@pytest.mark.parametrize("chosen", [[0, 1, 2], []])
def test_what_is_saved_is_loaded_mapped_and_cannot_be_changed(tmp_path, chosen):
    saved = build(*THREE).take(chosen)
    saved.save(tmp_path)
    assert contents(pickle.loads(pickle.dumps(saved))) == [CONTENTS[n] for n in chosen]
    for samples in (SampleSet.load(tmp_path), SampleSet.load(tmp_path, mmap=False)):
        assert contents(samples) == [CONTENTS[n] for n in chosen]
        with pytest.raises((ValueError, IndexError)):
            samples.ids[0] = 1
    array, mapped = SampleSet.load(tmp_path).ids, False
    while array is not None and not mapped:
        array, mapped = getattr(array, "base", None), isinstance(array, np.memmap)
    assert mapped


@pytest.mark.parametrize("name", ["ids", "labelled", "row_ids", "source", "file", "line", "weights"])
def test_arrays_that_do_not_fit_together_are_refused(name):
    fields = {key: getattr(WEIGHTED, key) for key in WEIGHTED.__dataclass_fields__}
    with pytest.raises(ValueError, match=f"{name}: expected"):
        SampleSet(**fields | {name: fields[name][:-1]})
    with pytest.raises(ValueError, match="sample 1 has no tokens"):
        SampleSet(**fields | {"starts": [0, 2, 2, 5]})
    with pytest.raises(ValueError, match="expected as many labels as ids, and at least one"):
        SampleSetBuilder().add([1, 2], [1], 0)


def test_sets_are_laid_end_to_end_and_keep_their_files():
    builder = SampleSetBuilder()
    for file in ("a", "b", "a"):
        builder.extend(build(([1, 2], [1, 2]), ([3], [3]), file=file))
    builder.extend(gather_samples([make_sample([5, 6], [-100, 6], 7)]))
    both = builder.build()
    assert both.files == ("a", "b")
    assert [both.where(n) for n in range(7)] == ["a:1", "a:2", "b:1", "b:2", "a:1", "a:2", "row 7"]


# ---- equal rows ------------------------------------------------------------------------------------------------------

A, B = ([1, 2, 3], [-100, 2, 3]), ([1, 2, 4], [-100, 2, 4])
A_LAST = ([1, 2, 3], [-100, -100, 3])  # the tokens of A, other labels


def test_duplicates_are_named_with_the_first_of_them():
    found = find_duplicates(build(A, B, A, A_LAST, B, A))
    assert found == (3, [(f"train.jsonl:{here}", f"train.jsonl:{first}") for here, first in ((3, 1), (5, 2), (6, 1))])
    many = find_duplicates(build(*[A] * 30))
    assert (many.rows, len(many.pairs), many.pairs[-1]) == (29, 20, ("train.jsonl:21", "train.jsonl:1"))


def test_a_row_in_pieces_is_equal_when_all_its_pieces_are_and_is_dropped_with_them():
    samples = build([A, B], A, B, [A, A_LAST], [A, B])
    assert find_duplicates(samples) == (1, [("train.jsonl:5", "train.jsonl:1")])
    assert drop_duplicates(samples).row_ids.tolist() == [0, 0, 1, 2, 3, 3]
    assert drop_duplicates(build(A, B, A, A_LAST)).row_ids.tolist() == [0, 1, 3]


def test_overlap_names_both_files():
    train, val = build(A, B, B), build(A_LAST, B, ([7, 8], [-100, 8]), B, file="val.jsonl")
    assert find_overlap(train, val) == (2, [("val.jsonl:2", "train.jsonl:2"), ("val.jsonl:4", "train.jsonl:2")])
    empty = build()
    assert find_duplicates(empty) == find_overlap(empty, train) == find_overlap(train, empty) == (0, [])


# ---- held out --------------------------------------------------------------------------------------------------------

SIXTY = [make_sample([number % 40, 1], [-100, 1], number) for number in range(60)]  # 20 contents occur twice


def numbers(samples):
    return samples.row_ids.tolist()


def test_duplicates_stay_together_and_the_fraction_is_of_contents():
    training, validation = hold_out(gather_samples(SIXTY), 0.25, seed=1)
    assert sorted(numbers(training) + numbers(validation)) == list(range(60))
    assert numbers(training) == sorted(numbers(training))
    sides = [{number % 40 for number in numbers(side)} for side in (training, validation)]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[1]) == 10


def test_the_split_depends_on_content_and_seed_not_on_lines():
    _, validation = hold_out(SIXTY, 0.25, seed=1)
    _, reversed_ = hold_out(SIXTY[::-1], 0.25, seed=1)
    _, other = hold_out(SIXTY, 0.25, seed=2)
    assert numbers(validation) == numbers(reversed_)[::-1] != numbers(other)


def test_rows_that_differ_in_labels_only_and_the_pieces_of_a_row_stay_together():
    twins = [make_sample([n // 2, 1, 2], [-100, 1 if n % 2 else -100, 2], n) for n in range(60)]
    training, validation = hold_out(twins, 0.3, 0)
    assert {n // 2 for n in numbers(training)}.isdisjoint(n // 2 for n in numbers(validation))
    pieces = [make_sample([row, piece], [-100, piece], row) for row in range(20) for piece in range(3)]
    training, validation = hold_out(pieces, 0.25, 0)
    assert set(numbers(training)).isdisjoint(numbers(validation))
    assert len(set(numbers(validation))) == 5


def test_each_side_has_a_row_or_the_split_is_refused():
    assert [len(side) for side in hold_out(SIXTY[:2], 0.01, 0)] == [1, 1]
    assert [len(side) for side in hold_out(SIXTY[:2], 0.99, 0)] == [1, 1]
    with pytest.raises(UserError, match="at least 2 different rows"):
        hold_out(SIXTY[:1], 0.5, 0)


# ---- hashes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        build(([1, 2, 9], [-100, 2, 9]), B),
        build(A_LAST, B),
        build(B, A),
        build(([1, 2], [-100, 2]), ([3, 1, 2, 4], [-100, -100, 2, 4])),
        build(A, B, source=1),
        build((*A, 0.5), B),
    ],
    ids=["token", "label", "order", "boundary", "source", "weight"],
)
def test_whatever_is_trained_on_counts(other):
    assert hash_samples(build(A, B)) == hash_samples(build(A, B)) != hash_samples(other)


def test_the_hash_is_that_of_checkpoints_that_exist():
    assert hash_samples(build(A, B)) == "16b839eba85f4699f1c0c391b172f39d5cb0633c61ae04979a26d0cf7d1cebab"


def test_tokenizer_and_template_are_told_apart(tiny_base):
    tokenizer = load_tokenizer(str(tiny_base))
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

    assert identify({"train": build(A)}, Strange()) == {"train": hash_samples(build(A)), "samples": {"train": 1}}
