"""Lightning's counters in a checkpoint; `tests/callbacks/test_hook_boundaries.py` resumes from such in real runs."""

import copy
from types import SimpleNamespace

import pytest

from qlora_lightning.model.checkpoint.loops import (
    is_inside_batch,
    is_inside_epoch,
    leave_validation_out,
    lengthen_stream,
    let_validation_follow,
)


def trainer(**options):
    defaults = {
        "enable_validation": True,
        "check_val_every_n_epoch": 1,
        "current_epoch": 0,
        "val_check_batch": 4,
        "val_check_interval": 1.0,
        "is_last_batch": False,
        "training": False,
        "validating": False,
        "max_steps": 9,
    }
    return SimpleNamespace(**(defaults | options))


def part(ready, started, processed, completed, is_last_batch=False, behind=0):
    """A counter; of so many batches of earlier validations ``total`` tells."""
    current = {"ready": ready, "started": started, "processed": processed, "completed": completed}
    total = {name: count + behind for name, count in current.items()}
    return {"total": total, "current": current, "is_last_batch": is_last_batch}


IDLE = part(0, 0, 0, 0)
FIRST_EPOCH = part(1, 1, 0, 0)
STARTING_EPOCH = part(2, 1, 1, 1)
ENDED = part(4, 4, 4, 4)  # four batches, with all that follows them
LAST = part(4, 4, 4, 4, is_last_batch=True)
AT_ITS_END = part(4, 4, 4, 3)  # in on_train_batch_end of the fourth


def checkpoint(batches=ENDED, validation=IDLE, epochs=FIRST_EPOCH):
    loops = {
        "epoch_progress": epochs,
        "epoch_loop.batch_progress": batches,
        "epoch_loop.val_loop.batch_progress": validation,
    }
    return copy.deepcopy({"loops": {"fit_loop": loops}, "global_step": 4})


@pytest.mark.parametrize(
    ("batches", "epochs", "inside_batch", "inside_epoch"),
    [
        (IDLE, part(1, 1, 0, 0), False, False),
        (ENDED, FIRST_EPOCH, False, True),
        (LAST, FIRST_EPOCH, False, False),
        (AT_ITS_END, FIRST_EPOCH, False, True),
        (part(5, 4, 4, 4), FIRST_EPOCH, True, True),  # in on_train_batch_start
        (part(5, 5, 4, 4), FIRST_EPOCH, True, True),  # in its step
        (LAST, STARTING_EPOCH, True, False),  # in on_train_epoch_start
    ],
)
def test_the_inside_of_a_batch_and_of_an_epoch_is_known(batches, epochs, inside_batch, inside_epoch):
    content = checkpoint(batches, epochs=epochs)
    assert (is_inside_batch(content), is_inside_epoch(content)) == (inside_batch, inside_epoch)


JUDGED = part(5, 5, 5, 5, is_last_batch=True)  # a validation that has ended
IN_SECOND = part(2, 2, 2, 1, behind=5)  # inside the epoch's second validation
AGAIN = {**part(1, 1, 0, 0), "total": part(6, 6, 5, 5)["total"]}  # in its first batch
LAST_AT_ITS_END = part(4, 4, 4, 3, is_last_batch=True)


@pytest.mark.parametrize(
    ("mend", "options", "before", "after"),
    [
        # a validation in work, or due, begins with its first batch, behind those of earlier ones
        (let_validation_follow, {"validating": True}, (ENDED, IN_SECOND), (ENDED, AGAIN)),
        (let_validation_follow, {"validating": True}, (ENDED, JUDGED), (ENDED, JUDGED)),
        (let_validation_follow, {"training": True}, (AT_ITS_END, JUDGED), (ENDED, AGAIN)),
        (let_validation_follow, {"training": True}, (ENDED, IDLE), (ENDED, IDLE)),
        (let_validation_follow, {"training": True}, (part(3, 3, 3, 2), IDLE), (part(3, 3, 3, 2), IDLE)),
        # behind an epoch that no validation ends any more, it is as in its last batch
        (leave_validation_out, {}, (LAST, JUDGED), (LAST, JUDGED)),
        (leave_validation_out, {"enable_validation": False}, (LAST, JUDGED), (LAST_AT_ITS_END, JUDGED)),
        (leave_validation_out, {"val_check_interval": 3}, (LAST, JUDGED), (LAST_AT_ITS_END, JUDGED)),
        (leave_validation_out, {"enable_validation": False}, (ENDED, JUDGED), (ENDED, JUDGED)),
        # a stream is one epoch: with more steps to take, its last batch is not the last
        (lengthen_stream, {}, (LAST, JUDGED), (ENDED, JUDGED)),
        (lengthen_stream, {"max_steps": 4}, (LAST, JUDGED), (LAST, JUDGED)),
    ],
)
def test_counters_that_would_mislead_a_resume_are_mended(mend, options, before, after):
    content = checkpoint(*before)
    mend(trainer(**options), content)
    assert content == checkpoint(*after)
