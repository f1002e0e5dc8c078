"""A run that would train on for nothing is stopped, in real fits."""

import copy
import json
import logging
import math

import lightning
import pytest
import torch
from lightning import Callback

from qlora_lightning import AdapterCheckpoint, GradientCheckpointing, InstructionDataModule, LossSums, QLoRAModule
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.support.errors import UserError
from tests.equality import same


class Spoilt(QLoRAModule):
    """The loss of a row, of steps, or the gradient of a step is not finite."""

    def __init__(self, base, row=None, steps=(), gradient_step=None, **settings):
        super().__init__(base, **settings)
        self.row, self.steps, self.gradient_step = row, steps, gradient_step

    def compute_loss(self, batch):
        sums = super().compute_loss(batch)
        bad = self.row in batch["row_ids"].tolist() or self.trainer.global_step in self.steps
        nll = sums.nll_sum * math.inf if bad else sums.nll_sum
        if self.trainer.global_step == self.gradient_step:
            nll.register_hook(lambda gradient: gradient * math.nan)
        return LossSums(nll, *sums[1:])


@pytest.fixture
def fit(tiny_base, rows_file, tmp_path):
    """Train the tiny base on sixteen rows, two a micro-batch, two of these a step: four steps an epoch."""

    def run(cls=QLoRAModule, *callbacks, val=False, ckpt_path=None, trainer_options=None, **settings):
        lightning.seed_everything(7, verbose=False)
        defaults = {"rank": 2, "compute_dtype": "fp32", "learning_rate": 1e-2, "warmup_ratio": 0.0}
        module = cls(str(tiny_base), **{**defaults, "schedule": "constant", **settings})
        split = {"train": str(rows_file), "val": str(rows_file) if val else None}
        data = InstructionDataModule(**split, tokenizer=str(tiny_base), batch_size=2)
        options = {"max_epochs": 1, "accumulate_grad_batches": 2, "num_sanity_val_steps": 0, "logger": False}
        trainer = lightning.Trainer(
            **{**options, "enable_checkpointing": False, "enable_model_summary": False, **(trainer_options or {})},
            **{"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
            callbacks=list(callbacks),
            default_root_dir=tmp_path / "run",
        )
        try:
            trainer.fit(module, data, ckpt_path=ckpt_path)
        finally:
            run.trainer, run.module = trainer, module
        return trainer, module

    return run


# ---- losses and gradients that are not finite ------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_its_row_is_written_down(fit, tmp_path, rows_file):
    with pytest.raises(UserError) as stop:
        fit(Spoilt, row=4)
    step = fit.trainer.global_step
    file = tmp_path / "run" / f"nonfinite-step-{step}.json"
    for fact in (f"loss of step {step}, at learning rate 0.01, is NaN", f"rows: {rows_file}:5.", f"text: {file}."):
        assert fact in str(stop.value)
    rank = json.loads(file.read_text())["ranks"][0]
    assert [row["row_id"] for row in rank["rows"]] == [4]
    assert "Count to 5." in rank["rows"][0]["text"]
    assert len(rank["window_rows"]) == 4
    assert all(tensor.isfinite().all() for tensor in fit.module.state_dict().values())


NORM = "base_model.model.model.layers.1.input_layernorm"


class SpoilOutput(Callback):
    """Lets a norm of the base give an infinity."""

    def on_train_start(self, trainer, pl_module):
        pl_module.get_submodule(f"model.{NORM}").register_forward_hook(lambda *_: _[2] * math.inf)


@pytest.mark.parametrize(
    ("cls", "callbacks", "settings", "words"),
    [
        (QLoRAModule, [SpoilOutput(), GradientCheckpointing()], {}, rf"loss of step 0.*First module: {NORM}; rows: \S"),
        (Spoilt, [], {"gradient_step": 2}, r"gradient of step 2.*First module: none, all outputs are finite; rows: "),
    ],
    ids=["module", "gradient"],
)
def test_the_first_module_that_gave_it_is_named(fit, cls, callbacks, settings, words):
    with pytest.raises(UserError, match=words):
        fit(cls, *callbacks, **settings)


class Copies(Callback):
    """Copies adapters and optimizer after each step."""

    def __init__(self):
        self.copies = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = copy.deepcopy(trainer.optimizers[0].state_dict())
        adapters = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
        self.copies[trainer.global_step] = adapters, state["state"], state["param_groups"][0]["lr"]


@pytest.mark.parametrize("fault", [{"steps": [2]}, {"gradient_step": 2}])
def test_a_skipped_step_moves_nothing_but_the_schedule_and_is_counted(fit, fault, caplog):
    with caplog.at_level(logging.WARNING, "qlora_lightning"):
        trainer, _ = fit(Spoilt, seen := Copies(), schedule="linear", on_nonfinite="skip", weight_decay=0.1, **fault)
    (adapters, state, rate), (later, state_later, next_rate) = seen.copies[2], seen.copies[3]
    assert same(later, adapters)
    assert same(state_later, state)
    assert next_rate < rate
    assert not same(seen.copies[4][0], later)
    assert trainer.callback_metrics["skipped_steps"] == 1
    assert trainer.callback_metrics["train_loss"].isfinite()
    assert "step 2, at learning rate" in caplog.text


def test_ten_skipped_steps_are_written_down_and_the_twentieth_in_a_row_stops_resumes_counted(fit, tmp_path):
    trainer, module = fit(Spoilt, steps=[0, 2, 3], on_nonfinite="skip")
    assert module.guard.state_dict() == {"skipped_steps": 3, "skipped_in_a_row": 2}
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    with pytest.raises(UserError, match=r"step 21, .* is NaN or infinite. So were the 20 steps up to it"):
        fit(
            Spoilt,
            steps=range(4, 99),
            on_nonfinite="skip",
            ckpt_path=tmp_path / "x.ckpt",
            trainer_options={"max_epochs": 6},
        )
    assert len(list((tmp_path / "run").glob("nonfinite-step-*.json"))) == 10


class Scaler(Callback):
    """Stands for 16-mixed, which a CPU does not have."""

    def on_train_start(self, trainer, pl_module):
        trainer.precision_plugin.scaler = object()


def test_under_a_scaler_which_skips_steps_itself_only_the_loss_counts(fit):
    _, module = fit(Spoilt, Scaler(), gradient_step=3)  # the last step: nothing comes of it
    assert module.guard.skipped_steps == 0
    with pytest.raises(UserError, match="The loss of step 2"):
        fit(Spoilt, Scaler(), steps=[2])


class SpoiltValidation(QLoRAModule):
    """The loss of the second validation is not finite."""

    validations = 0

    def on_validation_epoch_end(self):
        self.validations += 1
        if self.validations == 2:
            self.val_statistics.nll_sum *= math.nan
        super().on_validation_epoch_end()


def test_a_validation_loss_that_is_not_finite_stops_the_run_before_it_is_saved_but_by_skip(fit, tmp_path):
    options = {"max_epochs": 2, "enable_checkpointing": True}
    with pytest.raises(UserError, match=r"validation at step 8 gave a val_loss of nan\. .*--ckpt_path last"):
        fit(SpoiltValidation, AdapterCheckpoint(), val=True, trainer_options=options)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(file.name for file in folder.iterdir()) == ["last.ckpt", "step-000004.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 4
    trainer, _ = fit(SpoiltValidation, val=True, on_nonfinite="skip", trainer_options={"max_epochs": 3})
    assert trainer.global_step == 12


# ---- what stays, and what changes ------------------------------------------------------------------------------------


class ChangeBase(Callback):
    """Writes to a frozen weight at some hook."""

    def __init__(self, hook):
        setattr(self, hook, lambda trainer, pl_module, *_: self.change(pl_module))

    def change(self, pl_module):
        pl_module.get_parameter("model.base_model.model.model.norm.weight").data += 1


class LosesGradient(Callback):
    """Takes the gradient of one B away from some step on."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step >= 4:
            next(p for name, p in trainable_tensors(pl_module).items() if ".lora_B." in name).grad.zero_()


class LeavesOneOut(QLoRAModule):
    def parameter_groups(self):
        return [{"params": list(trainable_tensors(self).values())[1:]}]


CHANGED = r"1 of \d+ frozen tensors changed during training, as .*model\.norm\.weight"


@pytest.mark.parametrize(
    ("cls", "callbacks", "val", "words", "step"),
    [
        (QLoRAModule, [ChangeBase("on_validation_start")], True, CHANGED, 4),
        (QLoRAModule, [ChangeBase("on_train_epoch_end")], False, CHANGED, 8),
        (QLoRAModule, [LosesGradient()], True, r"1 of 28 trainable tensors get no gradient", 4),
        (LeavesOneOut, [], False, r"1 of 28 trainable tensors are in none .*Let `parameter_groups` return", 0),
    ],
    ids=["base at a validation", "base at the end", "gradient behind a validation", "optimizer"],
)
def test_what_changed_that_should_not_or_would_stay_is_noticed(fit, cls, callbacks, val, words, step):
    with pytest.raises(RuntimeError, match=words):
        fit(cls, *callbacks, val=val, trainer_options={"max_epochs": 2})
    assert fit.trainer.global_step == step


def test_adapters_that_diverge_are_reported_so_and_no_wiring_is_blamed(fit):
    with pytest.raises(RuntimeError, match=r"Training has diverged, to weights up to .*: lower model\.learning_rate"):
        fit(QLoRAModule, val=True, learning_rate=1e10, trainer_options={"max_epochs": 3})


class NothingLabelled(QLoRAModule):
    def compute_loss(self, batch):
        return super().compute_loss({**batch, "labels": torch.full_like(batch["labels"], -100)})


def test_a_window_without_labels_is_no_dead_gradient(fit):
    fit(NothingLabelled, trainer_options={"max_steps": 2})
