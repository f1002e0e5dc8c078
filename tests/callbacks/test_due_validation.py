from types import SimpleNamespace

import pytest

from qlora_lightning.callbacks.due_validation import rewind_validation, validation_follows


def trainer(**options):
    defaults = {
        "enable_validation": True,
        "check_val_every_n_epoch": 1,
        "current_epoch": 0,
        "val_check_batch": 4,
        "is_last_batch": False,
        "fit_loop": SimpleNamespace(total_batch_idx=0),
    }
    return SimpleNamespace(**(defaults | options))


@pytest.mark.parametrize(
    ("batch_idx", "options", "expected"),
    [
        (3, {}, True),
        (2, {}, False),
        (3, {"enable_validation": False}, False),
        (3, {"check_val_every_n_epoch": 2}, False),
        (3, {"check_val_every_n_epoch": 2, "current_epoch": 1}, True),
        (0, {"check_val_every_n_epoch": None, "fit_loop": SimpleNamespace(total_batch_idx=11)}, True),
        (9, {"val_check_batch": float("inf")}, False),
        (9, {"val_check_batch": float("inf"), "is_last_batch": True}, True),
    ],
)
def test_a_validation_follows_where_lightning_will_run_one(batch_idx, options, expected):
    assert validation_follows(trainer(**options), batch_idx) is expected


def test_a_rewound_validation_has_its_first_batch_in_work_and_the_earlier_ones_of_the_epoch_done():
    def counts(ready, started, processed, completed):
        return {"ready": ready, "started": started, "processed": processed, "completed": completed}

    # the second batch of the second validation, of five batches each
    progress = {"total": counts(7, 7, 7, 6), "current": counts(2, 2, 2, 1), "is_last_batch": True}
    rewind_validation({"loops": {"fit_loop": {"epoch_loop.val_loop.batch_progress": progress}}})
    assert progress == {"total": counts(6, 6, 5, 5), "current": counts(1, 1, 0, 0), "is_last_batch": False}
