import random

import pytest

from qlora_lightning.data.chat.lengths import fit_length, shorten
from qlora_lightning.errors import UserError

STOP = 999


def sample(prompt, answer, tail=0):
    """Ids counted from 0; the answer's are labelled."""
    ids = list(range(prompt + answer + tail))
    return ids, [number if prompt <= number < prompt + answer else -100 for number in ids]


def random_sample(rng):
    """Turns of unlabelled and labelled tokens, each token another one; a labelled turn ends in a stop token."""
    ids, labels = [], []
    for _ in range(rng.randrange(1, 4)):
        prompt, answer = rng.randrange(1, 12), rng.randrange(0, 12)
        first = len(ids)
        ids += [*range(first, first + prompt + answer), STOP]
        labels += [-100] * prompt + ids[first + prompt :]
    return ids, labels


def labelled(labels):
    return [label for label in labels if label != -100]


@pytest.mark.parametrize("too_long", ["truncate", "drop", "split"])
def test_what_fits_is_left_alone(too_long):
    ids, labels = sample(4, 4)
    assert fit_length(ids, labels, 8, too_long) == [(ids, labels)]


def test_the_prompt_loses_its_middle_first():
    assert shorten(*sample(8, 3), 7) == ([0, 1, 6, 7, 8, 9, 10], [-100] * 4 + [8, 9, 10])


def test_truncating_makes_one_sample_dropping_none():
    assert fit_length(*sample(8, 3), 7, "truncate") == [shorten(*sample(8, 3), 7)]
    assert fit_length(*sample(8, 3), 7, "drop") == []


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


def test_each_later_piece_begins_with_a_quarter_of_the_one_before_as_context():
    assert fit_length(*sample(3, 14), 8, "split") == [
        ([0, 1, 2, 3, 4, 5, 6, 7], [-100, -100, -100, 3, 4, 5, 6, 7]),
        ([6, 7, 8, 9, 10, 11, 12, 13], [-100, -100, 8, 9, 10, 11, 12, 13]),
        ([12, 13, 14, 15, 16], [-100, -100, 14, 15, 16]),
    ]


def test_a_piece_without_labels_is_left_out():
    assert fit_length(*sample(9, 2), 8, "split") == [([6, 7, 8, 9, 10], [-100, -100, -100, 9, 10])]
    assert fit_length(*sample(4, 4, tail=5), 8, "split") == [sample(4, 4)]
    assert fit_length(*sample(9, 0), 8, "split") == []


@pytest.mark.parametrize("max_length", range(2, 14))
def test_pieces_train_each_labelled_token_once_after_what_stood_before_it(max_length):
    rng = random.Random(max_length)
    for _ in range(100):
        ids, labels = random_sample(rng)
        pieces = fit_length(ids, labels, max_length, "split")
        assert [label for _, piece in pieces for label in labelled(piece)] == labelled(labels)
        for piece_ids, piece_labels in pieces:
            assert 1 < len(piece_ids) == len(piece_labels) <= max_length or (piece_ids, piece_labels) == (ids, labels)
            assert piece_labels[0] == -100
            windows = [ids[at : at + len(piece_ids)] for at in range(len(ids))]
            assert piece_ids in windows  # true context, nothing left out
            assert all(label in (-100, token) for token, label in zip(piece_ids, piece_labels, strict=True))


@pytest.mark.parametrize("too_long", ["truncate", "split"])
def test_a_stop_token_is_trained_only_after_the_token_it_ended(too_long):
    rng = random.Random(0)
    for _ in range(300):
        ids, labels = random_sample(rng)
        true_ends = {(ids[at - 1], STOP) for at in range(1, len(ids)) if labels[at] == STOP}
        for piece_ids, piece_labels in fit_length(ids, labels, 8, too_long):
            ends = {(piece_ids[at - 1], STOP) for at in range(1, len(piece_ids)) if piece_labels[at] == STOP}
            assert ends <= true_ends


@pytest.mark.parametrize("too_long", ["truncate", "drop", "split"])
def test_less_than_two_tokens_are_refused(too_long):
    with pytest.raises(UserError, match="max_length: expected at least 2"):
        fit_length([1, 2], [-100, 2], 1, too_long)


def test_another_word_is_refused():
    with pytest.raises(UserError, match="too_long: expected truncate, drop, split, found 'cut'"):
        fit_length([1, 2], [-100, 2], 2, "cut")
