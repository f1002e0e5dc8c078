"""Which settings count when a run resumes: those of the checkpoint, or those at hand."""

import copy
from pathlib import Path

import lightning
import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from qlora_lightning import AdapterCheckpoint, InstructionDataModule, QLoRAModule
from qlora_lightning.model.checkpoint.format import find_foreign_class, plain_settings
from tests.equality import same


@pytest.mark.parametrize(
    ("optimizer", "foreign"),
    [
        (None, None),
        ("torch.optim.SGD", None),
        ({"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"eps": 1e-6}}, None),
        ("torch.optimizers.X", "torch.optimizers.X"),
        ("evil.torch.optim.SGD", "evil.torch.optim.SGD"),
    ],
)
def test_an_optimizer_counts_only_if_a_file_does_not_decide_what_is_imported(optimizer, foreign):
    assert find_foreign_class({"rank": 3, "optimizer": optimizer}) == foreign


def test_what_weights_only_would_not_read_again_is_not_stored(tmp_path):
    settings = {"path": Path("a/b"), "layers": (1, 2), "options": {"deep": [None, True, 0.5]}, "odd": [object()]}
    torch.save(plain_settings(settings), tmp_path / "settings")
    stored = torch.load(tmp_path / "settings", weights_only=True)
    assert stored == {"path": "a/b", "layers": [1, 2], "options": {"deep": [None, True, 0.5]}}


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

    def run(max_steps, cls=QLoRAModule, ckpt_path=None, **settings):
        lightning.seed_everything(7, verbose=False)
        run_folder = folder / f"run {len(list(folder.iterdir()))}"
        defaults = {"rank": 2, "compute_dtype": "fp32", "learning_rate": 1e-2, "schedule": "linear"}
        module = cls(str(tiny_base), **(defaults | settings))
        data = InstructionDataModule(train=str(folder / "rows.jsonl"), tokenizer=str(tiny_base), batch_size=2)
        quiet = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(
            **{**quiet, "accelerator": "cpu", "devices": 1},
            max_steps=max_steps,
            default_root_dir=run_folder,
            callbacks=[AdapterCheckpoint(), look := Look()],
        )
        trainer.fit(module, data, ckpt_path=ckpt_path)
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


def test_another_optimizer_begins_with_a_fresh_state_and_the_schedule_continues(fit, stopped, capsys):
    last, look = fit(6, QLoRAModule, stopped[QLoRAModule], optimizer="torch.optim.SGD", warmup_ratio=0.0)
    assert look.optimizer["state"] == {}
    assert look.optimizer["param_groups"][0]["lr"] == 5e-3  # half of the six steps are over
    assert capsys.readouterr().out.count("it begins with a fresh state") == 1
    assert torch.load(last, weights_only=True)["qlora_lightning"]["optimizers"][0]["class"].endswith("SGD")


def test_a_new_ratio_of_loraplus_counts_and_to_switch_it_off_is_rejected(fit, capsys):
    file, _ = fit(3, loraplus_ratio=4.0)
    _, look = fit(6, ckpt_path=file, loraplus_ratio=8.0)
    assert [group["initial_lr"] for group in look.optimizer["param_groups"]] == [1e-2, 8e-2]
    assert "model.loraplus_ratio: 4.0 → 8.0" in capsys.readouterr().out
    with pytest.raises(ValueError, match="different number of parameter groups"):
        fit(6, ckpt_path=file)
