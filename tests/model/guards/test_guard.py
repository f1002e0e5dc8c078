import json
import logging
import math
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning import Callback

from qlora_lightning import AdapterCheckpoint, GradientCheckpointing, InstructionDataModule, LossSums, QLoRAModule
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.guards import guard
from qlora_lightning.model.window import Window
from qlora_lightning.support.errors import UserError


class Spoilt(QLoRAModule):
    """The loss of a row, of a step, or the gradient of a step is not finite."""

    def __init__(self, base, row=None, step=None, gradient_step=None, **settings):
        super().__init__(base, **settings)
        self.row, self.step, self.gradient_step = row, step, gradient_step

    def compute_loss(self, batch):
        sums = super().compute_loss(batch)
        bad = self.row in batch["row_ids"].tolist() or self.trainer.global_step == self.step
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


def test_a_loss_that_is_not_finite_stops_the_run_and_its_row_is_written_down(fit, tmp_path, rows_file):
    with pytest.raises(UserError, match="NaN or infinite") as stop:
        fit(Spoilt, row=4)
    step = fit.trainer.global_step
    file = tmp_path / "run" / f"nonfinite-step-{step}.json"
    assert str(stop.value).startswith(
        f"The loss of step {step} is NaN or infinite. It comes in compute_loss, all modules' outputs being finite; "
        f"rows: {rows_file}:5. Rows and text: {file}. "
    )
    assert "model.on_nonfinite: skip" in str(stop.value)
    rank = json.loads(file.read_text())["ranks"][0]
    assert [row["row_id"] for row in rank["rows"]] == [4]
    assert "Count to 5." in rank["rows"][0]["text"]
    assert len(rank["rows_of_the_window"]) == 4
    assert all(tensor.isfinite().all() for tensor in fit.module.state_dict().values())


class SpoilWeight(Callback):
    """Puts an infinity into a norm of the base before a step: every row's forward breaks there."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1:
            pl_module.get_parameter(f"model.{self.name}.weight").data[0] = math.inf

    name = "base_model.model.model.layers.1.input_layernorm"


def test_a_weight_of_the_base_that_gave_it_is_named_and_no_row_blamed(fit, tmp_path):
    with pytest.raises(
        UserError, match=rf"loss of step 1 .*frozen weight {SpoilWeight.name}.weight, .*file of"
    ) as stop:
        fit(QLoRAModule, SpoilWeight())
    assert "rows.jsonl" not in str(stop.value)
    report = json.loads((tmp_path / "run" / "nonfinite-step-1.json").read_text())
    assert report["ranks"][0]["first_module"] == SpoilWeight.name


class SpoilOutput(Callback):
    """Lets a norm of the base give an infinity, its weight being sound."""

    def on_train_start(self, trainer, pl_module):
        pl_module.get_submodule(f"model.{SpoilWeight.name}").register_forward_hook(lambda *_: _[2] * math.inf)


@pytest.mark.parametrize("others", [[], [GradientCheckpointing()]])
def test_the_first_module_that_gave_it_is_named(fit, others):
    with pytest.raises(UserError, match=rf"loss of step 0 .*first from {SpoilWeight.name}; rows: .*rows.jsonl:\d"):
        fit(QLoRAModule, SpoilOutput(), *others)


def test_a_gradient_that_is_not_finite_stops_the_run_too(fit):
    with pytest.raises(UserError, match=r"gradient of step 2 .* in the gradient of 28 tensors, as .*layers\.1\."):
        fit(Spoilt, gradient_step=2)


def test_the_run_is_told_to_stop_also_where_nothing_can_be_written_or_found(fit, monkeypatch):
    monkeypatch.setattr(guard, "write_report", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    monkeypatch.setattr(guard, "find_nonfinite", lambda *_: 1 / 0)
    with pytest.raises(UserError, match=r"json could not be written: No space left on device"):
        fit(Spoilt, step=1)


class Before(Callback):
    """Copies adapters, optimizer state and learning rate around the step at hand."""

    def __init__(self, step):
        self.step, self.copies = step, []

    def look(self, trainer, pl_module):
        optimizer = trainer.optimizers[0]
        adapters = {name: tensor.detach().clone() for name, tensor in trainable_tensors(pl_module).items()}
        states = [state["exp_avg"].clone() for state in optimizer.state.values()]
        counts = [float(state["step"]) for state in optimizer.state.values()]
        self.copies.append((adapters, states, counts, optimizer.param_groups[0]["lr"]))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and batch_idx % 2 == 0:
            self.look(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step + 1 and batch_idx == 2 * self.step + 1:
            self.look(trainer, pl_module)


@pytest.mark.parametrize("fault", ["step", "gradient_step"])
def test_a_skipped_step_moves_nothing_but_the_schedule_and_is_counted(fit, fault, caplog):
    with caplog.at_level(logging.WARNING, "qlora_lightning"):
        trainer, module = fit(
            Spoilt, before := Before(2), schedule="linear", on_nonfinite="skip", weight_decay=0.1, **{fault: 2}
        )
    (adapters, states, counts, rate), (later, states_later, counts_later, next_rate) = before.copies
    assert all(torch.equal(later[name], adapters[name]) for name in adapters)
    assert counts == counts_later == [2.0] * 28
    assert all(torch.equal(*pair) for pair in zip(states, states_later, strict=True))
    assert next_rate < rate
    assert trainer.global_step == 4
    assert trainer.callback_metrics["skipped_steps"] == 1
    assert trainer.callback_metrics["train_loss"].isfinite()
    assert "step 2 is NaN or infinite" in caplog.text
    assert "Step skipped (model.on_nonfinite: skip), 1 so far." in caplog.text
    assert module.guard.skipped_steps == 1


def test_ten_skipped_steps_are_written_down_and_the_twentieth_in_a_row_stops(fit, tmp_path):
    class Always(Spoilt):
        def compute_loss(self, batch):
            sums = super().compute_loss(batch)
            return LossSums(sums.nll_sum * math.nan, *sums[1:])

    with pytest.raises(UserError, match=r"step 19 is NaN or infinite. So were the 20 steps up to it"):
        fit(Always, on_nonfinite="skip", trainer_options={"max_epochs": 6})
    assert len(list((tmp_path / "run").glob("nonfinite-step-*.json"))) == 10


def test_skipped_steps_are_counted_on_after_a_resume(fit, tmp_path):
    trainer, _ = fit(Spoilt, step=1, on_nonfinite="skip")
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    options = {"max_epochs": 2}
    _, again = fit(Spoilt, step=5, on_nonfinite="skip", ckpt_path=tmp_path / "x.ckpt", trainer_options=options)
    assert again.guard.skipped_steps == 2


def test_a_step_that_is_taken_ends_the_row_of_skipped_ones(fit):
    _, module = fit(Spoilt, step=1, on_nonfinite="skip")
    assert module.guard.state_dict() == {"skipped_steps": 1, "skipped_in_a_row": 0}


def test_a_rank_whose_own_numbers_are_finite_skips_with_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "_gather", lambda mine, world_size: [mine, {**mine, "rank": 1}])
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    strategy = SimpleNamespace(reduce=lambda flags, reduce_op: flags + torch.tensor([1.0, 0.0]))  # the other rank's
    trainer = SimpleNamespace(
        strategy=strategy, precision_plugin=None, global_step=3, global_rank=0, world_size=2, is_global_zero=True
    )
    judge = guard.TrainingGuard("skip")
    trainer.default_root_dir, trainer.callbacks = tmp_path, [judge]
    module = SimpleNamespace(trainer=trainer, window=Window(), model=torch.nn.Linear(1, 1), compute_loss=None)
    judge.judge_step(module, optimizer, torch.tensor(1.0), torch.tensor(1.0))
    assert judge.skipped_steps == 1
    assert parameter.grad is None
    assert len(json.loads((tmp_path / "nonfinite-step-3.json").read_text())["ranks"]) == 2


@pytest.mark.parametrize(("loss", "norm", "skipped"), [(1.0, math.inf, 0), (math.inf, math.inf, 1)])
def test_under_a_scaler_only_the_loss_is_judged(fit, loss, norm, skipped, monkeypatch):
    trainer, module = fit(on_nonfinite="skip")
    monkeypatch.setattr(trainer.precision_plugin, "scaler", object(), raising=False)
    module.guard.judge_step(module, trainer.optimizers[0], torch.tensor(loss), torch.tensor(norm))
    assert module.guard.skipped_steps == skipped


# ---- what stays, and what changes ------------------------------------------------------------------------------------


class ChangeBase(Callback):
    """Writes to a frozen weight at some hook."""

    def __init__(self, hook):
        setattr(self, hook, lambda trainer, pl_module, *_: self.change(pl_module))

    def change(self, pl_module):
        pl_module.get_parameter("model.base_model.model.model.norm.weight").data += 1


@pytest.mark.parametrize("hook", ["on_validation_start", "on_train_epoch_end"])
def test_a_frozen_tensor_that_changed_is_noticed_at_the_validation_or_at_the_end(fit, hook):
    with pytest.raises(
        RuntimeError, match=r"1 of \d+ frozen tensors changed during training, as .*model\.norm\.weight"
    ):
        fit(QLoRAModule, ChangeBase(hook), val=hook == "on_validation_start")


class LeavesOneOut(QLoRAModule):
    def parameter_groups(self):
        return [{"params": list(trainable_tensors(self).values())[1:]}]


def test_an_adapter_that_the_optimizer_does_not_hold_is_noticed(fit):
    with pytest.raises(RuntimeError, match=r"1 of 28 trainable tensors are in none .*Let `parameter_groups` return"):
        fit(LeavesOneOut)


class LosesGradient(Callback):
    """Takes the gradient of one B away from some step on."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step >= 4:
            next(p for name, p in trainable_tensors(pl_module).items() if ".lora_B." in name).grad.zero_()


def test_a_gradient_that_dies_later_is_noticed_behind_the_next_validation(fit):
    with pytest.raises(RuntimeError, match=r"1 of 28 trainable tensors get no gradient"):
        fit(QLoRAModule, LosesGradient(), val=True, trainer_options={"max_epochs": 2})
    assert fit.trainer.global_step == 4


@pytest.mark.parametrize("rate", [1e3, 1e10])
def test_adapters_that_diverge_are_told_so_and_no_wiring_is_blamed(fit, rate):
    words = r"Training has diverged by step \d+, at learning rate 1e\+\d+: .*\.lora_.*Lower model\.learning_rate"
    with pytest.raises(UserError, match=words):
        fit(QLoRAModule, val=True, learning_rate=rate, trainer_options={"max_epochs": 3})


class SpoiltValidation(QLoRAModule):
    """The loss of the second validation is not finite."""

    def __init__(self, base, value=math.nan, **settings):
        super().__init__(base, **settings)
        self.value, self.validations = value, 0

    def on_validation_epoch_end(self):
        self.validations += 1
        if self.validations == 2:
            self.val_statistics.nll_sum *= self.value
        super().on_validation_epoch_end()


VALIDATIONS = {"max_epochs": 2, "logger": False, "enable_checkpointing": True}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_stops_the_run_before_it_is_saved(fit, tmp_path, value):
    with pytest.raises(UserError, match=r"validation at step 8 gave a val_loss of (nan|inf)\. .*--ckpt_path last"):
        fit(SpoiltValidation, AdapterCheckpoint(), val=True, value=value, trainer_options=VALIDATIONS)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(file.name for file in folder.iterdir()) == ["last.ckpt", "step-000004.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 4


def test_by_skip_it_is_told_and_the_run_goes_on(fit, caplog):
    with caplog.at_level(logging.WARNING, "qlora_lightning"):
        trainer, _ = fit(SpoiltValidation, val=True, on_nonfinite="skip", trainer_options={"max_epochs": 3})
    assert trainer.global_step == 12
    told = [record.message for record in caplog.records if "val_loss" in record.message]
    assert told == ["The validation at step 8 gave a val_loss of nan. The run goes on (model.on_nonfinite: skip)."]


class NothingLabelled(QLoRAModule):
    def compute_loss(self, batch):
        return super().compute_loss({**batch, "labels": torch.full_like(batch["labels"], -100)})


def test_a_window_without_labels_is_no_dead_gradient(fit):
    fit(NothingLabelled, trainer_options={"max_steps": 2})
