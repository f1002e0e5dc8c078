import csv
import math
from types import SimpleNamespace

import pytest
import yaml
from lightning.pytorch.loggers.logger import DummyLogger

from qlora_lightning import AdapterCheckpoint
from qlora_lightning.callbacks.metrics_logger import MetricsLogger
from qlora_lightning.callbacks.run_folder import RunFolder, describe_length
from qlora_lightning.support.errors import UserError


def read_metrics(folder):
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_the_config_is_written_at_the_start_of_a_fit(fit, tmp_path):
    config = {"model": {"rank": 2, "alpha": None}, "data": {"system": "Grüße, 日本"}}
    fit(RunFolder(config), limit_train_batches=1, limit_val_batches=0)
    file = tmp_path / "run" / "config.yaml"
    assert yaml.safe_load(file.read_text(encoding="utf-8")) == config
    assert "Grüße, 日本" in file.read_text(encoding="utf-8")


class Kept(DummyLogger):
    def __init__(self, fault=None):
        super().__init__()
        self.fault, self.params = fault, None

    def log_hyperparams(self, params, *args, **kwargs):
        if self.fault:
            raise self.fault
        self.params = params


def test_the_loggers_have_the_config_and_one_that_refuses_it_ends_no_run(fit, capsys):
    logger, refusing = Kept(), Kept(ValueError("rank was 4"))
    trainer, _ = fit(RunFolder({"model": {"rank": 2}}), logger=[refusing, logger], max_steps=1, limit_val_batches=0)
    assert logger.params == {"model": {"rank": 2}}
    assert trainer.global_step == 1
    assert "Kept does not take the config: ValueError: rank was 4" in capsys.readouterr().out


def test_a_trial_run_and_other_stages_write_no_config(fit, make_module, make_data, make_trainer, tmp_path):
    fit(RunFolder({}), fast_dev_run=True)
    make_trainer(RunFolder({})).validate(make_module(), datamodule=make_data(), verbose=False)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"every_n_train_steps": 3},
        pytest.param(
            {"val_check_interval": 3},
        ),
    ],
)
def test_the_metrics_of_a_resumed_run_are_those_of_one_that_never_stopped(fit, killed_fit, tmp_path, options):
    checkpoint = {name: options[name] for name in ("every_n_train_steps",) if name in options}
    common = {"max_epochs": 2, "limit_val_batches": 1, "accumulate_grad_batches": 2}
    common |= {name: value for name, value in options.items() if name not in checkpoint}

    def parts(folder):
        return [RunFolder({}), AdapterCheckpoint(**checkpoint)], {"logger": MetricsLogger(tmp_path / folder)}

    callbacks, logger = parts("whole")
    fit(*callbacks, folder="whole", **logger, **common)
    callbacks, logger = parts("cut")
    killed_fit(*callbacks, after=13, folder="cut", **logger, **common)
    callbacks, logger = parts("cut")
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    fit(*callbacks, folder="cut", ckpt_path=last, **logger, **common)
    whole, cut = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "cut")
    assert [(row["step"], row["train_loss"], row["val_loss"]) for row in cut] == [
        (row["step"], row["train_loss"], row["val_loss"]) for row in whole
    ]


def test_the_metrics_have_a_line_per_step_and_per_validation(fit, tmp_path):
    fit(RunFolder({}), logger=MetricsLogger(tmp_path / "run"), val_check_interval=4, limit_val_batches=1)
    rows = read_metrics(tmp_path / "run")
    training = [row for row in rows if row["train_loss"]]
    assert [row["step"] for row in training] == [str(step) for step in range(8)]
    assert all(math.isfinite(float(row[name])) for row in training for name in ("grad_norm", "learning_rate"))
    assert sum(bool(row["val_loss"]) for row in rows) == 2


def test_a_fit_into_a_folder_that_has_meanwhile_got_a_run_leaves_its_config(fit, tmp_path):
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    with pytest.raises(UserError, match="run holds a run already"):
        fit(RunFolder({}), limit_train_batches=1, limit_val_batches=0)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_folder_that_cannot_be_written_to_is_refused(fit, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match=r"default_root_dir .*run cannot be written to: (File exists|Not a directory)"):
        fit(RunFolder({}), limit_train_batches=1, limit_val_batches=0)


@pytest.mark.parametrize(
    ("max_epochs", "max_steps", "accumulate", "words"),
    [
        (2, -1, 4, None),
        (3, -1, 4, "trainer.max_epochs was 2 and is 3: the schedule is planned anew"),
        (2, -1, 2, "trainer.accumulate_grad_batches was 4 and is 2: the schedule is planned anew"),
        (2, 9, 4, "trainer.max_steps was -1 and is 9: the schedule"),
        (2, 9, 2, "trainer.max_steps was -1 and is 9: the schedule"),  # steps count, however many batches each has
    ],
)
def test_a_new_length_of_the_schedule_is_told(max_epochs, max_steps, accumulate, words):
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.5}])
    lengths = {"max_epochs": max_epochs, "max_steps": max_steps, "accumulate_grad_batches": accumulate}
    now = SimpleNamespace(optimizers=[optimizer], global_step=3, **lengths)
    told = describe_length({"max_epochs": 2, "max_steps": -1, "accumulate_grad_batches": 4, "rate": 0.25}, now)
    assert (told is None) if words is None else told.startswith(words)
    assert words is None or told.endswith("at step 3 with learning rate 0.5 (by the old plan 0.25).")
