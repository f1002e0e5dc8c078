"""Generators come back, and of the settings those at hand count; what cannot resume exactly is rejected."""

import copy
import json
import random
import shutil

import lightning
import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from qlora_lightning import AdapterCheckpoint, InstructionDataModule, QLoRAModule
from qlora_lightning.model.checkpoint.format import KEY
from qlora_lightning.model.checkpoint.ranks import capture_generators, restore_generators
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


class OneCycle(QLoRAModule):
    """A schedule that changes betas too."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=1e-2, weight_decay=self.weight_decay)
        schedule = OneCycleLR(optimizer, max_lr=1e-2, total_steps=8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


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

    def run(max_steps, cls=QLoRAModule, ckpt_path=None, more=(), accumulate_grad_batches=1, **settings):
        lightning.seed_everything(7, verbose=False)
        run_folder = folder / f"run {len(list(folder.iterdir()))}"
        defaults = {"rank": 2, "compute_dtype": "fp32", "learning_rate": 1e-2, "schedule": "linear"}
        data = InstructionDataModule(train=str(folder / "rows.jsonl"), tokenizer=str(tiny_base), batch_size=2)
        options = {"max_steps": max_steps, "accumulate_grad_batches": accumulate_grad_batches}
        callbacks = [*more, AdapterCheckpoint(), look := Look()]
        trainer = make_trainer(run_folder, callbacks=callbacks, enable_checkpointing=True, **options)
        trainer.fit(cls(str(tiny_base), **(defaults | settings)), data, ckpt_path=ckpt_path)
        return run_folder / "checkpoints" / "last.ckpt", look

    return run


@pytest.fixture(scope="module")
def stopped(fit):
    """The last checkpoint of a run of three steps, by its class of module."""
    return {cls: fit(3, cls)[0] for cls in (QLoRAModule, OneCycle)}


def test_a_run_whose_schedule_changes_betas_resumes_to_the_same_bits(fit, stopped):
    files = fit(6, OneCycle)[0], fit(6, OneCycle, stopped[OneCycle])[0]
    whole, again = (torch.load(each, weights_only=True) for each in files)
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(again[part], whole[part]), part


@pytest.mark.parametrize(
    ("cls", "settings", "changed"),
    [
        # rate and first rate of a schedule that follows from the step: half of the six steps are over
        (QLoRAModule, {"learning_rate": 4e-2, "weight_decay": 0.5}, {"lr": 2e-2, "initial_lr": 4e-2}),
        (OneCycle, {"weight_decay": 0.5}, {}),
    ],
)
def test_only_what_is_configured_otherwise_counts_and_all_else_stays_the_checkpoints(
    fit, stopped, cls, settings, changed, capsys
):
    (stored,) = torch.load(stopped[cls], weights_only=True)["optimizer_states"]
    _, look = fit(6, cls, stopped[cls], warmup_ratio=0.0, **settings)
    (group,), (before,) = look.optimizer["param_groups"], stored["param_groups"]
    assert group == {**before, "weight_decay": 0.5, **changed}
    assert same(look.optimizer["state"], stored["state"])
    said = capsys.readouterr().out
    assert all(f"model.{name}: " in said for name in settings)


def test_another_optimizer_is_rejected(fit, stopped):
    with pytest.raises(UserError, match=r"optimizer was torch\.optim\.adamw\.AdamW and is torch\.optim\.sgd\.SGD, "):
        fit(6, ckpt_path=stopped[QLoRAModule], optimizer="torch.optim.SGD")


class SaveAt(lightning.Callback):
    """Saves a checkpoint at a hook, the second time that it comes."""

    def __init__(self, hook, file):
        self.times = 0
        setattr(self, hook, lambda trainer, *_: self.save(trainer, file))

    def save(self, trainer, file):
        self.times += 1
        if self.times == 2:
            trainer.save_checkpoint(file)


@pytest.mark.parametrize(
    "hook", ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end", "on_train_epoch_start"]
)
def test_a_checkpoint_of_the_inside_of_a_step_is_rejected(fit, tmp_path, hook):
    fit(6, more=[SaveAt(hook, tmp_path / "inside.ckpt")], accumulate_grad_batches=4)
    with pytest.raises(UserError, match="saved inside an optimizer step or at the start of an epoch"):
        fit(6, ckpt_path=tmp_path / "inside.ckpt", accumulate_grad_batches=4)


def test_a_new_ratio_of_loraplus_counts_and_to_switch_it_off_is_rejected(fit, capsys):
    file, _ = fit(3, loraplus_ratio=4.0)
    _, look = fit(6, ckpt_path=file, loraplus_ratio=8.0)
    assert [group["initial_lr"] for group in look.optimizer["param_groups"]] == [1e-2, 8e-2]
    assert "model.loraplus_ratio: 4.0 → 8.0" in capsys.readouterr().out
    with pytest.raises(ValueError, match="different number of parameter groups"):
        fit(6, ckpt_path=file)


def test_another_tokenizer_than_that_of_the_checkpoint_or_of_the_adapter_folder_is_reported(
    fit, stopped, tmp_path, capsys
):
    content = torch.load(stopped[QLoRAModule], weights_only=True)
    content[KEY]["identity"]["data"]["tokenizer"] = "another"
    torch.save(content, tmp_path / "other.ckpt")
    fit(4, ckpt_path=stopped[QLoRAModule])
    assert "Other than in the checkpoint" not in capsys.readouterr().out
    fit(4, ckpt_path=tmp_path / "other.ckpt")
    assert "Other than in the checkpoint: tokenizer (another there, " in capsys.readouterr().out
    folder = shutil.copytree(stopped[QLoRAModule].parents[1] / "adapter", tmp_path / "adapter")
    identity = json.loads((folder / "qlora_lightning.json").read_text())
    identity["data"] |= {"tokenizer": "another", "train": "other rows, which are no matter here"}
    (folder / "qlora_lightning.json").write_text(json.dumps(identity))
    fit(1, adapter=str(folder))
    said = capsys.readouterr().out
    assert f"Other than in the adapter folder {folder}: tokenizer (another there, " in said
    assert "training samples" not in said
