from qlora_lightning.data.samples import make_sample, mute


def test_the_first_label_is_dropped_and_a_filler_has_none():
    made = make_sample([5, 6], [5, 6], row_id=3)
    assert made.labels.tolist() == [-100, 6]
    assert (mute(made).labels.tolist(), mute(made).row_id) == ([-100, -100], -1)
