"""A run that would train on for nothing is stopped: by losses, gradients, token ids."""

import contextlib
import math

import lightning
import pytest
import torch
from lightning import Callback
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
)
from lightning.pytorch.strategies import SingleDeviceStrategy

from qlora_lightning import AdapterCheckpoint, LossSums, QLoRAModule, UserError
from tests.packed import collate
from tests.steps import fit, make_module, trainable_tensors


class Spoilt(QLoRAModule):
    """The loss of steps, or the gradient of a step is not finite."""

    def __init__(self, base, steps=(), gradient_step=None, **settings):
        super().__init__(base, **settings)
        self.steps, self.gradient_step = steps, gradient_step

    def compute_loss(self, batch):
        sums = super().compute_loss(batch)
        nll = sums.loss * math.inf if self.trainer.global_step in self.steps else sums.loss
        if self.trainer.global_step == self.gradient_step:
            nll.register_hook(lambda gradient: gradient * math.nan)
        return LossSums(nll, sums.count, sums.metrics)


@pytest.fixture
def train(tiny_base, rows_file, tmp_path):
    """Train on sixteen rows, two a micro-batch, two of these a step: four steps an epoch; give the Trainer."""

    def run(cls=QLoRAModule, *callbacks, trainer_options=None, val=False, **settings):
        lightning.seed_everything(7, verbose=False)
        defaults = {"rank": 2, "compute_dtype": "fp32", "learning_rate": 1e-2, "warmup_ratio": 0.0}
        run.module = cls(str(tiny_base), **{**defaults, "schedule": "constant", **settings})
        options = {"max_epochs": 1, "accumulate_grad_batches": 2, "callbacks": list(callbacks)}
        options |= {"val": val, **(trainer_options or {})}
        return fit(run.module, tmp_path / "run", rows_file, **options)

    return run


class Diary(Callback):
    """Notes the rows of each step, and behind it the loss."""

    def __init__(self):
        self.rows, self.losses = {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.setdefault(trainer.global_step, []).extend(batch["row_ids"].tolist())

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.losses[trainer.global_step] = float(trainer.callback_metrics.get("train_loss", math.nan))


class OwnStep(QLoRAModule):
    def training_step(self, batch, batch_idx):
        return 0.0 * super().training_step(batch, batch_idx)


class Freezes(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(list(pl_module.children()))

    def finetune_function(self, pl_module, epoch, optimizer):
        """Thaw nothing."""


class Apple(CPUAccelerator):
    """A machine whose GPU is not there."""

    def setup_device(self, device):
        assert device.type == "mps"


def compiled(base):
    return torch.compile(QLoRAModule(base))


@pytest.mark.filterwarnings("ignore")  # what Lightning and the compiler warn of on the way
@pytest.mark.parametrize(
    ("build", "options", "words"),
    [
        (OwnStep, {}, "OwnStep overrides training_step, which computes the gradients itself"),
        (compiled, {}, r"was replaced, as torch\.compile\(module\) does: pass the module itself"),
        (QLoRAModule, {"callbacks": LearningRateFinder()}, "to the first step alone"),
        (QLoRAModule, {"callbacks": EMAWeightAveraging()}, "EMAWeightAveraging averages the whole model"),
        (QLoRAModule, {"callbacks": Freezes()}, "Freezes looks at the model before it is built"),
        (QLoRAModule, {"callbacks": ModelPruning("l1_unstructured")}, "ModelPruning looks at the model before it is"),
        (QLoRAModule, {"callbacks": GradientAccumulationScheduler({4: 2})}, "changes how many steps an epoch has"),
        (QLoRAModule, {"accelerator": "auto", "strategy": SingleDeviceStrategy("mps", Apple())}, "has no float64"),
    ],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
def test_what_would_train_something_else_is_rejected(tiny_base, rows_file, tmp_path, build, options, words):
    with pytest.raises(UserError, match=words):
        fit(build(str(tiny_base)), tmp_path, rows_file, max_steps=1, **options)


# ---- losses and gradients that are not finite ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "what", "dtype"), [({"steps": [2]}, "loss", "fp32"), ({"gradient_step": 2}, "gradient", "fp16")]
)
def test_a_step_that_is_not_finite_stops_the_run_with_its_rate_rows_and_the_loss_before(
    train, rows_file, fault, what, dtype
):
    with pytest.raises(UserError) as stop:
        train(Spoilt, diary := Diary(), compute_dtype=dtype, **fault)
    message = str(stop.value)
    assert f"The {what} of step 2, at learning rate 0.01, is NaN or infinite." in message
    assert f"The loss of the step before was {diary.losses[2]:.4g}." in message
    assert f"Rows of the step: {', '.join(f'{rows_file}:{row + 1}' for row in diary.rows[2])}." in message
    assert ("First use bf16 or fp32 (`model.compute_dtype`)" in message) is (dtype == "fp16")
    assert all(tensor.isfinite().all() for tensor in train.module.state_dict().values())


class SpoiltValidation(QLoRAModule):
    validations = 0

    def on_validation_epoch_end(self):
        self.validations += 1
        if self.validations == 2:
            self.statistics.sums["loss"] *= math.nan
        super().on_validation_epoch_end()


def test_a_validation_loss_that_is_not_finite_stops_the_run_before_it_is_saved(train, tmp_path):
    short = {"limit_train_batches": 4, "limit_val_batches": 1}  # two steps an epoch
    options = {"max_epochs": 2, "enable_checkpointing": True, **short}
    with pytest.raises(UserError, match=r"validation at step 4 gave a val_loss of nan\. .*--ckpt_path last"):
        train(SpoiltValidation, AdapterCheckpoint(), val=True, trainer_options=options)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(file.name for file in folder.iterdir()) == ["last.ckpt", "step-000002.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2


# ---- adapters that do not learn --------------------------------------------------------------------------------------


class LosesGradient(Callback):
    """Takes the gradient of one A or B away from some step on, for some steps."""

    def __init__(self, part, steps=math.inf):
        self.part, self.steps = part, steps

    def on_after_backward(self, trainer, pl_module):
        if 4 <= trainer.global_step < 4 + self.steps:
            next(p for name, p in trainable_tensors(pl_module).items() if self.part in name).grad.zero_()


class LeavesOneOut(QLoRAModule):
    def parameter_groups(self):
        return [{"params": list(trainable_tensors(self).values())[1:]}]


@pytest.mark.parametrize(
    ("cls", "callbacks", "words", "step"),
    [
        (QLoRAModule, [LosesGradient(".lora_A.")], r"1 of 28 trainable tensors get no gradient, as .*lora_A", 6),
        (LeavesOneOut, [], r"1 of 28 trainable tensors are in none .*Let `parameter_groups` return", 0),
    ],
    ids=["A", "optimizer"],
)
def test_adapters_that_would_stay_are_noticed(train, cls, callbacks, words, step):
    with pytest.raises(RuntimeError, match=words):
        train(cls, *callbacks, val=True, trainer_options={"max_epochs": 2})
    assert train.module.trainer.global_step == step


def test_gradients_that_are_zero_by_right_stop_nothing(train):
    """Those of q and k are, if each row of a step has one token before its label."""
    trainer = train(QLoRAModule, LosesGradient(".lora_A.", steps=2), val=True, trainer_options={"max_epochs": 2})
    assert trainer.global_step == 8


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
