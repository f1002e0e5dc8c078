from types import SimpleNamespace

import pytest
from lightning.pytorch.loops.progress import _ProcessedTracker as _Counts
from lightning.pytorch.loops.progress import _Progress

from qlora_lightning.model.checkpoint.resume import (
    count_epoch,
    is_inside_batch,
    let_validation_follow,
    validation_follows,
)


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


def counts(ready, started, processed, completed):
    return {"ready": ready, "started": started, "processed": processed, "completed": completed}


def checkpoint(batch, validation=None, epoch=None):
    """As Lightning lays out its loops; each part as (total, current, is_last_batch)."""

    def part(total, current, is_last_batch):
        return {"total": total, "current": current, "is_last_batch": is_last_batch}

    none = (counts(0, 0, 0, 0), counts(0, 0, 0, 0), False)
    loops = {
        "epoch_progress": {"current": epoch or counts(1, 1, 0, 0)},
        "epoch_loop.batch_progress": part(*batch),
        "epoch_loop.val_loop.batch_progress": part(*(validation or none)),
    }
    return {"loops": {"fit_loop": loops}}


def validation_of(content):
    return content["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]


ENDED = (counts(4, 4, 4, 4), counts(4, 4, 4, 4), False)  # four batches, with all that follows them
AT_ITS_END = (counts(4, 4, 4, 3), counts(4, 4, 4, 3), False)  # in on_train_batch_end of the fourth


def test_from_inside_a_validation_it_begins_with_its_first_batch_behind_those_of_earlier_ones():
    # the second batch of the epoch's second validation, of five batches each
    content = checkpoint(ENDED, (counts(7, 7, 7, 6), counts(2, 2, 2, 1), True))
    let_validation_follow(trainer(validating=True, training=False), content)
    expected = {"total": counts(6, 6, 5, 5), "current": counts(1, 1, 0, 0), "is_last_batch": False}
    assert validation_of(content) == expected


def test_from_the_end_of_a_validation_it_is_not_begun_again():
    ended = (counts(5, 5, 5, 5), counts(5, 5, 5, 5), True)
    content = checkpoint(ENDED, ended)
    let_validation_follow(trainer(validating=True, training=False), content)
    assert content == checkpoint(ENDED, ended)


def test_from_the_end_of_a_batch_a_due_validation_follows():
    content = checkpoint(AT_ITS_END, (counts(5, 5, 5, 5), counts(5, 5, 5, 5), True))
    let_validation_follow(trainer(validating=False, training=True), content)
    expected = {"total": counts(6, 6, 5, 5), "current": counts(1, 1, 0, 0), "is_last_batch": False}
    assert validation_of(content) == expected
    assert content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"] == counts(4, 4, 4, 4)


@pytest.mark.parametrize("batch", [ENDED, (counts(3, 3, 3, 2), counts(3, 3, 3, 2), False)])
def test_where_no_validation_is_due_nothing_changes(batch):
    content = checkpoint(batch)
    let_validation_follow(trainer(validating=False, training=True), content)
    assert content == checkpoint(batch)


@pytest.mark.parametrize(
    ("batch", "epoch", "expected"),
    [
        (ENDED, None, False),
        (AT_ITS_END, None, False),
        ((counts(5, 4, 4, 4), counts(5, 4, 4, 4), False), None, True),  # in on_train_batch_start
        ((counts(5, 5, 4, 4), counts(5, 5, 4, 4), False), None, True),  # in its step
        (ENDED, counts(2, 1, 1, 1), True),  # in on_train_epoch_start
    ],
)
def test_the_inside_of_a_batch_is_known(batch, epoch, expected):
    assert is_inside_batch(checkpoint(batch, epoch=epoch)) is expected


def test_an_epoch_that_was_not_counted_is_counted_once():
    loop = SimpleNamespace(epoch_progress=_Progress())
    made = trainer(fit_loop=loop)
    loop.epoch_progress.current = _Counts(ready=1, started=1, processed=1, completed=1)  # as after such a resume
    count_epoch(made)
    count_epoch(made)
    assert loop.epoch_progress.current == _Counts(ready=2, started=2, processed=1, completed=1)
