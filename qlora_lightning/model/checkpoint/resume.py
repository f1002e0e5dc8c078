"""Resumes exactly where a run stopped: what a checkpoint holds beside tensors, and when it is put back."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from qlora_lightning.model.adapters.identity import data_differences, identity_of_data
from qlora_lightning.model.checkpoint import loops
from qlora_lightning.model.checkpoint.format import KEY, plain_settings, read_content
from qlora_lightning.model.checkpoint.ranks import capture_generators, gather_states, restore_generators
from qlora_lightning.model.checkpoint.setting_changes import (
    OF_VALIDATIONS,
    describe_changes,
    find_changes,
    keep_configured,
    optimizer_classes,
    show_change,
    trainer_settings,
)
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import datamodule_of
from qlora_lightning.support.versions import FORMAT_VERSION

_report = rank_zero_only(say)


def has_other_validation(checkpoint: Mapping[str, Any], trainer: Any) -> bool:
    """Whether the best adapter of a checkpoint was chosen on other validation samples than those at hand."""
    stored = checkpoint.get(KEY, {}).get("identity", {}).get("data", {})
    return "val" in data_differences(stored, identity_of_data(trainer))


class ExactResume(Callback):
    """Save and restore what Lightning does not: the random generators of each process, settings, and an identity.

    A checkpoint to resume from is of the end of an optimizer step: there are no gradients to keep. The module brings
    this callback along by ``configure_callbacks``, a new one for each fit. A subclass that overrides
    ``on_save_checkpoint`` without calling ``super()`` so breaks nothing.
    """

    def __init__(self) -> None:
        self._content: dict[str, Any] | None = None  # our part of the checkpoint, until all of it is put back
        self._checkpoint: dict[str, Any] = {}  # that Lightning is restoring

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        module: Any = pl_module
        checkpoint[KEY] = {
            "format_version": FORMAT_VERSION,
            "settings": plain_settings(checkpoint.pop("hyper_parameters", {})),
            "trainer": trainer_settings(trainer),
            "optimizers": optimizer_classes(trainer),
            "identity": {**module.identity, "data": identity_of_data(trainer)},
            "monitored": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "generators": gather_states(capture_generators(), trainer.global_rank, trainer.world_size),
        }
        if trainer.state.fn == "fit" and trainer.validating:
            loops.repeat_validation(checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        module: Any = pl_module
        content = read_content(checkpoint, "The checkpoint")
        fits = trainer.state.fn == "fit"
        _check_data(trainer, content["identity"].get("data", {}), checkpoint if fits else None)
        if not fits:
            return
        changes = find_changes(content["trainer"], trainer_settings(trainer), "trainer")
        _check_position(checkpoint, content["trainer"]["accumulate_grad_batches"], changes)
        if getattr(datamodule_of(trainer), "streaming", False):
            loops.lengthen_stream(trainer, checkpoint)
        self._content, self._checkpoint = content, checkpoint
        data, own = (each.get("settings", {}) for each in (content["identity"]["data"], identity_of_data(trainer)))
        changes = [
            *find_changes(content["settings"], plain_settings(module.hparams), "model"),
            *find_changes(data, own, "data"),
            *changes,
        ]
        if changes:
            _report(describe_changes(changes))
        if (saved := len(content["generators"])) != trainer.world_size:
            _report(
                f"Processes: {saved} saved the checkpoint, {trainer.world_size} resume it. The adapter will be as good "
                "if processes times batch_size stays, but not the same bit for bit: dropout and rounding differ."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._content is not None:  # Lightning restores the optimizers after this hook
            keep_configured(trainer, self._checkpoint, self._content["optimizers"])
        self._checkpoint = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        module.window.clear()  # a search for a learning rate, or a fit that failed, may have ended inside one
        loops.align_validations(trainer)
        if self._content is not None:
            # Lightning may end an epoch first, whose validation was before: there early stopping looks at them.
            monitored = self._content["monitored"]
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in monitored.items()})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._content is not None and not trainer.sanity_checking:  # stopped inside a validation, it begins with it
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset()  # see repeat_validation: only once
            self._put_back(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        loops.count_epoch(trainer)
        self._put_back(trainer)

    def _put_back(self, trainer: Trainer) -> None:
        """Restore this process's generators; last, since building loaders and iterators draws numbers too."""
        if self._content is not None and trainer.global_rank < len(self._content["generators"]):
            restore_generators(self._content["generators"][trainer.global_rank])
        self._content = None


def _check_data(trainer: Any, stored: Mapping[str, Any], checkpoint: Mapping[str, Any] | None) -> None:
    """Reject to resume a checkpoint with other samples, unless that is meant; inside an epoch in any case.

    There some training samples would come twice and others never. Another tokenizer or template is only reported.
    """
    data = datamodule_of(trainer)
    differences = data_differences(stored, identity_of_data(trainer))
    samples = {name: differences.pop(name) for name in ("train", "val") if name in differences}
    if differences:
        _report(f"Other than in the checkpoint: {', '.join(differences.values())}.")
    if not samples or checkpoint is None:
        return
    batches = loops.batches_of(checkpoint)
    inside_epoch = batches["current"]["completed"] and not batches["is_last_batch"]
    if "train" in samples and (inside_epoch or getattr(data, "streaming", False)):
        raise UserError(
            f"The checkpoint was saved inside an epoch with other {samples['train']}: a run cannot resume exactly "
            "there. Put data, tokenizer and chat template back as they were, or begin a new run from the adapter "
            "folder with model.adapter."
        )
    if not getattr(data, "accept_changed_data", False):
        raise UserError(
            f"The data are not those of the checkpoint: other {' and other '.join(samples.values())}. Put them back as "
            "they were, or pass `--data.accept_changed_data true` (in Python an attribute of the data module): with "
            "other validation samples the ranking of the best adapter starts over."
        )


def _check_position(checkpoint: Mapping[str, Any], accumulate: int, changes: list[tuple[str, Any, Any]]) -> None:
    """Reject a place in a run at which Lightning would not continue exactly."""
    if not loops.is_end_of_step(checkpoint, accumulate):
        raise UserError(
            "The checkpoint was saved inside an optimizer step (by a callback of yours, or when an error came): a run "
            "cannot resume exactly there. Take one of the end of a step, such as `--ckpt_path last`."
        )
    batches = loops.batches_of(checkpoint)
    is_validated_end = batches["is_last_batch"] and batches["current"]["completed"] == batches["current"]["ready"]
    validations = [change for change in changes if change[0].removeprefix("trainer.") in OF_VALIDATIONS]
    if is_validated_end and validations:  # Lightning could take the next batch for one more of the epoch that is over
        raise UserError(
            "The checkpoint is of an epoch's end, and its validations were others: "
            f"{', '.join(map(show_change, validations))}. Put that back as it was (it may change inside an epoch)."
        )
