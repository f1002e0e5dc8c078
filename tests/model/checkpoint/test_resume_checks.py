import pytest

from qlora_lightning.model.checkpoint.resume import check_window, leaves_validation_out
from qlora_lightning.support.errors import UserError


def content(accumulate, done):
    return {"trainer": {"accumulate_grad_batches": accumulate}, "window": {"micro_batches": done} if done else {}}


@pytest.mark.parametrize(("before", "now", "done"), [(4, 4, 3), (4, 2, 0), (None, 2, 1)])
def test_a_window_may_be_closed_as_it_was_opened_and_change_where_none_is_open(before, now, done):
    stored = content(before, done) if before else {**content(before, done), "trainer": {}}  # of an older version
    check_window(stored, now)


@pytest.mark.parametrize("now", [2, 8])
def test_an_open_window_keeps_its_number_of_micro_batches(now):
    with pytest.raises(
        UserError, match=rf"accumulate_grad_batches was 4 and is {now}, .*after 3 of its 4 .*Set it to 4"
    ):
        check_window(content(4, 3), now)


@pytest.mark.parametrize(
    ("ready", "max_steps", "left_out"),
    [
        (1, 6, True),
        (1, 5, True),  # a shorter run than the checkpoint's
        (1, 7, False),  # a step is left, before which the validation is run
        (1, -1, False),
        (0, 6, False),
    ],
)
def test_a_validation_behind_the_last_step_is_left_out(ready, max_steps, left_out):
    validation = {"epoch_loop.val_loop.batch_progress": {"current": {"ready": ready, "completed": 0}}}
    assert leaves_validation_out({"global_step": 6, "loops": {"fit_loop": validation}}, max_steps) is left_out
