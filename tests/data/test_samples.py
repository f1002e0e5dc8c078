import pytest

from qlora_lightning.data.samples import make_sample, mute, shorten
from qlora_lightning.errors import UserError


def sample(prompt, answer, tail=0):
    """Ids counted from 0; the answer's are labelled."""
    ids = list(range(prompt + answer + tail))
    return ids, [number if prompt <= number < prompt + answer else -100 for number in ids]


def test_what_fits_is_left_alone():
    ids, labels = sample(4, 4)
    assert shorten(ids, labels, 8) == (ids, labels)


def test_the_prompt_loses_its_middle_first():
    assert shorten(*sample(8, 3), 7) == ([0, 1, 6, 7, 8, 9, 10], [-100] * 4 + [8, 9, 10])


def test_a_long_answer_leaves_a_quarter_to_the_prompt_and_loses_its_end():
    ids, labels = shorten(*sample(10, 10), 8)
    assert ids == [0, 9, 10, 11, 12, 13, 14, 15]
    assert labels == [-100, -100, 10, 11, 12, 13, 14, 15]  # 19, the stop token, is neither there nor trained


def test_a_short_prompt_stays_whole():
    assert shorten(*sample(1, 10), 8)[0] == [0, 1, 2, 3, 4, 5, 6, 7]


def test_what_follows_the_last_label_goes_before_anything_is_lost():
    assert shorten(*sample(4, 4, tail=1), 8) == sample(4, 4)


def test_no_header_is_kept_of_a_turn_that_was_cut_away():
    ids = list(range(10))
    labels = [-100, -100, 2, 3, -100, -100, -100, -100, 8, 9]
    assert shorten(ids, labels, 6) == ([0, 1, 2, 3], [-100, -100, 2, 3])


@pytest.mark.parametrize("max_length", range(2, 24))
@pytest.mark.parametrize(("prompt", "answer"), [(1, 22), (11, 12), (22, 1), (20, 3)])
def test_a_label_is_always_left_and_the_first_token_has_none(prompt, answer, max_length):
    ids, labels = shorten(*sample(prompt, answer), max_length)
    assert len(ids) == len(labels) <= max_length
    assert labels[0] == -100
    assert any(label != -100 for label in labels)
    assert all(label in (-100, number) for number, label in zip(ids, labels, strict=True))


def test_less_than_two_tokens_are_refused():
    with pytest.raises(UserError, match="max_length: expected at least 2"):
        shorten([1, 2], [-100, 2], 1)


def test_the_first_label_is_dropped_and_a_filler_has_none():
    made = make_sample([5, 6], [5, 6], row_id=3)
    assert made.labels.tolist() == [-100, 6]
    assert (mute(made).labels.tolist(), mute(made).row_id) == ([-100, -100], -1)
