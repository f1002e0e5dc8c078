"""A run resumes with other data than its checkpoint's only if that is meant, and then ranks only what compares."""

import json

import lightning
import pytest
import torch

from qlora_lightning import AdapterCheckpoint
from qlora_lightning.support.errors import UserError
from tests.equality import read_adapter, read_checkpoint


class Rows(lightning.Callback):
    """Which rows each micro-batch held, by epoch."""

    def __init__(self):
        self.of_epoch = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.of_epoch.setdefault(trainer.current_epoch, []).extend(batch["row_ids"].tolist())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def last(folder):
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture
def more_rows(rows_file, tmp_path):
    """The sixteen rows and four more."""
    more = [json.dumps({"instruction": f"Add {n} and {n}.", "output": str(2 * n)}) + "\n" for n in range(4)]
    (tmp_path / "more.jsonl").write_text(rows_file.read_text() + "".join(more))
    return str(tmp_path / "more.jsonl")


def monitored():
    return AdapterCheckpoint(monitor="val_score", mode="min")


def same_adapter(folder, checkpoint):
    stored, written = read_checkpoint(folder, checkpoint)["state_dict"], read_adapter(folder)
    names = {name: name.removeprefix("model.").replace(".default.", ".") for name in stored}
    return all(torch.equal(written[names[name]], tensor) for name, tensor in stored.items())


def test_other_training_samples_are_rejected_at_an_epochs_end_unless_they_are_meant(
    fit, make_data, more_rows, scored, folder, last
):
    fit(monitored(), module=scored(1.0))
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"other training samples \(16 there, 20 here\)") as error:
        fit(AdapterCheckpoint(), data=make_data(train=more_rows), ckpt_path=last, max_epochs=2)
    assert "data.accept_changed_data true" in str(error.value)
    assert "other validation samples (" not in str(error.value)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before

    rows, checkpoint = Rows(), monitored()
    data = make_data(train=more_rows, accept_changed_data=True)
    fit(rows, checkpoint, module=scored(2.0), data=data, ckpt_path=last, max_epochs=2)
    assert sorted(rows.of_epoch[1]) == list(range(20))
    assert rows.of_epoch.keys() == {1}
    assert read_checkpoint(folder)["global_step"] == 8 + 10
    assert checkpoint.best == [(1.0, "step-000008.ckpt")]
    assert same_adapter(folder, "step-000008.ckpt")

    with pytest.raises(UserError, match=r"other training samples \(20 there, 16 here\)"):  # they are the run's own now
        fit(AdapterCheckpoint(), ckpt_path=last, max_epochs=3)


def test_with_other_validation_samples_the_ranking_starts_over(fit, make_data, more_rows, scored, folder, last, capsys):
    fit(monitored(), module=scored(1.0))
    with pytest.raises(UserError, match=r"other validation samples \(16 there, 20 here\).*ranking .* starts over"):
        fit(AdapterCheckpoint(), data=make_data(val=more_rows), ckpt_path=last, max_epochs=2)

    checkpoint, data = monitored(), make_data(val=more_rows, accept_changed_data=True)
    capsys.readouterr()
    fit(checkpoint, module=scored(2.0), data=data, ckpt_path=last, max_epochs=2)
    best = last.with_name("step-000008.ckpt")
    assert f"starts over here. The best so far, with val_score 1, is {best}.\n" in capsys.readouterr().out
    assert checkpoint.best == [(2.0, "step-000016.ckpt")]
    assert same_adapter(folder, "step-000016.ckpt")
    assert best.exists()


def test_inside_an_epoch_only_other_validation_samples_may_be_meant(fit, make_data, more_rows, folder, last):
    fit(AdapterCheckpoint(), max_steps=3, max_epochs=-1)
    with pytest.raises(UserError, match="inside an epoch with other training samples"):
        fit(AdapterCheckpoint(), data=make_data(train=more_rows, accept_changed_data=True), ckpt_path=last)
    fit(AdapterCheckpoint(), data=make_data(val=more_rows, accept_changed_data=True), ckpt_path=last)
    assert read_checkpoint(folder)["global_step"] == 8


def test_other_validations_are_rejected_at_an_epochs_end_and_reported_inside_it(fit, last, capsys):
    fit(AdapterCheckpoint(), limit_train_batches=4)
    words = r"validations were others: trainer\.limit_val_batches: 1\.0 → 0\. Put that back"
    with pytest.raises(UserError, match=words):
        fit(AdapterCheckpoint(), ckpt_path=last, max_epochs=2, limit_val_batches=0)
    fit(AdapterCheckpoint(), folder="inside", max_steps=3)
    inside = last.parents[2] / "inside" / "checkpoints" / "last.ckpt"
    fit(AdapterCheckpoint(), folder="inside", ckpt_path=inside, val_check_interval=4)
    assert "trainer.val_check_interval: 1.0 → 4" in capsys.readouterr().out
