"""Checks that stop what silently breaks training, or makes it useless: at the start of a run, and in each step."""

import contextlib
import copy
import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from qlora_lightning.model.adapters.folder import check_dtypes, check_trainable
from qlora_lightning.model.adapters.inject import trainable_tensors
from qlora_lightning.model.checkpoint.resume import ExactResume, capture_generators, restore_generators, same_generators
from qlora_lightning.model.memory.budget import TokenBudget
from qlora_lightning.model.protocol import Module
from qlora_lightning.model.sharded import ShardedDDPStrategy
from qlora_lightning.model.step.forward import evaluation_mode
from qlora_lightning.model.step.loss import reject_uncounted
from qlora_lightning.model.step.optimizer import check_warmup, ends_low, needs_end
from qlora_lightning.model.step.packed import (
    check_row_length,
    first_labelled_row,
    format_locations,
    is_packed,
    most_positions,
    row_locations,
    samples_of,
)
from qlora_lightning.support import trainer as trainers
from qlora_lightning.support.console import count_of
from qlora_lightning.support.errors import Diverged, NothingTrained, UserError
from qlora_lightning.support.files import CHECKPOINTS
from qlora_lightning.support.settings import check_mode, check_trainer_settings
from qlora_lightning.support.trainer import datamodule_of, find_callback
from qlora_lightning.support.values import check_setting

_REJECTED_CALLBACKS: dict[type[Callback], str] = {
    callbacks.StochasticWeightAveraging: "averages the whole model, packed bytes too",
    callbacks.WeightAveraging: "averages the whole model, packed bytes too",
    callbacks.BaseFinetuning: "looks at the model before it is built, and would find nothing",
    callbacks.ModelPruning: "looks at the model before it is built, and would find nothing",
    callbacks.GradientAccumulationScheduler: "changes how many steps an epoch has: the learning rate would fall late",
    callbacks.BatchSizeFinder: "changes how many steps an epoch has, and a step of any batch_size fits by itself",
}
_MAX_FACTOR = 10  # between the loss of training and validation rows
_MAX_ROUNDING = 2e-3  # of a sum: 1e-6 if packed attention computes it, more by a model's own forward in bf16
_MOST_EMPTY_STEPS = 3
_MOST_ZERO_STEPS = 3  # q and k rightly have a gradient of zeros if each row of a step has one context and one label

# ---- at the start of a run -------------------------------------------------------------------------------------------


def check_callbacks(trainer: Trainer | None) -> None:
    """Reject callbacks under which something else would be trained, before any of them sets up."""
    for kind, reason in _REJECTED_CALLBACKS.items():
        if trainer is not None and (callback := find_callback(trainer, kind)) is not None:
            raise UserError(f"{type(callback).__name__} {reason}: leave it out.", "trainer.callbacks")


def check_setup(module: Module) -> None:
    """Check the settings and data of a run before anything is loaded."""
    if not trainers.is_trial_run(module.trainer):  # which sets its own
        check_trainer_settings(module.trainer)
    data = datamodule_of(module.trainer)
    if getattr(data, "pairs", module.pairs) != module.pairs:
        raise UserError(
            f"{type(module).__name__} cannot train on {type(data).__name__}: preferences take "
            "qlora_lightning.PreferenceModule as model and qlora_lightning.PreferenceDataModule as data.",
            "data.class_path",
        )


def check_monitors(trainer: Trainer) -> None:
    """Reject callbacks of Lightning that wait for a metric without validation, or take its worst value for the best."""
    for callback in trainers.callbacks_of(trainer):
        if not isinstance(callback, callbacks.EarlyStopping | callbacks.ModelCheckpoint) or callback.monitor is None:
            continue
        name = type(callback).__name__
        check_mode("trainer.callbacks", callback.monitor, callback.mode, name)
    if not trainer.enable_validation:
        _reject_waiting(trainer, "set data.val or data.val_fraction")


def _reject_waiting(trainer: Trainer, remedy: str) -> None:
    """Reject early stopping by a validation that there is not; Lightning's error comes after an epoch."""
    for callback in trainers.callbacks_of(trainer):
        if isinstance(callback, callbacks.EarlyStopping) and callback.monitor.startswith("val_"):
            message = f"{type(callback).__name__} waits for {callback.monitor}: {remedy}, or leave it out."
            raise UserError(message, "trainer.callbacks")


def check_length(module: Module, batches: int) -> None:
    """Reject what the run would never reach, with so many batches an epoch: its least length, its first validation.

    A run that only its time ends may reach all.
    """
    trainer: Any = module.trainer
    rates_need_end = not module.overrides("configure_optimizers") and needs_end(module.schedule, module.warmup)
    steps, window = trainers.check_steps(trainer, rates_need_end), trainer.accumulate_grad_batches
    if steps is None or trainers.is_trial_run(trainer):
        return
    check_warmup(module.warmup, steps)
    report_time(module, steps)
    expected = f"at most {steps:,}, the steps of the run by trainer.max_epochs and trainer.max_steps"
    check_setting("trainer.min_steps", trainer.min_steps, (trainer.min_steps or 0) <= steps, expected)
    epochs = steps // math.ceil(batches / window)
    min_epochs = trainer.min_epochs or 0
    is_valid = min_epochs <= max(epochs, 1)  # 1 is what Lightning sets beside min_steps
    expected = f"at most {epochs:,}, the whole epochs of the run, which ends at step {steps:,}"
    check_setting("trainer.min_epochs", min_epochs, is_valid, expected)
    interval, every_n_epochs = getattr(trainer, "val_check_interval", None), trainer.check_val_every_n_epoch
    if not trainer.limit_val_batches or not trainer.enable_validation or interval is None:  # it is in minutes
        return
    is_valid = not isinstance(interval, int) or interval <= batches or every_n_epochs is None
    expected = f"at most {batches:,}, the batches of an epoch, a share such as 0.5, or check_val_every_n_epoch: null"
    check_setting("trainer.val_check_interval", interval, is_valid, expected)
    first = trainers.steps_to_validation(batches, window, interval, every_n_epochs)
    if first <= steps:
        return
    name = "check_val_every_n_epoch" if (every_n_epochs or 1) > 1 else "val_check_interval"
    end = f"step {steps:,}, the last of the run: the first validation would be after step {first:,}"
    is_share = name == "val_check_interval" and isinstance(interval, float)  # of an epoch, as by default
    check_setting(f"trainer.{name}", getattr(trainer, name), is_share, f"a validation by {end}")
    _reject_waiting(trainer, f"there is no validation by {end}. Set trainer.val_check_interval")
    trainers.say_once(f"The validation rows are not used: no validation by {end}.")


def report_time(module: Module, steps: int) -> None:
    """Report a limit in time under which the learning rate may never fall: its schedule is over the planned steps."""
    timer = find_callback(module.trainer, callbacks.Timer)
    is_timed = timer is not None and timer.time_remaining() is not None
    if is_timed and not module.overrides("configure_optimizers") and ends_low(module.schedule):
        trainers.say_once(
            f"The learning rate falls over {count_of(steps, 'step')}, those of the whole run. If trainer.max_time ends "
            "it earlier, it has not fallen: set trainer.max_steps to what fits into the time."
        )


def check_start(module: Module) -> None:
    """Check a module and its Trainer before the model is built."""
    trainer = trainers.trainer_of(module)
    if trainer is None:
        return
    if trainer.state.fn == TrainerFn.FITTING:
        if "training_step" in vars(module):
            raise UserError(
                f"training_step of this {type(module).__name__} was replaced, as torch.compile(module) does: pass the "
                "module itself. What gains from compiling is compiled on a GPU anyway.",
                "module.training_step",
            )
        try:
            inspect.signature(module.compute_loss).bind("batch")
        except TypeError as error:
            raise UserError(
                f"compute_loss of {type(module).__name__} is not called with a batch alone: {error}. Expected "
                "compute_loss(self, batch), which returns LossSums; the model is self.model.",
                "loss.signature",
            ) from error
        changed = [name for name in ("training_step", "backward", "optimizer_zero_grad") if module.overrides(name)]
        if not module.automatic_optimization:
            changed.append("automatic_optimization")
        if changed:
            raise UserError(
                f"{type(module).__name__} changes {changed[0]}: training_step computes the gradients itself, and a "
                "step begins by clearing them. Override compute_loss instead, or use a callback.",
                f"module.{changed[0]}",
            )
    runs = trainer.state.fn is not None  # the model may be built for a Trainer that does not run
    if runs and any(find_callback(trainer, kind) is None for kind in (ExactResume, TokenBudget, TrainingGuard)):
        raise UserError(
            "The callbacks that watch over a run and resume it are missing: return "
            "`[*super().configure_callbacks(), …]` from `configure_callbacks`.",
            "module.configure_callbacks",
        )
    device = trainer.strategy.root_device.type
    check_setting("trainer.accelerator", device, device != "mps", "cpu: Apple's GPU has no float64, which sums take")
    check_trainer(str(trainer.precision), type(trainer.strategy), module.quantization)


def check_trainer(precision: str, strategy: type[Strategy], quantization: str) -> None:
    """Reject Trainer settings under which training would silently go wrong."""
    expected = "32-true, for the adapters: products are computed in model.compute_dtype anyway"
    check_setting("trainer.precision", precision, precision == "32-true", expected)
    class_names = " ".join(kind.__name__ for kind in strategy.__mro__)
    is_valid = not any(name in class_names for name in ("FSDP", "DeepSpeed", "ModelParallel"))
    expected = "ddp or ddp_sharded: others shard a quantized base silently wrong, or are unverified"
    check_setting("trainer.strategy", strategy.__name__, is_valid, expected)
    is_valid = quantization != "int8" or not issubclass(strategy, ShardedDDPStrategy)
    check_setting("model.quantization", quantization, is_valid, "nf4 under ddp_sharded, which is untested with int8")


# ---- in a step -------------------------------------------------------------------------------------------------------


def check_training_mode(model: nn.Module) -> None:
    """Reject a model in evaluation mode, in which generation may have left it."""
    in_eval = [name for name, module in model.named_modules() if not module.training]
    if in_eval:
        raise UserError(
            f"The model is in evaluation mode in a training step ({len(in_eval)} modules, as {in_eval[0] or 'all'}), "
            "without dropout and activation checkpointing: call `model.train()` after `model.eval()` or `generate`.",
            "model.training",
        )


def check_sums(module: Module, batch: Any) -> None:
    """Warn of a ``compute_loss`` that returns no sums: those of a row twice are not two times those of the row once.

    They may be off by rounding. Metrics, and sums of a padded batch, which is never cut, have to be nearer to twice the
    sum than to the sum itself; those of a loss that draws random numbers must not be the sum itself.

    Both are computed in evaluation mode, from the same random numbers, and on copies of what a subclass has beside the
    model, so that nothing changes that the loss may count or average. Not checked are a loss of ours, and one that
    raises an error there: the step that follows raises its own.
    """
    is_ours = "compute_loss" not in vars(module) and type(module).compute_loss.__module__.startswith("qlora_lightning.")
    if is_ours or module.sharded_base is not None:
        return
    generators = capture_generators()
    try:
        batch = module.prepare_batch(batch)
        row, twice = first_labelled_row(batch), first_labelled_row(batch, 2)
        if row is None or twice["input_ids"].numel() > module.token_budget.tokens:
            return
        sums, draws = [], False
        for each in (row, twice):
            restore_generators(generators)
            with _copied_state(module), evaluation_mode(cast(Any, module)), torch.enable_grad():
                sums.append(_sum_batch(module, each))
            draws = draws or not same_generators(generators, capture_generators())
    except Exception:
        return
    finally:
        restore_generators(generators)
    for name, alone in sums[0].items():
        together = sums[1].get(name, math.nan)
        error, from_alone = abs(together - 2 * alone), abs(together - alone)
        is_exact = name in ("loss", "labelled_tokens") and is_packed(batch)
        if draws:
            is_fault = from_alone < _MAX_ROUNDING * abs(alone)
        else:
            is_fault = from_alone < error or (is_exact and error > _MAX_ROUNDING * max(abs(2 * alone), 1.0))
        if is_fault:
            quantity = {"loss": "loss_sum", "labelled_tokens": "count"}.get(name, f"metrics.{name}")
            trainers.say_once(
                f"Warning: compute_loss of {type(module).__name__} returns no sums. The {quantity} of a row is "
                f"{alone:.4g}, and that of the same row twice {together:.4g}, so the result depends on how memory cuts "
                "a batch. Return sums over tokens, as `LossSums.of(losses)` makes them, not means. A term that is not "
                "of tokens, such as a penalty on weights, is multiplied by the count."
            )
            return


@contextlib.contextmanager
def _copied_state(module: Any) -> Iterator[None]:
    """Give a subclass copies of its own attributes for a while; afterwards it has exactly those it had before."""
    attributes, modules = dict(vars(module)), module._modules
    buffers = module._buffers
    try:
        own = {name: value for name, value in attributes.items() if name not in module.own_names}
        vars(module).update(copy.deepcopy(own))
        module._modules = {
            name: each if name == "model" or _is_large(each) else copy.deepcopy(each) for name, each in modules.items()
        }
        module._buffers = copy.deepcopy(buffers)
        yield
    finally:
        for name in vars(module).keys() - attributes.keys():
            delattr(module, name)
        vars(module).update(attributes)


def _is_large(module: nn.Module | None) -> bool:
    """Whether this is a model of its own, such as a teacher."""
    return module is not None and sum(each.numel() for each in module.parameters()) > 10_000_000


def _sum_batch(module: Module, batch: Any) -> dict[str, float]:
    sums = module.sum_loss(module.micro_batch_of(batch) if is_packed(batch) else batch)
    return {name: float(value) for name, value in sums.detach().by_name().items()}


# ---- each optimizer step, and each validation ------------------------------------------------------------------------


class TrainingGuard(Callback):
    """Reject, or warn of, what breaks training: at the start of a run, before each step, and after each validation.

    It does not change how the model trains. The module adds it in ``configure_callbacks`` and calls :meth:`check_step`.

    Attributes:
        checks_due: Whether the next step's gradients are checked: of the first step, and after each validation.
    """

    def __init__(self) -> None:
        self.checks_due = True
        self._zeros: list[set[str]] = []  # names of gradients of zeros, in the last steps that were checked
        self._last_loss: float | None = None  # of the step before, if this process took it
        self._sanity_loss: float | None = None  # of the validation before the first step, until that
        self._empty_steps: int | None = 0  # without a counted token, since the fit began; None: one has had some

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and trainer.global_step == 0:
            check_sums(cast(Any, pl_module), batch)

    def check_step(
        self,
        pl_module: Module,
        optimizer: torch.optim.Optimizer,
        means: Mapping[str, Tensor],
        totals: Mapping[str, float],
    ) -> None:
        """Stop the run if the mean ``loss`` or ``grad_norm`` is not finite, or tensors would never learn.

        All are over all ranks, which therefore decide alike. A step that is skipped has no ``grad_norm``.
        """
        self._check_count(totals["labelled_tokens"])
        is_skipped = "grad_norm" not in means
        not_finite = [name for name in ("loss", "grad_norm") if name in means and not math.isfinite(means[name])]
        if self not in trainers.callbacks_of(pl_module.trainer):
            # Lightning's search for a learning rate runs without callbacks, and ends where training diverges.
            pl_module.trainer.should_stop = pl_module.trainer.should_stop or bool(not_finite)
        elif not_finite:
            self._stop(pl_module, optimizer, "loss" if "loss" in not_finite else "gradient")
        elif self.checks_due and totals["labelled_tokens"] and not is_skipped:  # without labels zeros are right
            self._check_gradients(trainable_tensors(cast(Any, pl_module)), optimizer)
        self._last_loss = float(means["loss"])
        self._compare_with_validation(self._last_loss)

    def _check_count(self, count: float) -> None:
        """Reject a count that divides no sum, and a fit whose first steps count nothing: it would learn nothing."""
        if not 0 <= count < math.inf:
            raise UserError(
                f"compute_loss counted {count:g} in a step: expected a number of 0 or more as LossSums.count, by which "
                "the gradient is divided.",
                "loss.count",
            )
        if count or self._empty_steps is None:
            self._empty_steps = None
            return
        self._empty_steps += 1
        if self._empty_steps == _MOST_EMPTY_STEPS:
            reject_uncounted(f"The first {_MOST_EMPTY_STEPS} steps")

    def _compare_with_validation(self, loss: float) -> None:
        """Report a first loss that is far from that of the validation before it, which has the same weights."""
        sanity_loss, self._sanity_loss = self._sanity_loss or math.nan, None
        are_comparable = loss > 0 and sanity_loss > 0  # a loss of one's own may be below 0; NaN is not above it
        if are_comparable and not 1 / _MAX_FACTOR <= loss / sanity_loss <= _MAX_FACTOR:
            trainers.say_once(
                f"Warning: the first step has a train_loss of {loss:.4g}, and the validation before it, of the same "
                f"weights, a val_loss of {sanity_loss:.4g}. Look at rows of both with `inspect`; if compute_loss is "
                "your own, look at what it does in training."
            )

    def _check_gradients(self, trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Reject tensors that would never learn; look again in the next step if an A or B has a gradient of zeros."""
        optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if without_group := [name for name, parameter in trainable.items() if id(parameter) not in optimized]:
            raise UserError(
                f"{len(without_group)} of {len(trainable)} trainable tensors are in none of the optimizer's groups, as "
                f"{', '.join(without_group[:3])}: they would never learn. Let `parameter_groups` return them.",
                "module.parameter_groups",
            )
        check_dtypes(trainable)  # which a hook may have cast since the start
        without_gradient = {name for name, parameter in trainable.items() if parameter.grad is None}
        adapters = {name for name in trainable if ".lora_A." in name or ".lora_B." in name} - without_gradient
        zeros = {name for name in adapters if not cast(Tensor, trainable[name].grad).any()}
        waiting = set()  # as long as B is zero, so is the gradient of A
        for name in zeros:
            lora_B = trainable.get(name.replace(".lora_A.", ".lora_B."))
            if ".lora_A." in name and lora_B is not None and not lora_B.detach().any():
                waiting.add(name)
        self._zeros = [*self._zeros, zeros - waiting][-_MOST_ZERO_STEPS:] if zeros else []
        if len(self._zeros) == _MOST_ZERO_STEPS:
            without_gradient |= set.intersection(*self._zeros)
        if without_gradient:
            raise UserError(
                f"{len(without_gradient)} of {len(trainable)} trainable tensors get no gradient, as "
                f"{', '.join(sorted(without_gradient)[:3])}: they would never learn. A frozen layer passes none, "
                "compute_loss does not use them, or training has diverged (lower model.learning_rate).",
                "gradient.missing",
            )
        self.checks_due = bool(zeros)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if cast(Module, pl_module).window.batches:
            raise UserError(
                f"{type(pl_module).__name__} overrides `optimizer_step` without `super().optimizer_step(…)`, which "
                "divides the gradients of a sum by its labeled tokens.",
                "module.optimizer_step",
            )

    def _stop(self, pl_module: Module, optimizer: torch.optim.Optimizer, quantity: str) -> None:
        """Stop the run, and name the rows of the step; every rank must call it."""
        trainer, rate = pl_module.trainer, float(optimizer.param_groups[0]["lr"])
        locations = row_locations(datamodule_of(trainer), pl_module.window.row_ids)
        rows = format_locations(trainers.gather_lists(trainer, locations))
        last_loss = "" if self._last_loss is None else f" The loss of the step before was {self._last_loss:.4g}."
        is_fp16 = pl_module.identity.get("compute_dtype") == "float16"
        dtype_advice = "First use bf16 or fp32 (`model.compute_dtype`): fp16 ends at 65,504. " if is_fp16 else ""
        advice = "Look at these rows, or lower model.learning_rate."
        if quantity == "loss" and not trainer.global_step:
            advice = f"Nothing is trained yet: look at the base {pl_module.identity.get('base')} first, at its "
            advice += "config.json (rms_norm_eps, rope_theta, …) and its weights, then at these rows."
        raise Diverged(
            f"The {quantity} of step {trainer.global_step}, at learning rate {rate:.3g}, is NaN or infinite.{last_loss}"
            f" Rows of the step: {rows}. {dtype_advice}{advice}",
            f"{quantity}.not_finite",
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        module = cast(Module, pl_module)
        check_setup(module)
        if stage == "fit":
            check_monitors(trainer)
            batches = trainers.batches_of_epoch(trainer)
            if batches is not None:  # else known with the loader, after loading
                check_length(module, batches)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(Module, pl_module)
        # the one of Tuner.lr_find has ended by now
        if find_callback(trainer, callbacks.LearningRateFinder) is not None:
            raise UserError(
                "LearningRateFinder in trainer.callbacks would give its rate to the first step alone: call Lightning's "
                "Tuner(trainer).lr_find, and set model.learning_rate to what it finds.",
                "trainer.callbacks",
            )
        check_trainable(cast(Any, module), module.model)
        config, data = module.causal_lm.config, datamodule_of(trainer)
        check_row_length(config, getattr(data, "max_length", 0))
        samples, n_positions = samples_of(data, "train"), most_positions(config)
        longest = 0 if samples is None else samples.longest_text
        if n_positions is not None and longest > n_positions:
            trainers.say_once(
                f"Rows have up to {longest:,} tokens, and the base was pre-trained on {n_positions:,}: set "
                "data.max_length to that, unless its rotary embedding reaches further."
            )
        if module.quantization in ("nf4", "fp4") and find_callback(trainer, callbacks.ModelSummary) is not None:
            trainers.say_once("Lightning's model summary counts the bytes of packed weights, not their parameters.")
        groups = [group for each in trainer.optimizers for group in each.param_groups]
        if len(groups) == 1 and find_callback(trainer, callbacks.LearningRateMonitor) is not None:
            trainers.say_once("LearningRateMonitor logs once more what is logged as learning_rate: leave it out.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.checks_due, self._zeros, self._last_loss, self._empty_steps = True, [], None, 0
        if trainers.batches_of_epoch(trainer) is None and trainer.num_training_batches < math.inf:
            check_length(cast(Module, pl_module), int(trainer.num_training_batches))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step:  # also of a resume with nothing left to train
            return
        is_timed = find_callback(trainer, callbacks.Timer) is not None
        reason = "trainer.max_time was over before the first: allow more" if is_timed else "a callback has stopped it"
        raise NothingTrained(f"The fit took no step: {reason}. Nothing was trained, and no adapter saved.", "fit.steps")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, loss = cast(Module, pl_module), trainer.callback_metrics.get("val_loss")
        if trainer.sanity_checking and loss is not None and module.statistics.sums:  # not of an own validation_step
            self._sanity_loss = float(loss)
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.checks_due = True  # an evaluation pass may have changed what trains
        if loss is not None and not loss.isfinite() and not module.statistics.fault:
            has_saved = (Path(trainer.default_root_dir) / CHECKPOINTS / "last.ckpt").exists()
            hint = ": `--ckpt_path last` is from before" if has_saved else ""
            raise Diverged(  # before callbacks that write checkpoints, which come last
                f"The validation at step {trainer.global_step} gave a val_loss of {float(loss)}. Nothing of it is "
                f"saved{hint}. Lower model.learning_rate, or look at the validation rows.",
                "val_loss.not_finite",
            )
