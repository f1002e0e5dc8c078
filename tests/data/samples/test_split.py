import pytest

from qlora_lightning.data.samples import gather_samples, hold_out, make_sample
from qlora_lightning.support.errors import UserError

SAMPLES = [make_sample([number % 40, 1], [-100, 1], number) for number in range(60)]  # 20 contents stand there twice


def numbers(samples):
    return samples.row_ids.tolist()


def test_duplicates_stay_together_and_the_fraction_is_of_contents():
    training, validation = hold_out(gather_samples(SAMPLES), 0.25, seed=1)
    assert sorted(numbers(training) + numbers(validation)) == list(range(60))
    assert numbers(training) == sorted(numbers(training))
    sides = [{number % 40 for number in numbers(side)} for side in (training, validation)]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[1]) == 10


def test_the_split_depends_on_content_and_seed_not_on_lines():
    _, validation = hold_out(SAMPLES, 0.25, seed=1)
    _, reversed_ = hold_out(SAMPLES[::-1], 0.25, seed=1)
    _, other = hold_out(SAMPLES, 0.25, seed=2)
    assert numbers(validation) == numbers(reversed_)[::-1] != numbers(other)


def test_rows_that_differ_in_labels_only_stay_together():
    twins = [make_sample([n // 2, 1, 2], [-100, 1 if n % 2 else -100, 2], n) for n in range(60)]
    training, validation = hold_out(twins, 0.3, 0)
    assert {n // 2 for n in numbers(training)}.isdisjoint(n // 2 for n in numbers(validation))


def test_the_pieces_of_a_row_stay_together():
    pieces = [make_sample([row, piece], [-100, piece], row) for row in range(20) for piece in range(3)]
    training, validation = hold_out(pieces, 0.25, 0)
    assert set(numbers(training)).isdisjoint(numbers(validation))
    assert len(set(numbers(validation))) == 5


def test_each_side_has_a_row_or_the_split_is_refused():
    assert [len(side) for side in hold_out(SAMPLES[:2], 0.01, 0)] == [1, 1]
    assert [len(side) for side in hold_out(SAMPLES[:2], 0.99, 0)] == [1, 1]
    with pytest.raises(UserError, match="at least 2 different rows"):
        hold_out(SAMPLES[:1], 0.5, 0)
