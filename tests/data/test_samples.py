"""Samples as flat arrays: built, saved, taken, compared, held out, identified."""

import pytest

from qlora_lightning import UserError
from qlora_lightning.data.samples import (
    SampleSetBuilder,
    find_repeats,
    hold_out,
)
from tests.flat import gather


def build(*rows, file="train.jsonl", source=0):
    """One row a line: (ids, labels), or a list of such pieces."""
    builder = SampleSetBuilder()
    for number, row in enumerate(rows):
        for ids, labels in row if isinstance(row, list) else [row]:
            builder.add(ids, labels, number, source, file, number + 1)
    return builder.build()


A, B = ([1, 2, 3], [-100, 2, 3]), ([1, 2, 4], [-100, 2, 4])
A_LAST = ([1, 2, 3], [-100, -100, 3])  # the tokens of A, other labels


def named(repeats):
    return repeats.row_ids.tolist(), [pair.replace("train.jsonl:", "") for pair in repeats.pairs]


def test_duplicates_are_named_with_the_first_of_them():
    assert named(find_repeats(build(A, B, A, A_LAST, B, A))) == ([2, 4, 5], ["3 = 1", "5 = 2", "6 = 1"])
    many = find_repeats(build(*[A] * 30))
    assert (len(many.row_ids), len(many.pairs), many.pairs[-1]) == (29, 20, "train.jsonl:21 = train.jsonl:1")
    # a row in pieces equals another if all its pieces do
    assert named(find_repeats(build([A, B], A, B, [A, A_LAST], [A, B]))) == ([4], ["5 = 1"])


def test_overlap_names_both_files():
    train, val = build(A, B, B), build(A_LAST, B, ([7, 8], [-100, 8]), B, file="val.jsonl")
    found = find_repeats(val, among=train)
    assert found.row_ids.tolist() == [1, 3]
    assert found.pairs == ["val.jsonl:2 = train.jsonl:2", "val.jsonl:4 = train.jsonl:2"]
    for repeats in (find_repeats(build()), find_repeats(build(), train), find_repeats(train, build())):
        assert named(repeats) == ([], [])


# ---- held out --------------------------------------------------------------------------------------------------------


def held(samples, fraction, seed=1):
    return [side.row_ids.tolist() for side in hold_out(gather(*samples), fraction, seed)]


SIXTY = [([number % 40, 1], [-100, 1], number) for number in range(60)]  # 20 contents occur twice


def test_rows_are_held_out_by_content_and_seed():
    training, validation = held(SIXTY, 0.25)
    assert sorted(training + validation) == list(range(60))
    assert training == sorted(training)
    sides = [{number % 40 for number in side} for side in (training, validation)]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[1]) == 10  # the fraction is of contents
    # not by lines
    assert validation == held(SIXTY[::-1], 0.25)[1][::-1] != held(SIXTY, 0.25, seed=2)[1]
    # rows that differ in labels only, and the pieces of a row, stay together
    twins = [([n // 2, 1, 2], [-100, 1 if n % 2 else -100, 2], n) for n in range(60)]
    training, validation = held(twins, 0.3)
    assert {n // 2 for n in training}.isdisjoint(n // 2 for n in validation)
    pieces = [([row, piece], [-100, piece], row) for row in range(20) for piece in range(3)]
    training, validation = held(pieces, 0.25)
    assert set(training).isdisjoint(validation)
    assert len(set(validation)) == 5


def test_each_side_has_a_row_or_the_split_is_rejected():
    assert [list(map(len, held(SIXTY[:2], fraction))) for fraction in (0.01, 0.99)] == [[1, 1], [1, 1]]
    with pytest.raises(UserError, match="at least 2 different rows"):
        held(SIXTY[:1], 0.5)


def test_whatever_is_trained_on_counts_in_the_hash():
    token, boundary = ([1, 2, 9], [-100, 2, 9]), [([1, 2], [-100, 2]), ([3, 1, 2, 4], [-100, -100, 2, 4])]
    others = [build(token, B), build(A_LAST, B), build(B, A), build(*boundary), build(A, B, source=1)]
    # the hash is that of checkpoints that exist
    expected = "16b839eba85f4699f1c0c391b172f39d5cb0633c61ae04979a26d0cf7d1cebab"
    assert build(A, B).content_hash == expected
    assert expected not in [other.content_hash for other in others]
