"""What comes from Lightning and PEFT and is only configured here: early stopping, loggers, training an adapter on."""

import csv
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qlora_lightning.cli import main
from qlora_lightning.commands import training  # noqa: F401  # here, and not inside a test, whose stderr it would keep

# No loss falls by 100: of the validations after the first, the second one without progress stops the run.
STOPPING = {
    "class_path": "lightning.pytorch.callbacks.EarlyStopping",
    "init_args": {"monitor": "val_loss", "patience": 2, "min_delta": 100.0},
}
CONFIG = {
    "model": {"base": "tiny", "rank": 2, "learning_rate": 0.01, "schedule": "constant", "warmup_ratio": 0.0},
    "data": {"train": "rows.jsonl", "val": "rows.jsonl", "batch_size": 2},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "val_check_interval": 4,
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
        "callbacks": [STOPPING],
    },
    "evaluation": {"enabled": False},
}
LOGGER = {
    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
    "init_args": {"save_dir": "tensorboard", "name": "", "version": ""},
}


@pytest.fixture
def fit(tiny_base, rows_file, tmp_path, monkeypatch, capsys):
    """Run `fit` in a folder; gives its last checkpoint, with what was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    (tmp_path / "tiny").symlink_to(tiny_base)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))

    def run(folder, *arguments):
        assert main(["fit", "--config", "c.yaml", "--trainer.default_root_dir", folder, *arguments]) == 0
        last = torch.load(tmp_path / folder / "checkpoints" / "last.ckpt", weights_only=True)
        return {**last, "printed": capsys.readouterr().out}

    return run


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def assert_same_end(one, other):
    assert all(torch.equal(one["state_dict"][name], tensor) for name, tensor in other["state_dict"].items())
    stopping = [next(s for n, s in run["callbacks"].items() if n.startswith("EarlyStopping")) for run in (one, other)]
    assert stopping[0] == stopping[1]


def test_early_stopping_counts_on_when_a_run_is_resumed(fit):
    each_epoch = ("--trainer.val_check_interval", "1.0", "--trainer.limit_train_batches", "2")
    whole = fit("whole", *each_epoch, "--trainer.max_epochs", "6")
    assert whole["global_step"] == 3 * 2
    fit("run", *each_epoch, "--trainer.max_epochs", "1")
    fit("run", *each_epoch, "--trainer.max_epochs", "2", "--ckpt_path", "last")
    ended = fit("run", *each_epoch, "--trainer.max_epochs", "6", "--ckpt_path", "last")
    assert ended["global_step"] == 3 * 2
    assert_same_end(ended, whole)


def test_a_run_that_is_stopped_early_says_why_and_continues_with_more_patience(fit, tmp_path):
    why = "Monitored metric val_loss did not improve in the last 2 records."
    assert f"Stopped early, at step 12: {why}" in fit("run")["printed"]
    assert manifest(tmp_path / "run")["stopped_early"].startswith(why)
    assert why in (tmp_path / "run" / "report.html").read_text()
    (tmp_path / "c.yaml").write_text((tmp_path / "c.yaml").read_text().replace("patience: 2", "patience: 9"))
    ended = fit("run", "--ckpt_path", "last")
    assert "EarlyStopping(val_loss).patience: 2 → 9" in ended["printed"]
    assert ended["global_step"] == 24
    assert manifest(tmp_path / "run")["stopped_early"] is None


@pytest.mark.filterwarnings("ignore:.*(pkg_resources|datetime.datetime.utcfromtimestamp).*")
def test_tensorboard_logs_what_the_table_holds_also_after_a_resume(fit, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**CONFIG, "trainer": {**CONFIG["trainer"], "logger": LOGGER}}))
    fit("run", "--trainer.max_steps", "2")
    fit("run", "--trainer.max_steps", "4", "--ckpt_path", "last")
    with (tmp_path / "run" / "metrics.csv").open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["train_loss"]]
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("train_loss")}
    assert logged == {int(row["step"]): pytest.approx(float(row["train_loss"])) for row in rows}
    assert len(rows) == 4


def test_an_adapter_folder_is_trained_on_by_its_key(fit, tmp_path):
    def adapter(folder):
        return load_file(tmp_path / folder / "adapter" / "adapter_model.safetensors")

    fit("first", "--trainer.max_steps", "2", "--model.rank", "3")
    continued = ("--model.adapter", "first", "--model.rank", "3")
    # a warm-up over the whole run begins with a learning rate of zero: the first step moves nothing
    unmoved = ("--trainer.max_steps", "1", "--model.warmup_ratio", "0.99", "--model.schedule", "linear")
    fit("second", *continued, *unmoved)
    first, second = adapter("first"), adapter("second")
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    fit("third", *continued, "--trainer.max_steps", "2")
    third = adapter("third")
    assert not any(torch.equal(first[name], third[name]) for name in first)
