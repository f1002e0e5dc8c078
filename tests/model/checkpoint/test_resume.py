"""Generators come back, and of the settings those at hand count; what cannot resume exactly is rejected."""

import copy
import random

import lightning
import numpy as np
import pytest
import torch

from qlora_lightning import AdapterCheckpoint, InstructionDataModule, QLoRAModule
from qlora_lightning.model.checkpoint.resume import capture_generators, restore_generators
from qlora_lightning.support.errors import UserError
from tests.equality import same
from tests.steps import make_trainer


def draw():
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.randn(3).tolist()]


def test_every_generator_continues_where_it_was_captured_also_from_a_file(tmp_path):
    draw()  # gauss and randn draw pairs: half of one is kept, and must be restored too
    torch.save(capture_generators(), tmp_path / "state")
    expected = draw()
    draw()
    restore_generators(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == expected


# ---- optimizers and schedules ----------------------------------------------------------------------------------------


class Look(lightning.Callback):
    """Remembers the optimizer as it is before the first step."""

    optimizer = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.optimizer = self.optimizer or copy.deepcopy(trainer.optimizers[0].state_dict())


@pytest.fixture(scope="module")
def fit(tiny_base, tmp_path_factory):
    """Train the tiny base, two rows a step, up to a step; gives the last checkpoint and the optimizer at the start."""
    folder = tmp_path_factory.mktemp("settings")
    rows = [f'{{"instruction": "Count to {n}.", "output": "{" ".join(map(str, range(n)))}"}}\n' for n in range(1, 17)]
    (folder / "rows.jsonl").write_text("".join(rows))

    def run(max_steps, ckpt_path=None, more=(), accumulate_grad_batches=1, **settings):
        lightning.seed_everything(7, verbose=False)
        run_folder = folder / f"run {len(list(folder.iterdir()))}"
        defaults = {"rank": 2, "compute_dtype": "fp32", "learning_rate": 1e-2, "schedule": "linear"}
        data = InstructionDataModule(train=str(folder / "rows.jsonl"), tokenizer=str(tiny_base), batch_size=2)
        options = {"max_steps": max_steps, "accumulate_grad_batches": accumulate_grad_batches}
        callbacks = [*more, AdapterCheckpoint(), look := Look()]
        trainer = make_trainer(run_folder, callbacks=callbacks, enable_checkpointing=True, **options)
        trainer.fit(QLoRAModule(str(tiny_base), **(defaults | settings)), data, ckpt_path=ckpt_path)
        return run_folder / "checkpoints" / "last.ckpt", look

    return run


@pytest.fixture(scope="module")
def stopped(fit):
    """The last checkpoint of a run of three steps."""
    return fit(3)[0]


def test_what_is_configured_counts_and_all_else_stays_the_checkpoints(fit, stopped, capsys):
    (stored,) = torch.load(stopped, weights_only=True)["optimizer_states"]
    _, look = fit(6, stopped, warmup_ratio=0.0, learning_rate=4e-2, weight_decay=0.5)
    (group,), (before,) = look.optimizer["param_groups"], stored["param_groups"]
    # half of the six steps of the linear schedule are over
    assert group == {**before, "weight_decay": 0.5, "lr": 2e-2, "initial_lr": 4e-2}
    assert same(look.optimizer["state"], stored["state"])
    said = capsys.readouterr().out
    assert all(f"model.{name}: " in said for name in ("learning_rate", "weight_decay"))


def test_another_optimizer_is_rejected(fit, stopped):
    with pytest.raises(UserError, match=r"optimizer was torch\.optim\.adamw\.AdamW and is torch\.optim\.sgd\.SGD, "):
        fit(6, ckpt_path=stopped, optimizer="torch.optim.SGD")


class SaveAt(lightning.Callback):
    """Saves a checkpoint at a hook, the second time that it comes."""

    def __init__(self, hook, file):
        self.times = 0
        setattr(self, hook, lambda trainer, *_: self.save(trainer, file))

    def save(self, trainer, file):
        self.times += 1
        if self.times == 2:
            trainer.save_checkpoint(file)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"])
def test_a_checkpoint_of_the_inside_of_a_step_is_rejected(fit, tmp_path, hook):
    fit(6, more=[SaveAt(hook, tmp_path / "inside.ckpt")], accumulate_grad_batches=4)
    with pytest.raises(UserError, match="saved inside an optimizer step"):
        fit(6, ckpt_path=tmp_path / "inside.ckpt", accumulate_grad_batches=4)
