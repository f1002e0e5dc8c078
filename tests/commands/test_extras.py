"""What comes from Lightning and PEFT and is only configured here: early stopping, and going on with an adapter."""

import json
import logging
import signal

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
}
ASKING = """
import os
import signal

import lightning


class Ask(lightning.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if os.environ.get("ASK") and trainer.global_step == 9:
            os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.fixture
def fit(tiny_base, rows_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    (tmp_path / "tiny").symlink_to(tiny_base)
    (tmp_path / "asking.py").write_text(ASKING)
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "callbacks": [{"class_path": "asking.Ask"}, STOPPING]}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))

    def run(folder, *arguments, code=0):
        assert main(["fit", "--config", "c.yaml", "--trainer.default_root_dir", folder, *arguments]) == code
        capsys.readouterr()
        return torch.load(tmp_path / folder / "checkpoints" / "last.ckpt", weights_only=True)

    yield run
    logging.getLogger("qlora_lightning").handlers.clear()


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
def test_early_stopping_by_config_counts_on_where_a_run_goes_on(fit, tmp_path, monkeypatch):
    peace = fit("peace")
    assert peace["global_step"] == 3 * 4  # validations behind 4, 8 and 12 of 24 steps
    monkeypatch.setenv("ASK", "1")
    assert fit("run", code=128 + signal.SIGTERM)["global_step"] == 10
    monkeypatch.delenv("ASK")
    ended = fit("run", "--ckpt_path", "last")
    assert ended["global_step"] == 12
    assert all(torch.equal(ended["state_dict"][name], peace["state_dict"][name]) for name in peace["state_dict"])
    states = [next(s for n, s in c["callbacks"].items() if n.startswith("EarlyStopping")) for c in (ended, peace)]
    assert states[0] == states[1]
    assert states[0]["stopped_epoch"] == 1


def test_a_run_that_is_stopped_early_says_so_and_why(fit, tmp_path, capsys):
    assert main(["fit", "--config", "c.yaml", "--trainer.default_root_dir", "run"]) == 0
    why = "Monitored metric val_loss did not improve in the last 2 records."
    assert f"Stopped early, at step 12: {why}" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["stopped_early"].startswith(why)
    assert (manifest["progress"]["steps"], manifest["progress"]["planned_steps"]) == (12, 24)
    assert why in (tmp_path / "run" / "report.html").read_text()
    fit("last", "--trainer.max_steps", "12")  # it would have ended there anyhow
    assert json.loads((tmp_path / "last" / "manifest.json").read_text())["stopped_early"] is None
    fit("whole", "--trainer.max_steps", "4")
    assert json.loads((tmp_path / "whole" / "manifest.json").read_text())["stopped_early"] is None


def test_a_run_that_was_stopped_early_goes_on_with_more_patience(fit, tmp_path, capsys):
    assert fit("run")["global_step"] == 12
    text = (tmp_path / "c.yaml").read_text()
    (tmp_path / "c.yaml").write_text(text.replace("patience: 2", "patience: 9"))
    assert main(["fit", "--config", "c.yaml", "--trainer.default_root_dir", "run", "--ckpt_path", "last"]) == 0
    assert "EarlyStopping(val_loss).patience: 2 → 9" in capsys.readouterr().out
    ended = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert ended["global_step"] == 24


def test_early_stopping_counts_on_behind_the_validation_of_a_whole_epoch(fit):
    whole = ("--trainer.val_check_interval", "1.0")
    peace = fit("peace", *whole, "--trainer.max_epochs", "6")
    assert peace["global_step"] == 3 * 8  # validations behind each of 6 epochs
    fit("run", *whole, "--trainer.max_epochs", "1")
    fit("run", *whole, "--trainer.max_epochs", "2", "--ckpt_path", "last")
    ended = fit("run", *whole, "--trainer.max_epochs", "6", "--ckpt_path", "last")
    assert ended["global_step"] == 3 * 8
    assert all(torch.equal(ended["state_dict"][name], peace["state_dict"][name]) for name in peace["state_dict"])
    states = [next(s for n, s in c["callbacks"].items() if n.startswith("EarlyStopping")) for c in (ended, peace)]
    assert states[0] == states[1]


def test_training_goes_on_with_an_adapter_folder_by_its_key(fit, tmp_path):
    fit("first", "--trainer.max_steps", "4", "--model.rank", "3")
    # a warm-up over the whole run begins with a learning rate of zero: the first step moves nothing
    unmoved = ("--trainer.max_steps", "1", "--model.warmup_ratio", "0.99", "--model.schedule", "linear")
    fit("second", "--model.adapter", "first", "--model.rank", "3", *unmoved)
    first, second = adapter(tmp_path / "first"), adapter(tmp_path / "second")
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    fit("third", "--model.adapter", "first/adapter", "--model.rank", "3", "--trainer.max_steps", "4")
    third = adapter(tmp_path / "third")
    assert not any(torch.equal(first[name], third[name]) for name in first)
