"""A run folder is kept to one run and one process, and a resumed run continues its files."""

import csv
import multiprocessing
from types import SimpleNamespace

import pytest
import yaml
from lightning.pytorch.loggers.logger import DummyLogger

from qlora_lightning import AdapterCheckpoint
from qlora_lightning.callbacks.metrics_logger import MetricsLogger
from qlora_lightning.callbacks.run_folder import (
    FolderLock,
    RunFolder,
    is_resumed,
    refuse_started_folder,
)
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


@pytest.mark.parametrize(
    "options",
    [
        {},
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


# ---- one run in a folder ----


@pytest.mark.parametrize(
    ("trace", "table", "refused"),
    [
        ("metrics.csv", True, True),
        ("metrics.csv", False, False),
        ("checkpoints/last.ckpt", True, True),
        ("checkpoints/step-000004.ckpt", False, True),
        ("checkpoints/unfinished.ckpt", False, False),  # of a kill during the very first save
    ],
)
def test_a_folder_that_holds_a_run_is_refused_with_the_two_ways_out(tmp_path, trace, table, refused):
    run = tmp_path / "run"
    refuse_started_folder(run, table=table)
    (run / trace).parent.mkdir(parents=True)
    refuse_started_folder(run, table=table)
    (run / trace).touch()
    if not refused:
        refuse_started_folder(run, table=table)
        return
    with pytest.raises(UserError, match=r"run holds a run already.*`--ckpt_path last`.*`--trainer.default_root_dir "):
        refuse_started_folder(run, table=table)


@pytest.mark.parametrize(
    ("file", "own"),
    [
        ("runs/a/checkpoints/last.ckpt", True),
        ("runs/a/../a/checkpoints/step-000004.ckpt", True),
        ("runs/a/hpc_ckpt_1.ckpt", True),
        ("runs/a/mine/epoch.ckpt", True),
        ("runs/b/checkpoints/last.ckpt", False),
        ("runs/a/b/checkpoints/last.ckpt", False),  # of a run in a folder of its own inside
        ("last.ckpt", False),
    ],
)
def test_it_goes_on_from_a_checkpoint_of_its_own_and_no_other(tmp_path, monkeypatch, file, own):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "checkpoints" / "last.ckpt").touch()
    trainer = SimpleNamespace(ckpt_path=file, default_root_dir=str(tmp_path / "runs" / "a"), global_step=0)
    assert is_resumed(trainer) == own
    if own:
        refuse_started_folder("runs/a", file)
        return
    with pytest.raises(UserError, match=f"runs/a holds a run already, which would be lost. {file} is not of it."):
        refuse_started_folder("runs/a", file)


def test_without_a_checkpoint_only_the_trainer_that_has_trained_is_resumed(tmp_path):
    trainer = SimpleNamespace(ckpt_path=None, default_root_dir=tmp_path, global_step=0)
    assert not is_resumed(trainer)
    trainer.global_step = 3
    assert is_resumed(trainer)


# ---- one process in a folder ----


@pytest.fixture
def locks():
    one, other = FolderLock(), FolderLock()
    yield one, other
    one.release()
    other.release()


def test_two_do_not_train_in_one_folder_and_the_next_may_and_no_file_is_left(locks, tmp_path):
    one, other = locks
    one.take(tmp_path / "run")
    other.take(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"^Another process trains in .*/run: wait until it has ended, or choose another folder"
    ):
        other.take(tmp_path / "run")
    one.release()
    other.take(tmp_path / "run")
    assert list((tmp_path / "run").rglob("*")) == [tmp_path / "run" / "checkpoints"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_worker_that_outlives_its_run_holds_nothing(locks, tmp_path):
    locks[0].take(tmp_path)
    context = multiprocessing.get_context("fork")
    began, end = context.Event(), context.Event()
    worker = context.Process(target=lambda: (began.set(), end.wait(60)), daemon=True)
    worker.start()
    assert began.wait(60)
    with pytest.raises(UserError, match="Another process trains"):
        locks[1].take(tmp_path)
    locks[0].release()
    locks[1].take(tmp_path)
    end.set()
    worker.join()


def test_a_folder_that_cannot_be_written_to_is_refused(fit, locks, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match=r"default_root_dir .*run cannot be written to: (File exists|Not a directory)"):
        fit(RunFolder({}), limit_train_batches=1, limit_val_batches=0)
    with pytest.raises(UserError, match=r"default_root_dir .*run cannot be written to: Not a directory\."):
        locks[0].take(tmp_path / "run")
