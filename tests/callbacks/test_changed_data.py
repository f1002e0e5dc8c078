"""A run resumes with other data than its checkpoint's only if that is meant, and then ranks only what compares."""

import json

import lightning
import pytest

from qlora_lightning import AdapterCheckpoint
from tests.equality import read_adapter, read_checkpoint, same, tensors_of
from tests.errors import rejects


class Rows(lightning.Callback):
    """Which rows each epoch trained."""

    def __init__(self):
        self.of_epoch = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.of_epoch.setdefault(trainer.current_epoch, []).extend(batch["row_ids"].tolist())


@pytest.fixture
def last(tmp_path):
    return tmp_path / "run" / "checkpoints" / "last.ckpt"


@pytest.fixture
def more_rows(rows_file, tmp_path):
    more = [json.dumps({"instruction": f"Add {n} and {n}.", "output": str(2 * n)}) + "\n" for n in range(4)]
    (tmp_path / "more.jsonl").write_text(rows_file.read_text() + "".join(more))
    return str(tmp_path / "more.jsonl")


def monitored():
    return AdapterCheckpoint(monitor="val_score", mode="min")


def test_other_training_samples_are_rejected_unless_they_are_meant_at_an_epochs_end(
    fit, make_data, more_rows, scored, last
):
    fit(monitored(), module=scored(1.0))
    with rejects("data.accept_changed_data", "training samples (16 there, 20 here)"):
        fit(AdapterCheckpoint(), data=make_data(train=more_rows), ckpt_path=last, max_epochs=2)
    rows, checkpoint = Rows(), monitored()
    data = make_data(train=more_rows, accept_changed_data=True)
    fit(rows, checkpoint, module=scored(2.0), data=data, ckpt_path=last, max_epochs=2)
    assert {epoch: sorted(own) for epoch, own in rows.of_epoch.items()} == {1: list(range(20))}
    assert read_checkpoint(last.parents[1])["global_step"] == 8 + 10
    assert checkpoint.best == [(1.0, "step-000008.ckpt")]
    assert same(read_adapter(last.parents[1]), tensors_of(last.parents[1], "step-000008.ckpt"))
    with rejects("data.accept_changed_data", "training samples (20 there, 16 here)"):  # they are the run's own now
        fit(AdapterCheckpoint(), ckpt_path=last, max_epochs=3)


def test_with_other_validation_samples_the_ranking_starts_over(fit, make_data, more_rows, scored, last):
    fit(monitored(), module=scored(1.0))
    with rejects("data.accept_changed_data", "validation samples (16 there, 20 here)", "starts over"):
        fit(AdapterCheckpoint(), data=make_data(val=more_rows), ckpt_path=last, max_epochs=2)
    checkpoint, data = monitored(), make_data(val=more_rows, accept_changed_data=True)
    fit(checkpoint, module=scored(2.0), data=data, ckpt_path=last, max_epochs=2)
    assert checkpoint.best == [(2.0, "step-000016.ckpt")]
    assert same(read_adapter(last.parents[1]), tensors_of(last.parents[1], "step-000016.ckpt"))


def test_inside_an_epoch_only_validation_may_be_another(fit, make_data, more_rows, last, capsys):
    fit(AdapterCheckpoint(), max_steps=3, max_epochs=-1)
    with rejects("checkpoint.data"):
        fit(AdapterCheckpoint(), data=make_data(train=more_rows, accept_changed_data=True), ckpt_path=last)
    data = make_data(val=more_rows, accept_changed_data=True)
    fit(AdapterCheckpoint(), data=data, ckpt_path=last, val_check_interval=4)
    assert "trainer.val_check_interval: 1.0 → 4" in capsys.readouterr().out
    assert read_checkpoint(last.parents[1])["global_step"] == 8
    with rejects("checkpoint.validations", "trainer.limit_val_batches: 1.0 → 0"):  # at its end
        fit(AdapterCheckpoint(), data=data, ckpt_path=last, max_epochs=2, val_check_interval=4, limit_val_batches=0)
