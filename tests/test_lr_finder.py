"""Lightning's learning-rate finder works with our module, and leaves no trace in the fit that follows."""

import math
import random

import lightning
import pytest
import torch
from lightning.pytorch.tuner.tuning import Tuner

from qlora_lightning import AdapterCheckpoint, InstructionDataModule, LossSums, QLoRAModule


class Exploding(QLoRAModule):
    def compute_loss(self, batch):
        sums = super().compute_loss(batch)
        return LossSums(sums.nll_sum * (math.inf if self.trainer.global_step == 15 else 1.0), *sums[1:])


@pytest.fixture
def make(tiny_base, rows_file, tmp_path):
    def make(folder, module_class=QLoRAModule):
        lightning.seed_everything(7, verbose=False)
        module = module_class(str(tiny_base), rank=2, dropout=0.1, learning_rate=1e-2, compute_dtype="fp32")
        data = InstructionDataModule(str(rows_file), val=str(rows_file), tokenizer=str(tiny_base), batch_size=2)
        trainer = lightning.Trainer(
            **{"accelerator": "cpu", "devices": 1, "max_steps": 4, "accumulate_grad_batches": 2, "logger": False},
            **{"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0},
            callbacks=[AdapterCheckpoint()],
            default_root_dir=tmp_path / folder,
        )
        return trainer, module, data

    return make


def test_a_fit_after_the_search_is_bit_for_bit_one_without(make, tmp_path):
    trainer, module, data = make("plain")
    trainer.fit(module, data)
    plain = module.state_dict()
    drawn = random.random(), torch.rand(1)

    trainer, module, data = make("run")
    finder = Tuner(trainer).lr_find(module, datamodule=data, num_training=20, max_lr=1e-1, update_attr=False)
    assert finder.suggestion() is not None
    assert not any(file.is_file() for file in (tmp_path / "run").rglob("*"))
    assert (trainer.global_step, module.learning_rate) == (0, 1e-2)
    trainer.fit(module, data)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in module.state_dict().items())
    assert (random.random(), torch.rand(1)) == drawn
    first, second = (
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True) for run in ("plain", "run")
    )
    assert (first["global_step"], first["lr_schedulers"]) == (second["global_step"], second["lr_schedulers"])


def test_a_loss_that_is_not_finite_ends_the_search_and_not_the_program(make, tmp_path):
    trainer, module, data = make("run", Exploding)
    finder = Tuner(trainer).lr_find(
        module, datamodule=data, num_training=40, max_lr=1e-3, early_stop_threshold=None, update_attr=True
    )
    assert len(finder.results["loss"]) == 16
    assert finder.suggestion() == module.learning_rate
    assert not any(file.is_file() for file in (tmp_path / "run").rglob("*"))
