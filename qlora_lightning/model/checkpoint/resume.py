"""Resumes exactly where a run stopped: what a checkpoint holds beside tensors, and when it is put back."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from qlora_lightning.base.adapter_folder import find_adapter_folder, read_identity
from qlora_lightning.model.adapters.identity import data_differences, identity_of_data
from qlora_lightning.model.checkpoint import loops
from qlora_lightning.model.checkpoint.format import KEY, plain_settings, read_content
from qlora_lightning.model.checkpoint.ranks import capture_generators, gather_states, restore_generators
from qlora_lightning.model.checkpoint.setting_changes import (
    describe_changes,
    describe_optimizers,
    find_changes,
    keep_configured,
    keep_patience,
    show_change,
    trainer_settings,
)
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.versions import FORMAT_VERSION

_report = rank_zero_only(say)


def check_data(stored: Mapping[str, Any], own: Mapping[str, Any], inside_epoch: bool, accepted: bool) -> None:
    """Reject other samples, unless that is ``accepted``; inside an epoch other training samples in any case.

    There some would come twice and others never. Another tokenizer or template that gives the same samples is accepted.
    """
    differences = data_differences(stored, own)
    samples = {name: differences.pop(name) for name in ("train", "val") if name in differences}
    changes = find_changes(stored.get("settings", {}), own.get("settings", {}), "data")
    causes = ", ".join([*differences.values(), *map(show_change, changes)])
    causes = f" These differ too: {causes}." if causes else ""
    if inside_epoch and "train" in samples:
        raise UserError(
            f"The checkpoint was saved inside an epoch with other {samples['train']}: a run cannot resume exactly "
            f"there.{causes} Put data, tokenizer and chat template back as they were, or begin a new run from the "
            "adapter folder with model.adapter."
        )
    if samples and not accepted:
        raise UserError(
            f"The data are not those of the checkpoint: other {' and other '.join(samples.values())}.{causes} Put them "
            "back as they were, or pass `--data.accept_changed_data true` (in Python an attribute of the data module): "
            "with other validation samples the ranking of the best adapter starts over."
        )


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
        self._optimizers: list[dict[str, Any]] = []  # as they are configured
        self._content: dict[str, Any] | None = None  # our part of the checkpoint, until all of it is put back
        self._checkpoint: dict[str, Any] = {}  # that Lightning is restoring

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        module: Any = pl_module
        settings = checkpoint.pop("hyper_parameters", {})
        checkpoint[KEY] = {
            "format_version": FORMAT_VERSION,
            "settings": plain_settings(settings),
            "trainer": trainer_settings(trainer),
            "optimizers": self._optimizers,
            "identity": {**module.identity, "data": identity_of_data(trainer)},
            "inside_step": module.window.is_open or loops.is_inside_batch(checkpoint),
            "monitored": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "generators": gather_states(capture_generators(), trainer.global_rank, trainer.world_size),
        }
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            loops.repeat_validation(trainer, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        module: Any = pl_module
        data = getattr(trainer, "datamodule", None)
        content = read_content(checkpoint, "The checkpoint")
        stored, own = content["identity"].get("data", {}), identity_of_data(trainer)
        _report_other_data("the checkpoint", stored, own, with_samples=trainer.state.fn == "fit")
        if trainer.state.fn != "fit":
            return
        is_stream = bool(getattr(data, "streaming", False))
        accepted = bool(getattr(data, "accept_changed_data", False))
        check_data(stored, own, loops.is_inside_epoch(checkpoint) or is_stream, accepted)
        if content["inside_step"]:
            raise UserError(
                "The checkpoint was saved inside an optimizer step or at the start of an epoch (by a callback of "
                "yours, or when an error came): a run cannot resume exactly there. Take one that was saved at the end "
                "of a step, such as `--ckpt_path last`."
            )
        loops.leave_validation_out(trainer, checkpoint)
        if is_stream:
            loops.lengthen_stream(trainer, checkpoint)
        self._content, self._checkpoint = content, checkpoint
        changes = [
            *find_changes(content["settings"], plain_settings(module.hparams), "model"),
            *find_changes(stored.get("settings", {}), own.get("settings", {}), "data"),
            *find_changes(content["trainer"], trainer_settings(trainer), "trainer"),
            *keep_patience(trainer, checkpoint["callbacks"]),
        ]
        if changes:
            _report(describe_changes(changes))
        if (saved := len(content["generators"])) != trainer.world_size:
            _report(
                f"Processes: {saved} saved the checkpoint, {trainer.world_size} resume it. Keep batch_size times "
                "processes times trainer.accumulate_grad_batches, and each step has the same rows. But dropout and "
                "rounding differ: the adapter will be as good, and not the same bit for bit."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._optimizers = describe_optimizers(trainer)
        if self._content is not None:  # Lightning restores the optimizers after this hook
            keep_configured(trainer, self._checkpoint, self._content["optimizers"])
        self._checkpoint = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        module.window.clear()  # a search for a learning rate, or a fit that failed, may have ended inside one
        if self._content is not None:
            # Lightning may end an epoch first, whose validation was before: there early stopping looks at them.
            monitored = self._content["monitored"]
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in monitored.items()})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._put_back(trainer)  # a run that stopped inside a validation begins with it

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        loops.count_epoch(trainer)
        self._put_back(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._content is not None:
            _report(
                f"Nothing is left to train: with the checkpoint's step {trainer.global_step} trainer.max_steps "
                f"({trainer.max_steps}) or trainer.max_epochs ({trainer.max_epochs}) is reached. Raise it to train on."
            )
        self._put_back(trainer)

    def _put_back(self, trainer: Trainer) -> None:
        """Restore this process's generators; last, since building loaders and iterators draws numbers too."""
        if self._content is not None and trainer.global_rank < len(self._content["generators"]):
            restore_generators(self._content["generators"][trainer.global_rank])
        self._content = None


def _report_other_data(
    source: str, stored: Mapping[str, Any], own: Mapping[str, Any], with_samples: bool = False
) -> None:
    differences = data_differences(stored, own)
    shown = [words for name, words in differences.items() if with_samples or name not in ("train", "val")]
    if shown:
        _report(f"Other than in {source}: {', '.join(shown)}.")


def report_start_adapter(trainer: Any, module: Any) -> None:
    """Report a tokenizer or template other than those that the adapter of ``model.adapter`` was trained with."""
    if module.adapter is not None and not module.overrides("build_model"):
        folder = find_adapter_folder(module.adapter)
        trained_on = read_identity(folder).get("data", {})
        _report_other_data(f"the adapter folder {folder}", trained_on, identity_of_data(trainer))
