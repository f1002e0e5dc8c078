"""Module and data module in Lightning's own hands: its CLI, its Trainer, its learning-rate finder, Fabric."""

import random
import shutil
import subprocess
import sys
import warnings

import lightning
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.tuner.tuning import Tuner
from lightning.pytorch.utilities import CombinedLoader

from qlora_lightning import AdapterCheckpoint, InstructionDataModule, MetricsLogger, QLoRAModule, default_callbacks
from qlora_lightning.commands.fit import QLoRACLI
from tests.equality import metrics, read_checkpoint, same
from tests.errors import rejects
from tests.steps import make_trainer

_STEADY = {"compute_dtype": "fp32", "learning_rate": 1e-2, "schedule": "constant", "warmup": 0.0}
_QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def test_lightnings_own_cli_trains_from_base_and_rows_alone(tiny_base, rows_file, tmp_path):
    options = {"model.base": tiny_base, "data.train": rows_file, "trainer.default_root_dir": tmp_path}
    options |= {"trainer.max_steps": 2, "trainer.accelerator": "cpu", "trainer.devices": 1}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="jsonargparse|lightning")  # of the bare CLI, not ours
        arguments = ["fit", *(f"--{name}={value}" for name, value in options.items())]
        settings = {"trainer_defaults": _QUIET, "save_config_callback": None}
        cli = LightningCLI(QLoRAModule, InstructionDataModule, args=arguments, **settings)
    assert cli.trainer.global_step == 2
    assert cli.datamodule.tokenizer.name_or_path == str(tiny_base)


def test_a_script_gets_the_callbacks_and_the_table_of_the_command(tiny_base, rows_file, tmp_path):
    trainer = make_trainer(tmp_path / "run", max_steps=2, log_every_n_steps=1, enable_checkpointing=True)
    options = ["--model.base", str(tiny_base), "--data.train", str(rows_file), "--trainer.enable_progress_bar=false"]
    of_command = QLoRACLI([*options, "--trainer.default_root_dir", str(tmp_path)], "fit").trainer.callbacks
    kinds = {type(callback) for callback in default_callbacks()}
    assert kinds == {type(callback) for callback in of_command} - {type(callback) for callback in trainer.callbacks}

    logger = MetricsLogger(tmp_path / "run")
    options = {"max_steps": 2, "log_every_n_steps": 1, "enable_checkpointing": True}
    trainer = make_trainer(tmp_path / "run", logger=logger, callbacks=default_callbacks(), **options)
    data = InstructionDataModule(str(rows_file), str(rows_file), batch_size=8)
    trainer.fit(QLoRAModule(str(tiny_base), **_STEADY), data)
    names = {"adapter", "checkpoints", "evaluation.json", "manifest.json", "metrics.csv", "report.html"}
    assert {file.name for file in (tmp_path / "run").iterdir()} == names  # no config.yaml: there is no config
    assert len(metrics(tmp_path / "run", "train_loss")) == 2


CELLS = """
import lightning, sys
from qlora_lightning import InstructionDataModule, QLoRAModule
print("interactive:", hasattr(sys, "ps1"))
def say(role, text): return {"role": role, "content": text}

def my_rows(row): return [say("user", row["instruction"]), say("assistant", row["output"])]

data = InstructionDataModule("rows.jsonl", val="rows.jsonl", tokenizer="base", batch_size=4, format=my_rows)
module = QLoRAModule("base", compute_dtype="fp32")
trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
trainer.fit(module, data)
trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
trainer.fit(module, data)
print("answers:", len(module.answer([[5, 6, 7]], [0], 3)))
"""


@pytest.mark.slow
def test_the_cells_of_a_notebook_run_one_after_the_other_and_again(tiny_base, rows_file, tmp_path):
    """An interactive Python is what Lightning takes for a notebook."""
    (tmp_path / "base").symlink_to(tiny_base)
    options = {"cwd": tmp_path, "input": CELLS, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-i"], **options)
    assert "interactive: True" in done.stdout
    assert "answers: 1" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")  # Lightning's: there are none
def test_data_take_the_tokenizer_of_the_base_of_each_trainer_and_alone_ask_for_one(tiny_base, rows_file, tmp_path):
    with rejects("data.tokenizer", "a hub id"):
        InstructionDataModule(str(rows_file)).setup("fit")
    other, data = shutil.copytree(tiny_base, tmp_path / "other"), InstructionDataModule(str(rows_file), batch_size=8)
    for base in (tiny_base, other):
        make_trainer(tmp_path, max_steps=1).fit(QLoRAModule(str(base), **_STEADY), data)
        assert data.tokenizer.name_or_path == str(base)


@pytest.mark.slow
def test_a_fit_after_the_learning_rate_finder_is_bit_for_bit_one_without(tiny_base, rows_file, tmp_path):
    def make(folder):
        lightning.seed_everything(7, verbose=False)
        module = QLoRAModule(str(tiny_base), rank=2, dropout=0.1, learning_rate=1e-2, compute_dtype="fp32")
        data = InstructionDataModule(str(rows_file), val=str(rows_file), tokenizer=str(tiny_base), batch_size=2)
        options = {"max_steps": 4, "accumulate_grad_batches": 2, "enable_checkpointing": True}
        return make_trainer(tmp_path / folder, callbacks=[AdapterCheckpoint()], **options), module, data

    trainer, module, data = make("plain")
    trainer.fit(module, data)
    drawn = random.random(), torch.rand(1)

    trainer, module, data = make("run")
    finder = Tuner(trainer).lr_find(module, datamodule=data, num_training=20, max_lr=1e-1, update_attr=False)
    assert finder.suggestion() is not None
    assert not any(file.is_file() for file in (tmp_path / "run").rglob("*"))
    assert (trainer.global_step, module.learning_rate) == (0, 1e-2)
    trainer.fit(module, data)
    assert (random.random(), torch.rand(1)) == drawn
    first, second = (read_checkpoint(tmp_path / run) for run in ("plain", "run"))
    for part in ("state_dict", "global_step", "lr_schedulers"):
        assert same(first[part], second[part]), part


@pytest.mark.filterwarnings("ignore")  # what Lightning warns of loaders
@pytest.mark.parametrize("combine", [list, lambda loaders: dict(enumerate(loaders)), tuple])
def test_batches_of_several_loaders_are_no_batch_and_not_printed(tiny_base, rows_file, tmp_path, combine):
    data = InstructionDataModule(str(rows_file), tokenizer=str(tiny_base), batch_size=4)
    data.setup("fit")
    loaders = CombinedLoader(combine([data.train_dataloader(), data.train_dataloader()]))
    with rejects("data.batch", combine([]).__class__.__name__, "CombinedLoader", "data.train") as fault:
        make_trainer(tmp_path, max_steps=1).fit(QLoRAModule(str(tiny_base)), loaders)
    assert "tensor(" not in str(fault.value)


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")  # as it shall
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")  # Lightning's: there are none
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")  # Lightning's: there are none
def test_a_loop_in_fabric_and_a_loader_in_a_trainer_train_the_same(tiny_base, rows_file, tmp_path):
    data = InstructionDataModule(str(rows_file), tokenizer=str(tiny_base), batch_size=4)
    data.setup("fit")
    lightning.seed_everything(3, verbose=False)
    trainer = make_trainer(tmp_path, max_epochs=1, gradient_clip_val=1.0)
    trainer.fit(expected := QLoRAModule(str(tiny_base), **_STEADY), data.train_dataloader())
    assert trainer.global_step == 4

    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    fabric.seed_everything(3)
    module = QLoRAModule(str(tiny_base), **_STEADY).to(fabric.device)
    module.configure_model()
    optimizer = torch.optim.AdamW(module.parameter_groups(), lr=module.learning_rate, weight_decay=0.0)
    model, optimizer = fabric.setup(module, optimizer)
    model.mark_forward_method("compute_loss")
    loader = fabric.setup_dataloaders(data.train_dataloader())
    for batch in loader:
        sums = model.compute_loss(batch)
        fabric.backward(sums.loss_sum / sums.count)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    states = [module.state_dict(), expected.state_dict()]
    assert states[0].keys() == states[1].keys()
    updates = [torch.cat([state[name].flatten() for name in state if ".lora_B." in name]) for state in states]
    assert (updates[0] - updates[1]).norm() < 1e-4 * updates[1].norm()  # the same up to rounding; B begins at zero
    second, third = ([row for batch in loader for row in batch["row_ids"].tolist()] for _ in range(2))
    assert sorted(second) == sorted(third) == list(range(16))
    assert second != third
