"""Module and data module in Lightning's own hands: its CLI, its Trainer, Fabric."""

import shutil
import warnings

import lightning
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.cli import LightningCLI

from qlora_lightning import InstructionDataModule, QLoRAModule
from qlora_lightning.support.errors import UserError

_STEADY = {"compute_dtype": "fp32", "learning_rate": 1e-2, "schedule": "constant", "warmup_ratio": 0.0}
_QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def fit(base, rows_file, tmp_path, **options):
    """Adapter of one epoch of a plain Trainer."""
    lightning.seed_everything(3, verbose=False)
    module, data = QLoRAModule(str(base), **_STEADY), InstructionDataModule(str(rows_file), batch_size=4, **options)
    trainer = lightning.Trainer(
        max_epochs=1, gradient_clip_val=1.0, accelerator="cpu", devices=1, default_root_dir=tmp_path, **_QUIET
    )
    trainer.fit(module, data)
    return module.state_dict()


def test_lightnings_own_cli_trains_from_base_and_rows_alone(tiny_base, rows_file, tmp_path):
    options = {"model.base": tiny_base, "data.train": rows_file, "trainer.default_root_dir": tmp_path}
    options |= {"trainer.max_steps": 2, "trainer.accelerator": "cpu", "trainer.devices": 1}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="jsonargparse|lightning")  # of the bare CLI, not ours
        cli = LightningCLI(
            QLoRAModule,
            InstructionDataModule,
            trainer_defaults=_QUIET,
            save_config_callback=None,
            args=["fit", *(f"--{name}={value}" for name, value in options.items())],
        )
    assert cli.trainer.global_step == 2
    assert cli.datamodule.tokenizer.name_or_path == str(tiny_base)


def test_a_trainers_data_take_the_tokenizer_of_its_modules_base(tiny_base, rows_file, tmp_path):
    found, expected = fit(tiny_base, rows_file, tmp_path), fit(tiny_base, rows_file, tmp_path, tokenizer=str(tiny_base))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")  # Lightning's: there are none
def test_data_that_are_used_again_take_the_tokenizer_of_the_new_base(tiny_base, rows_file, tmp_path):
    other, data = shutil.copytree(tiny_base, tmp_path / "other"), InstructionDataModule(str(rows_file), batch_size=8)
    for base in (tiny_base, other):
        trainer = lightning.Trainer(max_steps=1, accelerator="cpu", devices=1, default_root_dir=tmp_path, **_QUIET)
        trainer.fit(QLoRAModule(str(base), **_STEADY), data)
        assert data.tokenizer.name_or_path == str(base)


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")  # as it shall
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")  # Lightning's: there are none
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")  # Lightning's: there are none
def test_a_loader_of_data_alone_trains_in_a_trainer(tiny_base, rows_file, tmp_path):
    data = InstructionDataModule(str(rows_file), tokenizer=str(tiny_base), batch_size=4)
    data.setup("fit")
    module = QLoRAModule(str(tiny_base), **_STEADY)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, default_root_dir=tmp_path, **_QUIET)
    trainer.fit(module, data.train_dataloader())
    assert trainer.global_step == 4


def test_data_alone_ask_for_a_tokenizer(rows_file):
    with pytest.raises(UserError, match="tokenizer: expected a hub id"):
        InstructionDataModule(str(rows_file)).setup("fit")


def test_a_loop_in_fabric_trains_what_the_trainer_trains(tiny_base, rows_file, tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    fabric.seed_everything(3)
    module = QLoRAModule(str(tiny_base), **_STEADY).to(fabric.device)
    module.configure_model()
    data = InstructionDataModule(str(rows_file), tokenizer=str(tiny_base), batch_size=4)
    data.setup("fit")
    optimizer = torch.optim.AdamW(module.parameter_groups(), lr=module.learning_rate, weight_decay=0.0)
    model, optimizer = fabric.setup(module, optimizer)
    model.mark_forward_method("compute_loss")
    for batch in fabric.setup_dataloaders(data.train_dataloader()):
        sums = model.compute_loss(batch)
        fabric.backward(sums.nll_sum / sums.labelled_tokens)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    found, expected = module.state_dict(), fit(tiny_base, rows_file, tmp_path)
    assert found.keys() == expected.keys()
    updates = [
        torch.cat([state[name].flatten() for name in state if ".lora_B." in name]) for state in (found, expected)
    ]
    assert (updates[0] - updates[1]).norm() < 1e-4 * updates[1].norm()  # the same up to rounding; B begins at zero


def test_in_fabric_each_epoch_has_every_row_once_in_another_order(tiny_base, rows_file):
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    data = InstructionDataModule(str(rows_file), tokenizer=str(tiny_base), batch_size=4)
    data.setup("fit")
    loader = fabric.setup_dataloaders(data.train_dataloader())
    first, second = ([row for batch in loader for row in batch["row_ids"].tolist()] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(16))
    assert first != second
