"""What AdapterCheckpoint writes, and when; resumes with other data. Of the same end: distributed/test_resume.py."""

import os
import re
import shutil

import lightning
import pytest
import torch

from qlora_lightning import AdapterCheckpoint, QLoRAModule
from tests.callbacks.conftest import calls
from tests.equality import contents, read_adapter, read_checkpoint, same, tensors_of
from tests.errors import rejects
from tests.rows import counting_rows, write_rows
from tests.steps import trainable_tensors


class Diary(lightning.Callback):
    """What happened at which step: validations and saves."""

    def __init__(self):
        self.entries = []

    def on_validation_end(self, trainer, pl_module):
        self.entries.append(("validation", trainer.global_step))

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.entries.append(("save", trainer.global_step))

    def text(self):
        return ", ".join(f"{what} {step}" for what, step in self.entries)


def checkpoint_names(folder):
    return sorted(file.name for file in (folder / "checkpoints").iterdir())


class HasNoMemoryToValidate(QLoRAModule):
    def compute_loss(self, batch):
        if not self.training and batch.input_ids.numel() > 58:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().compute_loss(batch)


def test_a_validation_row_that_does_not_fit_costs_its_loss_and_not_the_run(fit, make_module, tmp_path, capsys):
    checkpoint = AdapterCheckpoint(monitor="val_perplexity")  # which such a validation has not
    trainer, _ = fit(checkpoint, module=make_module(HasNoMemoryToValidate), max_epochs=2)
    assert trainer.callback_metrics["val_loss"].isnan()
    assert read_checkpoint(tmp_path / "run")["global_step"] == trainer.global_step == 16
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    words = r"at step 16 has no loss\. Out of memory on cpu in one row of \d+ tokens \(.*rows\.jsonl:\d+\)"
    assert re.search(words, capsys.readouterr().out)


def test_a_fit_leaves_a_small_checkpoint_and_an_adapter_folder(fit, make_module, tmp_path):
    _, module = fit(AdapterCheckpoint(), module=make_module(rank=64))
    run, adapter = tmp_path / "run", trainable_tensors(module)
    assert sorted(file.name for file in run.iterdir()) == ["adapter", "checkpoints"]
    assert checkpoint_names(run) == ["last.ckpt", "step-000008.ckpt"]
    assert same(read_checkpoint(run)["state_dict"], adapter)
    adapter_bytes = sum(4 * tensor.numel() for tensor in adapter.values())
    size = (run / "checkpoints" / "last.ckpt").stat().st_size
    assert 3 * adapter_bytes < size < 3 * adapter_bytes + 1_000_000  # A, B and two moments of each, and little else

    assert same(read_adapter(run), tensors_of(run))
    assert {tensor.dtype for tensor in read_adapter(run).values()} == {torch.float32}


NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "options", "kept"),
    [
        ((2.0, 4.0, 1.0, 3.0), {"mode": "min", "save_top_k": 2}, [6, 2]),
        ((2.0, 4.0, 1.0, 3.0), {"mode": "max"}, [4]),
        ((NAN, 4.0, NAN, 5.0), {"mode": "min", "save_top_k": 2}, [4, 8]),  # NaN is never the best
    ],
)
def test_the_best_by_the_monitor_are_kept_and_the_rest_removed(fit, scored, tmp_path, scores, options, kept):
    saved = {}

    def remember(trainer, pl_module, content):
        saved[trainer.global_step] = {name: each.clone() for name, each in content["state_dict"].items()}

    checkpoint = AdapterCheckpoint(monitor="val_score", **options)
    seen = calls(on_save_checkpoint=remember)
    fit(checkpoint, seen, module=scored(*scores), limit_val_batches=1, val_check_interval=2)
    run, best = tmp_path / "run", [name for _, name in checkpoint.best]
    assert best == [f"step-{step:06d}.ckpt" for step in kept]
    assert checkpoint_names(run) == ["last.ckpt", *sorted(best)]
    for name in checkpoint_names(run):
        content = read_checkpoint(run, name)
        assert same(content["state_dict"], saved[content["global_step"]])
    assert same(checkpoint.read_best(run), saved[kept[0]])
    values = {float(tensor.sum()) for tensor in read_adapter(run).values()}
    assert values == {float(tensor.sum()) for tensor in saved[kept[0]].values()}


@pytest.mark.parametrize(
    ("when", "options", "expected"),
    [
        (
            {"every_n_train_steps": 3},
            {"check_val_every_n_epoch": None, "val_check_interval": 6, "max_epochs": 2},
            "save 3, validation 6, save 6, save 9, validation 12, save 12, save 15, save 16",
        ),
        ({}, {"val_check_interval": 6}, "validation 6, save 6, save 8"),
        # at each step, and not inside its window
        pytest.param(
            {"every_minutes": 1e-6},
            {"accumulate_grad_batches": 2},
            "save 1, save 2, save 3, validation 4, save 4",
            marks=pytest.mark.slow,
        ),
        ({"every_minutes": None}, {"accumulate_grad_batches": 2}, "validation 4, save 4"),
        # nobody knows whether a validation by the clock follows
        pytest.param(
            {"every_n_train_steps": 8},
            {"val_check_interval": "00:01:00:00", "max_epochs": 2},
            "save 8, save 16",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_it_saves_once_however_much_is_due_and_never_before_a_validation_that_follows(fit, when, options, expected):
    fit(diary := Diary(), AdapterCheckpoint(**when), **({"limit_val_batches": 1} | options))
    assert diary.text() == expected


def test_a_monitor_that_is_never_logged_is_rejected_at_the_first_validation(fit):
    with rejects("adapter_checkpoint.monitor", "'val_los'", "val_loss, val_perplexity, val_token_accuracy"):
        fit(diary := Diary(), AdapterCheckpoint(4, "val_los", mode="min"))
    assert diary.entries[:1] == [("save", 4)]


@pytest.mark.parametrize(
    "settings",
    [
        *({"monitor": name} for name in ("val_score", "val_neg_loss", "val_inaccuracy")),
        *(
            {"monitor": f"{split}_{name}", "mode": "max"}
            for split in ("train", "val")
            for name in ("loss", "perplexity")
        ),
        *({"monitor": f"val_{name}", "mode": "min"} for name in ("accuracy", "token_accuracy", "exact_match")),
    ],
)
def test_a_mode_that_chooses_no_best_or_the_worst_is_rejected(settings):
    with rejects("adapter_checkpoint.mode", settings["monitor"]):
        AdapterCheckpoint(**settings)


SHORT = {"limit_train_batches": 2, "limit_val_batches": 1}


def test_a_resumed_run_continues_the_ranking_and_in_another_folder_it_starts_over(fit, scored, tmp_path, last):
    def train(score, **options):
        callback = AdapterCheckpoint(monitor="val_score", mode="min")
        fit(callback, module=scored(score), **SHORT, **options)
        return callback.best

    run, options = tmp_path / "run", {"max_epochs": 2, "ckpt_path": last}
    train(1.0)
    before, adapter = contents(run), read_adapter(run)
    assert train(2.0, folder="new", **options) == [(2.0, "step-000004.ckpt")]
    assert same(read_adapter(tmp_path / "new"), tensors_of(tmp_path / "new"))
    assert contents(run) == before
    assert train(2.0, **options) == [(1.0, "step-000002.ckpt")]
    assert checkpoint_names(run) == ["last.ckpt", "step-000002.ckpt"]
    assert same(read_adapter(run), adapter)


RESUMES = [
    ("run", -1, False),
    pytest.param("run", 1, True, marks=pytest.mark.slow),
    pytest.param("new", -1, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("folder", "hours", "stays"), RESUMES)
def test_a_resume_deletes_what_a_kill_has_left_and_nothing_else(fit, scored, tmp_path, last, folder, hours, stays):
    """Not what came after the checkpoint, which is the user's, and nothing of another folder."""
    fit(monitored(), module=scored(2.0, 1.0), val_check_interval=2, max_steps=4, limit_val_batches=1)
    outranked = last.with_name("step-000002.ckpt")
    assert not outranked.exists()
    shutil.copy(last, outranked)
    time = last.stat().st_mtime + 3600 * hours
    os.utime(outranked, (time, time))
    fit(monitored(), max_steps=5, limit_val_batches=1, folder=folder, ckpt_path=last)
    assert outranked.exists() is stays


@pytest.mark.slow
def test_with_another_monitor_the_ranking_starts_over(fit, scored, last, capsys):
    fit(monitored(), module=scored(1.0), **SHORT)
    fit(by_loss := AdapterCheckpoint(), **SHORT, max_epochs=2, ckpt_path=last)
    assert [name for _, name in by_loss.best] == ["step-000004.ckpt"]
    assert "chosen by min val_score: the ranking by min val_loss starts over" in capsys.readouterr().out
    assert same(read_adapter(last.parents[1]), tensors_of(last.parents[1]))


def test_lightning_finds_the_best_checkpoint(fit, scored, last):
    options = {"val_check_interval": 2, "max_steps": 4, "limit_val_batches": 1}
    trainer, module = fit(monitored(), module=scored(1.0, 2.0, 3.0), **options)
    trainer.validate(module, datamodule=trainer.datamodule, ckpt_path="best", verbose=False)
    assert trainer.ckpt_path == str(last.with_name("step-000002.ckpt"))
    assert same(dict(module.state_dict()), read_checkpoint(last.parents[1], "step-000002.ckpt")["state_dict"])


def test_a_stop_that_is_asked_for_inside_a_window_lets_it_end_and_saves_when_it_comes(fit, make_data, tmp_path):
    def stop(trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or batch_idx == 3

    fit(calls(on_train_batch_end=stop), AdapterCheckpoint(), data=make_data(val=None), accumulate_grad_batches=3)
    content = read_checkpoint(tmp_path / "run")
    assert same(read_adapter(tmp_path / "run"), tensors_of(tmp_path / "run"))  # without validation the last is the best
    batches = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert (content["global_step"], batches["processed"]) == (2, 6)
    later = {"min_epochs": 1, "min_steps": 10, "max_epochs": 3, "folder": "later"}  # nothing ends before step 10
    fit(calls(on_train_batch_end=stop), diary := Diary(), AdapterCheckpoint(6), data=make_data(val=None), **later)
    assert diary.text() == "save 6, save 10"


@pytest.mark.slow
def test_a_validation_comes_at_the_end_of_a_step_or_is_rejected_before_training(fit):
    trainer, _ = fit(accumulate_grad_batches=3, val_check_interval=4)
    assert trainer.val_check_batch == 3
    with rejects("trainer.val_check_interval"):
        fit(accumulate_grad_batches=3, val_check_interval=4, check_val_every_n_epoch=None)


@pytest.mark.slow
def test_the_trainer_that_made_a_run_may_continue_it_and_no_other(fit, tmp_path):
    trainer, module = fit(AdapterCheckpoint(), **SHORT)
    before = contents(tmp_path / "run")
    with rejects(
        "run_folder.has_a_run", "--ckpt_path last", f"in Python ckpt_path='{tmp_path}/run/checkpoints/last.ckpt'"
    ):
        fit(AdapterCheckpoint(), **SHORT)
    fit(AdapterCheckpoint(enabled=False, monitor="none"), **SHORT)
    assert contents(tmp_path / "run") == before
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, datamodule=trainer.datamodule)
    assert read_checkpoint(tmp_path / "run")["global_step"] == 4


# ---- other data than the checkpoint's --------------------------------------------------------------------------------


class Rows(lightning.Callback):
    """Which rows each epoch trained."""

    def __init__(self):
        self.of_epoch = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.of_epoch.setdefault(trainer.current_epoch, []).extend(batch["row_ids"].tolist())


@pytest.fixture
def more_rows(tmp_path):
    more = [{"instruction": f"Add {n} and {n}.", "output": str(2 * n)} for n in range(4)]
    return str(write_rows(tmp_path / "more.jsonl", [*counting_rows(), *more]))


def monitored():
    return AdapterCheckpoint(monitor="val_score", mode="min")


@pytest.mark.slow
def test_other_training_samples_are_rejected_unless_meant_at_an_epochs_end(fit, make_data, more_rows, scored, last):
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


@pytest.mark.slow
def test_an_epoch_behind_a_resume_has_all_of_its_rows_in_smaller_batches_too(fit, make_data, last):
    fit(AdapterCheckpoint(), data=make_data(val=None))
    rows, data = Rows(), make_data(val=None, batch_size=1)
    fit(rows, AdapterCheckpoint(), data=data, ckpt_path=last, max_epochs=2)
    assert {epoch: sorted(own) for epoch, own in rows.of_epoch.items()} == {1: list(range(16))}


@pytest.mark.slow
def test_with_other_validation_samples_the_ranking_starts_over(fit, make_data, more_rows, scored, last):
    fit(monitored(), module=scored(1.0))
    with rejects("data.accept_changed_data", "validation samples (16 there, 20 here)", "starts over"):
        fit(AdapterCheckpoint(), data=make_data(val=more_rows), ckpt_path=last, max_epochs=2)
    checkpoint, data = monitored(), make_data(val=more_rows, accept_changed_data=True)
    fit(checkpoint, module=scored(2.0), data=data, ckpt_path=last, max_epochs=2)
    assert checkpoint.best == [(2.0, "step-000016.ckpt")]
    assert same(read_adapter(last.parents[1]), tensors_of(last.parents[1], "step-000016.ckpt"))


@pytest.mark.slow
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
