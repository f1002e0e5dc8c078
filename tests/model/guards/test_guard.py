"""A run that would train on for nothing is stopped: by losses, gradients, settings, token ids. The base stays."""

import contextlib
import copy
import logging
import math

import lightning
import pytest
import torch
from lightning import Callback

from qlora_lightning import AdapterCheckpoint, InstructionDataModule, LossSums, QLoRAModule
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.support.errors import UserError
from tests.equality import base_tensors, same
from tests.flat import collate
from tests.steps import make_module, make_trainer


class Spoilt(QLoRAModule):
    """The loss of steps, or the gradient of a step is not finite."""

    def __init__(self, base, steps=(), gradient_step=None, **settings):
        super().__init__(base, **settings)
        self.steps, self.gradient_step = steps, gradient_step

    def compute_loss(self, batch):
        sums = super().compute_loss(batch)
        nll = sums.nll_sum * math.inf if self.trainer.global_step in self.steps else sums.nll_sum
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
        options = {"max_epochs": 1, "accumulate_grad_batches": 2, "callbacks": list(callbacks)}
        trainer = make_trainer(tmp_path / "run", **(options | (trainer_options or {})))
        try:
            trainer.fit(module, data, ckpt_path=ckpt_path)
        finally:
            run.trainer, run.module = trainer, module
        return trainer, module

    return run


# ---- losses and gradients that are not finite ------------------------------------------------------------------------


class Steps(Callback):
    """Notes the rows of each step, and the loss of the step before it."""

    def __init__(self):
        self.rows, self.losses = {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.setdefault(trainer.global_step, []).extend(batch["row_ids"].tolist())

    def on_train_batch_end(self, trainer, *_):
        self.losses[trainer.global_step] = float(trainer.callback_metrics.get("train_loss", math.nan))


@pytest.mark.parametrize(
    ("fault", "what", "dtype"), [({"steps": [2]}, "loss", "fp32"), ({"gradient_step": 2}, "gradient", "fp16")]
)
def test_a_step_that_is_not_finite_stops_the_run_with_its_rate_rows_and_the_loss_before(
    fit, rows_file, fault, what, dtype
):
    with pytest.raises(UserError) as stop:
        fit(Spoilt, steps := Steps(), compute_dtype=dtype, **fault)
    message = str(stop.value)
    assert f"The {what} of step 2, at learning rate 0.01, is NaN or infinite." in message
    assert f"The loss of the step before was {steps.losses[2]:.4g}." in message
    assert f"Rows of the step: {', '.join(f'{rows_file}:{row + 1}' for row in steps.rows[2])}." in message
    assert ("First use bf16 or fp32 (`model.compute_dtype`)" in message) is (dtype == "fp16")
    assert all(tensor.isfinite().all() for tensor in fit.module.state_dict().values())


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
    options = {"schedule": "linear", "on_nonfinite": "skip", "weight_decay": 0.1}
    with caplog.at_level(logging.WARNING, "qlora_lightning"):
        trainer, _ = fit(Spoilt, seen := Copies(), **options, **fault)
    (adapters, state, rate), (later, state_later, next_rate) = seen.copies[2], seen.copies[3]
    assert same(later, adapters)
    assert same(state_later, state)
    assert next_rate < rate
    assert not same(seen.copies[4][0], later)
    assert trainer.callback_metrics["skipped_steps"] == 1
    assert trainer.callback_metrics["train_loss"].isfinite()
    assert "step 2, at learning rate" in caplog.text


def test_the_twentieth_skipped_step_in_a_row_stops_resumes_counted(fit, tmp_path):
    trainer, module = fit(Spoilt, steps=[0, 2, 3], on_nonfinite="skip")
    assert module.guard.state_dict() == {"skipped_steps": 3, "skipped_in_a_row": 2}
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    resumed = {"ckpt_path": tmp_path / "x.ckpt", "trainer_options": {"max_epochs": 6}}
    with pytest.raises(UserError, match=r"step 21, .* is NaN or infinite\..* The last 20 steps were all"):
        fit(Spoilt, steps=range(4, 99), on_nonfinite="skip", **resumed)


class SpoiltValidation(QLoRAModule):
    """The loss of the second validation is not finite."""

    validations = 0

    def on_validation_epoch_end(self):
        self.validations += 1
        if self.validations == 2:
            self.val_statistics.nll_sum *= math.nan
        super().on_validation_epoch_end()


def test_a_validation_loss_that_is_not_finite_stops_the_run_before_it_is_saved_but_by_skip(fit, tmp_path):
    short = {"limit_train_batches": 4, "limit_val_batches": 1}  # two steps an epoch
    options = {"max_epochs": 2, "enable_checkpointing": True, **short}
    with pytest.raises(UserError, match=r"validation at step 4 gave a val_loss of nan\. .*--ckpt_path last"):
        fit(SpoiltValidation, AdapterCheckpoint(), val=True, trainer_options=options)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(file.name for file in folder.iterdir()) == ["last.ckpt", "step-000002.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2
    trainer, _ = fit(SpoiltValidation, val=True, on_nonfinite="skip", trainer_options={"max_epochs": 3, **short})
    assert trainer.global_step == 6


# ---- adapters that do not learn --------------------------------------------------------------------------------------


class LosesGradient(Callback):
    """Takes the gradient of one A or B away from some step on."""

    def __init__(self, part):
        self.part = part

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step >= 4:
            next(p for name, p in trainable_tensors(pl_module).items() if self.part in name).grad.zero_()


class LeavesOneOut(QLoRAModule):
    def parameter_groups(self):
        return [{"params": list(trainable_tensors(self).values())[1:]}]


@pytest.mark.parametrize(
    ("cls", "callbacks", "words", "step"),
    [
        (QLoRAModule, [LosesGradient(".lora_A.")], r"1 of 28 trainable tensors get no gradient, as .*lora_A", 4),
        (QLoRAModule, [LosesGradient(".lora_B.")], r"1 of 28 trainable tensors get no gradient, as .*lora_B", 4),
        (LeavesOneOut, [], r"1 of 28 trainable tensors are in none .*Let `parameter_groups` return", 0),
    ],
    ids=["A", "B", "optimizer"],
)
def test_adapters_that_would_stay_are_noticed(fit, cls, callbacks, words, step):
    with pytest.raises(RuntimeError, match=words):
        fit(cls, *callbacks, val=True, trainer_options={"max_epochs": 2})
    assert fit.trainer.global_step == step


# ---- the checks ------------------------------------------------------------------------------------------------------


def test_a_token_that_the_base_lacks_stops_the_run_and_its_row_is_named(tiny_base):
    """It is only at the end of the row, where no embedding is looked up."""
    module = make_module(tiny_base)
    vocabulary = module.causal_lm.config.vocab_size
    for bad in (vocabulary, -1, vocabulary - 1):
        rows = [[0, 1, 2], [3, 4, bad], [5, 6]]
        batch = collate(*((ids, [-100, *ids[1:]], number) for number, ids in enumerate(rows)))
        words = f"A token of .*1.* has the id {bad:,}, .*tokens that the base lacks"
        with pytest.raises(UserError, match=words) if bad != vocabulary - 1 else contextlib.nullcontext():
            module.compute_loss(batch)


# ---- the base --------------------------------------------------------------------------------------------------------


class Before(Callback):
    """Copies the base before the first step."""

    def on_fit_start(self, trainer, pl_module):
        self.base = base_tensors(pl_module)


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({"double_quant": True}, {"absmax", "nested_absmax", "offset"}),
        ({"double_quant": False}, {"absmax"}),
        ({"quantization": "int8"}, {"SCB"}),
        ({"quantization": "none"}, set()),
    ],
    ids=["double quant", "single quant", "int8", "none"],
)
def test_training_validating_and_saving_change_no_bit_of_the_base(fit, settings, scales):
    options = {"enable_checkpointing": True, "val_check_interval": 4, "limit_val_batches": 1}
    _, module = fit(QLoRAModule, before := Before(), AdapterCheckpoint(), val=True, trainer_options=options, **settings)
    assert {name.rpartition(".")[2] for name in before.base} == scales | {"weight"}
    assert same(base_tensors(module), before.base)
