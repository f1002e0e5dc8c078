"""Resume exactly where a run stopped: what a checkpoint stores besides tensors, and when it is restored."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch.optim.lr_scheduler import LambdaLR

from qlora_lightning.model.adapters.identity import data_differences, identity_of_data
from qlora_lightning.model.checkpoint.format import KEY, CheckpointReader, plain_settings, read_content
from qlora_lightning.model.protocol import Module
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import FORMAT_VERSION
from qlora_lightning.support.trainer import datamodule_of, gather_lists, say_once, validation_follows

Change = tuple[str, Any, Any]
"""A setting's name, its value in the checkpoint, and its value now."""

_TRAINING = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision", "world_size")
_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "state1", "state2"}  # in torch's and bitsandbytes' optimizers
_VALIDATION = ("limit_val_batches", "val_check_interval", "check_val_every_n_epoch")


class ExactResume(Callback):
    """Save and restore the state that Lightning does not: each process's random generators, settings, and an identity.

    A checkpoint to resume from is written at the end of an optimizer step, when there are no gradients to save. The
    module adds a new callback for each fit in ``configure_callbacks``. Since this is a callback and not a hook of the
    module, a subclass that overrides ``on_save_checkpoint`` without calling ``super()`` breaks nothing.
    """

    def __init__(self) -> None:
        self._checkpoint: dict[str, Any] | None = None  # the checkpoint being restored, until the first batch
        self._groups: list[dict[str, Any]] = []  # of the optimizers, as the config sets them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not a user's plugin
            trainer.strategy.checkpoint_io = CheckpointReader()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        module = cast(Module, pl_module)
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        ends_batch = batches.completed < batches.ready
        checkpoint[KEY] = {
            "format_version": FORMAT_VERSION,
            "settings": plain_settings(checkpoint.pop("hyper_parameters", {})),
            "trainer": trainer_settings(trainer),
            "optimizers": _optimizer_classes(trainer),
            "groups": [plain_settings(group) for group in self._groups],
            "identity": {**module.identity, "data": identity_of_data(trainer)},
            "micro_batch_size": gather_lists(trainer, [module.token_budget.capture()]),
            "loss_scale": module.loss_scale.state_dict(),
            "monitored": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "generators": gather_lists(trainer, [capture_generators()]),
            "before_validation": ends_batch and validation_follows(trainer),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        content = read_content(checkpoint, "The checkpoint")
        if trainer.state.fn != "fit":
            return
        self._checkpoint = checkpoint
        stored_data, batches = content["identity"]["data"], checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        changes = find_changes(content["trainer"], trainer_settings(trainer), "trainer")
        identity = identity_of_data(trainer)
        val_removed = "val" in stored_data and identity and "val" not in identity
        data_changes = [("data.val", "rows", None)] if val_removed else []
        _check_position(content, batches, [*changes, *data_changes])
        _check_samples(trainer, stored_data, batches)
        changes += find_changes(content["settings"], plain_settings(pl_module.hparams), "model")
        changes += find_changes(stored_data.get("settings", {}), identity.get("settings", {}), "data")
        module = cast(Module, pl_module)
        module.loss_scale.load_state_dict(content["loss_scale"])
        budgets = content["micro_batch_size"]  # for each process that saved
        module.token_budget.restore(budgets[trainer.global_rank % len(budgets)])
        if changes:
            lines = [f"  {_show_change(change)}" for change in changes]
            say_once("\n".join(["Settings that differ from the checkpoint's (there → now):", *lines]))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._checkpoint is not None:  # Lightning restores the optimizers after this hook
            _check_optimizers(trainer, self._checkpoint)
        self._groups = [{**group} for optimizer in trainer.optimizers for group in optimizer.param_groups]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _align_validations(trainer)
        if self._checkpoint is not None:
            content = self._checkpoint[KEY]
            _apply_current_settings(trainer, content.get("groups") or [{}] * len(self._groups), self._groups)
            _restore_monitored(trainer, content["monitored"])
            _step_schedules_of_batch(trainer)
            _begin_longer_epoch(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _step_schedules_of_epoch(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        _count_epoch(trainer)
        if self._checkpoint is not None:  # last, because building loaders and iterators also draws random numbers
            generators = self._checkpoint[KEY]["generators"]
            if trainer.global_rank < len(generators):
                restore_generators(generators[trainer.global_rank])
            self._checkpoint = None


# ---- what Lightning 2.6 counts or steps differently after a resume ---------------------------------------------------
#
# | corrected                          | when                       | by, and why                                     |
# |------------------------------------|----------------------------|-------------------------------------------------|
# | `trainer.val_check_batch`          | each start of training     | `_align_validations`: inside a window no        |
# |                                    |                            | checkpoint can be exact                         |
# | `trainer.callback_metrics`         | a resumed start            | `_restore_monitored`: early stopping reads them |
# |                                    |                            | at the end of an epoch validated before         |
# | schedules that follow a metric     | a resumed start, saved in  | `_step_schedules_of_batch`: they were due after |
# |                                    | `on_train_batch_end`       | the save                                        |
# | `epoch_progress.current.completed` | the same, at an epoch's    | `_step_schedules_of_batch`: one too high while  |
# |                                    | end, for the time of a call| schedules of every n-th epoch read it           |
# | `batch_progress`, restart stage    | the same, if the epoch has | `_begin_longer_epoch`: these batches would      |
# |                                    | more batches now           | count as some of the next epoch                 |
# | schedules of an epoch              | the end of an epoch that   | `_step_schedules_of_epoch`: they are left out   |
# |                                    | was resumed at its end     |                                                 |
# | `epoch_progress` ready, started    | the first batch after that | `_count_epoch`: a checkpoint from inside the    |
# |                                    |                            | epoch would be read as one of its end           |


def _restore_monitored(trainer: Trainer, monitored: Mapping[str, float]) -> None:
    """Restore the metrics that a callback may read before the next validation."""
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in monitored.items()})


def _step_schedules_of_batch(trainer: Trainer) -> None:
    """Step the schedules that both loops' ``on_advance_end`` would step after a save in ``on_train_batch_end``."""
    epoch_loop, epoch = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress.current
    if not epoch_loop.restarted_on_train_batch_end:
        return
    epoch_loop.update_lr_schedulers("step", update_plateau_schedulers=True)
    if trainer.is_last_batch:
        epoch.completed -= 1  # _FitLoop.reset already counted this epoch
        epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        epoch.completed += 1


def _begin_longer_epoch(trainer: Trainer) -> None:
    """Restart the batch count of an epoch that was saved at its end and has more batches now."""
    epoch_loop = trainer.fit_loop.epoch_loop
    if not (epoch_loop.restarted_on_train_batch_end and trainer.is_last_batch):
        return
    if epoch_loop.batch_progress.current.ready < trainer.num_training_batches:
        epoch_loop.batch_progress.reset_on_run()
        epoch_loop.reset_restart_stage()


def _step_schedules_of_epoch(trainer: Trainer) -> None:
    """Step the schedules that ``_FitLoop.on_advance_end`` skips while it restarts."""
    if trainer.fit_loop.restarting:
        trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)


def _count_epoch(trainer: Trainer) -> None:
    """Count an epoch that Lightning started without counting, after a resume at the end of the previous epoch."""
    progress: Any = trainer.fit_loop.epoch_progress
    if progress.current.ready == progress.current.processed:
        progress.increment_ready()
        progress.increment_started()


# ---- random generators -----------------------------------------------------------------------------------------------


def capture_generators() -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's generators, and of the generator of this process's GPU."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if _computes_on_gpu() else [],
    }


def restore_generators(state: dict[str, Any]) -> None:
    """Restore the state that :func:`capture_generators` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and _computes_on_gpu():
        torch.cuda.set_rng_state(state["cuda"][0])


def same_generators(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether no random numbers were drawn between two calls of :func:`capture_generators`."""
    pairs = zip([one["torch"], *one["cuda"]], [other["torch"], *other["cuda"]], strict=False)
    of_torch = all(torch.equal(state, other_state) for state, other_state in pairs)
    return of_torch and all(one[name] == other[name] for name in ("python", "numpy"))


def _computes_on_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]  # reading a generator would initialize it


# ---- where a run can resume, and where it validates ------------------------------------------------------------------


def _check_position(content: Mapping[str, Any], batches: Mapping[str, Any], changes: Sequence[Change]) -> None:
    """Reject a checkpoint from which a run would not resume exactly, judging by Lightning's batch counters."""
    ready, processed, completed = (batches["current"][name] for name in ("ready", "processed", "completed"))
    accumulate = content["trainer"]["accumulate_grad_batches"]
    if ready != processed or (ready % accumulate and not batches["is_last_batch"]):
        raise UserError(
            "The checkpoint was saved inside an optimizer step (by your own callback, or on an error): a run cannot "
            "resume exactly there. Take one saved at the end of a step, such as `--ckpt_path last`.",
            "checkpoint.position",
        )
    val_changes = [change for change in changes if change[0].removeprefix("trainer.") in (*_VALIDATION, "data.val")]
    if content.get("before_validation") and not val_changes:  # _TrainingEpochLoop.advance of Lightning 2.6 skips it
        raise UserError(
            "The checkpoint was saved before a validation that was due, as ModelCheckpoint does with "
            "every_n_train_steps: a run resumed there would skip it. Take one saved after a validation or at another "
            "step, or change trainer.val_check_interval to do without that validation.",
            "checkpoint.before_validation",
        )
    if batches["is_last_batch"] and completed == ready and val_changes:  # after the validation of an epoch's end
        raise UserError(  # Lightning could count the next batch as one of the finished epoch
            "The checkpoint was saved at the end of an epoch, and its validation settings were different: "
            f"{', '.join(map(_show_change, val_changes))}. Change them back (they may change inside an epoch).",
            "checkpoint.validations",
        )


def has_other_validation(checkpoint: Mapping[str, Any], trainer: Any) -> bool:
    """Whether a checkpoint's best adapter was chosen on validation samples that differ from the current ones."""
    stored = checkpoint.get(KEY, {}).get("identity", {}).get("data", {})
    return "val" in data_differences(stored, identity_of_data(trainer))


def _check_samples(trainer: Trainer, stored: Mapping[str, Any], batches: Mapping[str, Any]) -> None:
    """Reject changed samples unless the user accepts them.

    Inside an epoch, always reject them, because some samples would come twice and others never.
    """
    data, differences = datamodule_of(trainer), data_differences(stored, identity_of_data(trainer))
    changed = {name: differences[name] for name in ("train", "val") if name in differences}
    inside_epoch = batches["current"]["completed"] and not batches["is_last_batch"]
    if "train" in changed and inside_epoch:
        raise UserError(
            f"The checkpoint was saved inside an epoch with other {changed['train']}: a run cannot resume exactly "
            "there. Put data, tokenizer and chat template back as they were, or begin a new run from the adapter "
            "folder with model.adapter.",
            "checkpoint.data",
        )
    if changed and not getattr(data, "accept_changed_data", False):
        raise UserError(
            f"The data are not those of the checkpoint: other {' and other '.join(changed.values())}. Put them back as "
            "they were, or pass `--data.accept_changed_data true` (in Python an attribute of the data module): with "
            "other validation samples the ranking of the best adapter starts over.",
            "data.accept_changed_data",
        )


def _align_validations(trainer: Trainer) -> None:
    """Move validations, and so checkpoints, to the ends of optimizer steps, by rounding down an interval in batches.

    Reject an interval in minutes, and one counted across epochs that end with a short window.
    """
    interval, window, n_batches = trainer.val_check_batch, trainer.accumulate_grad_batches, trainer.num_training_batches
    if not trainer.enable_validation or window == 1 or interval == math.inf:
        return
    ends_short = n_batches != math.inf and n_batches % window != 0
    if interval is None or (ends_short and trainer.check_val_every_n_epoch is None):
        raise UserError(
            f"trainer.val_check_interval {trainer.val_check_interval} falls in the middle of an optimizer step of "
            f"{window} batches (trainer.accumulate_grad_batches). Set it to a fraction of the epoch, such as 0.25, "
            "with trainer.check_val_every_n_epoch: 1.",
            "trainer.val_check_interval",
        )
    if interval < n_batches:
        trainer.val_check_batch = int(min(max(int(interval) // window, 1) * window, n_batches))


# ---- settings: the command line overrides the config, which overrides the checkpoint ---------------------------------


def trainer_settings(trainer: Any) -> dict[str, Any]:
    """Return the Trainer settings that training depends on, as plain values."""
    values = {name: getattr(trainer, name, None) for name in (*_TRAINING, *_VALIDATION)}
    return {name: value if isinstance(value, int | float | None) else str(value) for name, value in values.items()}


def find_changes(stored: Mapping[str, Any], current: Mapping[str, Any], prefix: str) -> list[Change]:
    """List the settings whose values differ between the two sides."""
    names = sorted(stored.keys() & current.keys())
    return [(f"{prefix}.{name}", stored[name], current[name]) for name in names if stored[name] != current[name]]


def _show_change(change: Change) -> str:
    name, *values = change
    texts = ["null" if value is None else str(value) for value in values]
    return f"{name}: " + " → ".join(text if len(text) <= 60 else f"{text[:57]}…" for text in texts)


def _optimizer_classes(trainer: Any) -> list[str]:
    return [f"{type(optimizer).__module__}.{type(optimizer).__qualname__}" for optimizer in trainer.optimizers]


def _check_optimizers(trainer: Any, checkpoint: Mapping[str, Any]) -> None:
    """Reject a checkpoint whose optimizers differ in class or shapes, because these could not use its state."""
    stored_classes, classes = checkpoint[KEY]["optimizers"], _optimizer_classes(trainer)
    if stored_classes != classes:
        raise UserError(
            f"The optimizer was {', '.join(stored_classes)} and is {', '.join(classes)}, which cannot continue from "
            "that state: put model.optimizer back, or begin a new run from the adapter folder with model.adapter.",
            "model.optimizer",
        )
    for optimizer, state in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
        _check_moments(optimizer, state)


def _apply_current_settings(
    trainer: Any, stored: Sequence[Mapping[str, Any]], configured: Sequence[Mapping[str, Any]]
) -> None:
    """Apply the config's changes to the settings that Lightning restored: decay, betas, rates of the schedule.

    Otherwise, a new ``model.learning_rate`` would have no effect. Everything else is kept from the checkpoint, because
    some optimizers count steps in their groups. The rates of a schedule other than transformers' are also kept.
    ``stored`` and ``configured`` have the settings of all groups before the first step, of the checkpoint's run and of
    the current one.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for group, before, settings in zip(groups, stored, configured, strict=True):
        changed = [name for name, value in plain_settings(settings).items() if before.get(name) != value]
        group.update({name: settings[name] for name in changed if name != "lr"})
    for optimizer in trainer.optimizers:  # torch keeps the step number in a tensor where `fused` and `foreach` read it
        optimizer.load_state_dict(optimizer.state_dict())
    for schedule in (config.scheduler for config in trainer.lr_scheduler_configs):
        if isinstance(schedule, LambdaLR):  # its rates depend only on the step, like transformers'
            schedule.base_lrs = [group["initial_lr"] for group in schedule.optimizer.param_groups]
            for group, factor in zip(schedule.optimizer.param_groups, schedule.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)


def _check_moments(optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]) -> None:
    """Reject a state that does not fit its parameter, because fused kernels do not check and would use other memory."""
    numbers = [number for group in stored["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        state = stored["state"].get(number, {})  # empty before the first step
        for name in _MOMENTS & state.keys():
            found, expected = tuple(state[name].shape), tuple(parameter.shape)
            if found != expected:
                raise UserError(
                    f"The checkpoint's optimizer state does not fit: {name} of tensor {number} is {found}, expected "
                    f"{expected}. Take another checkpoint, or begin a new run from the adapter folder with "
                    "model.adapter.",
                    "checkpoint.damaged",
                )
