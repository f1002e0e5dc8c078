"""A run goes on with other data than its checkpoint's only if that is said, and then compares only what compares."""

import json

import lightning
import pytest
import torch
from safetensors.torch import load_file

from qlora_lightning import AdapterCheckpoint
from qlora_lightning.support.errors import UserError


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
    more = [{"instruction": f"Add {n} and {n}.", "output": str(2 * n)} for n in range(4)]
    file = tmp_path / "more.jsonl"
    file.write_text(rows_file.read_text() + "".join(json.dumps(row) + "\n" for row in more))
    return str(file)


def monitored():
    return AdapterCheckpoint(monitor="val_score")


def step_of(file):
    return torch.load(file, weights_only=True)["global_step"]


def same_adapter(folder, checkpoint):
    stored = torch.load(folder / "checkpoints" / checkpoint, weights_only=True)["state_dict"]
    written = load_file(folder / "adapter" / "adapter_model.safetensors")
    names = {name: name.removeprefix("model.").replace(".default.", ".") for name in stored}
    return all(torch.equal(written[names[name]], tensor) for name, tensor in stored.items())


def test_other_training_samples_are_refused_at_an_epochs_end_and_go_on_where_that_is_meant(
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
    assert step_of(last) == 8 + 10
    assert checkpoint.best == [(1.0, "step-000008.ckpt")]
    assert same_adapter(folder, "step-000008.ckpt")

    data = make_data(
        train=more_rows
    )  # what was meant once is the run's own now, and asked for again at the next change
    fit(monitored(), module=scored(3.0), data=data, ckpt_path=last, max_epochs=3)
    with pytest.raises(UserError, match=r"other training samples \(20 there, 16 here\)"):
        fit(AdapterCheckpoint(), ckpt_path=last, max_epochs=4)


def test_with_other_validation_samples_the_ranking_begins_anew(fit, make_data, more_rows, scored, folder, last, capsys):
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

    again = monitored()  # the ranking goes on from there
    fit(again, module=scored(3.0), data=make_data(val=more_rows), ckpt_path=last, max_epochs=3)
    assert again.best == [(2.0, "step-000016.ckpt")]


def test_inside_an_epoch_other_training_samples_are_refused_always_and_others_to_validate_on_are_not(
    fit, make_data, more_rows, last
):
    fit(AdapterCheckpoint(), max_steps=3, max_epochs=-1)
    with pytest.raises(UserError, match="inside an epoch with other training samples"):
        fit(AdapterCheckpoint(), data=make_data(train=more_rows, accept_changed_data=True), ckpt_path=last)
    with pytest.raises(UserError, match="other validation samples"):
        fit(AdapterCheckpoint(), data=make_data(val=more_rows), ckpt_path=last)
    fit(AdapterCheckpoint(), data=make_data(val=more_rows, accept_changed_data=True), ckpt_path=last)
    assert step_of(last) == 8


@pytest.mark.parametrize(
    "how",
    [{"limit_val_batches": 0}, {"data": None}, {"check_val_every_n_epoch": 3}, {"val_check_interval": 3}],
    ids=str,
)
def test_a_run_that_is_no_longer_validated_goes_on_as_one_that_never_was(fit, make_data, folder, last, capsys, how):
    whole = {"max_epochs": 2, "limit_val_batches": 0}
    _, expected = fit(AdapterCheckpoint(), folder="whole", **whole)
    fit(AdapterCheckpoint())
    if "data" in how:
        how = {"data": make_data(val=None)}
    capsys.readouterr()
    rows = Rows()
    _, module = fit(rows, checkpoint := AdapterCheckpoint(), ckpt_path=last, max_epochs=2, **how)
    assert sorted(rows.of_epoch[1]) == list(range(16))
    assert rows.of_epoch.keys() == {1}
    assert step_of(last) == 16
    tensors, wanted = module.state_dict(), expected.state_dict()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    if not {"check_val_every_n_epoch", "val_check_interval"} & how.keys():
        assert "Nothing is validated any more: the ranking of checkpoints starts over here. The best so far, with" in (
            capsys.readouterr().out
        )
        assert checkpoint.best == []
        assert same_adapter(folder, "last.ckpt")


@pytest.mark.parametrize("validates", [0, 1])
def test_a_stream_goes_on_to_more_steps_and_names_no_flag_where_its_rows_changed(
    fit, make_data, more_rows, last, capsys, validates
):
    def stream(**options):
        return make_data(streaming=True, **options)

    options = {"limit_val_batches": validates}
    _, expected = fit(AdapterCheckpoint(), data=stream(), folder="whole", max_steps=5, **options)
    fit(AdapterCheckpoint(), data=stream(), max_steps=3, **options)
    capsys.readouterr()
    _, module = fit(AdapterCheckpoint(), data=stream(), ckpt_path=last, max_steps=5, **options)
    assert step_of(last) == 5
    tensors, wanted = module.state_dict(), expected.state_dict()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert "Nothing is left" not in capsys.readouterr().out
    for accepted in (False, True):
        data = stream(train=more_rows, accept_changed_data=accepted)
        with pytest.raises(UserError, match="inside an epoch with other training samples") as error:
            fit(AdapterCheckpoint(), data=data, ckpt_path=last, max_steps=7, **options)
        assert "begin a new run from the adapter folder" in str(error.value)
