import pytest

from qlora_lightning.data.samples import make_sample
from qlora_lightning.data.split import hold_out
from qlora_lightning.errors import UserError

SAMPLES = [make_sample([number % 40, 1], [-100, 1], number) for number in range(60)]  # 20 contents stand there twice


def numbers(samples):
    return [sample.row_id for sample in samples]


def test_duplicates_stay_together_and_the_fraction_is_of_contents():
    training, validation = hold_out(SAMPLES, 0.25, seed=1)
    assert sorted(numbers(training) + numbers(validation)) == list(range(60))
    sides = [{sample.row_id % 40 for sample in side} for side in (training, validation)]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[1]) == 10


def test_the_split_depends_on_content_and_seed_not_on_lines():
    _, validation = hold_out(SAMPLES, 0.25, seed=1)
    _, reversed_ = hold_out(SAMPLES[::-1], 0.25, seed=1)
    _, other = hold_out(SAMPLES, 0.25, seed=2)
    assert numbers(validation) == numbers(reversed_)[::-1] != numbers(other)


def test_each_side_has_a_row_or_the_split_is_refused():
    assert [len(side) for side in hold_out(SAMPLES[:2], 0.01, 0)] == [1, 1]
    with pytest.raises(UserError, match="at least 2 different rows"):
        hold_out(SAMPLES[:1], 0.5, 0)
    with pytest.raises(UserError, match="between 0 and 1, found 5"):
        hold_out(SAMPLES, 5, 0)
