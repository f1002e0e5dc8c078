"""Resumes exactly where a run stopped: what a checkpoint holds beside tensors, and when it is put back."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from qlora_lightning.base.adapter_folder import find_adapter_folder, read_identity
from qlora_lightning.model.adapters.identity import data_differences, identity_of_data
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.checkpoint.format import KEY, plain_settings, read_content
from qlora_lightning.model.checkpoint.loops import (
    count_epoch,
    is_inside_batch,
    is_inside_epoch,
    leave_validation_out,
    lengthen_stream,
    let_validation_follow,
)
from qlora_lightning.model.checkpoint.ranks import (
    capture_generators,
    gather_states,
    restore_generators,
    share_states,
)
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


def check_save_point(content: Mapping[str, Any], accumulate: int) -> None:
    """Refuse to resume from inside a batch, or from a window whose gradients are divided by another ``accumulate``."""
    if content["inside_batch"]:
        raise UserError(
            "The checkpoint was saved inside a batch or at the start of an epoch (by a callback of yours, or when an "
            "error came): a run cannot resume exactly there. Take one that was saved at the end of a batch, such as "
            "`--ckpt_path last`."
        )
    before = content["trainer"]["accumulate_grad_batches"]
    if content["window"] and before != accumulate:
        raise UserError(
            f"trainer.accumulate_grad_batches was {before} and is {accumulate}, but the checkpoint was saved inside an "
            f"optimizer step, after {content['window']['micro_batches']} of its {before} micro-batches. Set it to "
            f"{before} to resume from here; it may change only where a step ends, as at the end of an epoch."
        )


def check_data(stored: Mapping[str, Any], own: Mapping[str, Any], inside_epoch: bool, accepted: bool) -> None:
    """Refuse other samples, unless that is ``accepted``; inside an epoch other training samples in any case.

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
    """Save and restore what Lightning does not: random generators, the gradients of an open window, and an identity.

    The module brings it along by ``configure_callbacks``, a new one for each fit. A subclass that overrides
    ``on_save_checkpoint`` without calling ``super()`` so breaks nothing.
    """

    def __init__(self) -> None:
        self._optimizers: list[dict[str, Any]] = []  # as they are configured
        self._content: dict[str, Any] | None = None  # our part of the checkpoint, until all of it is put back
        self._checkpoint: dict[str, Any] = {}  # that Lightning is restoring

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        module: Any = pl_module
        settings = checkpoint.pop("hyper_parameters", {})
        own = {"generators": capture_generators(), "window": module.window.state_dict(trainable_tensors(module))}
        first, *others = gather_states(own, trainer.global_rank, trainer.world_size)
        checkpoint[KEY] = {
            "format_version": FORMAT_VERSION,
            "settings": plain_settings(settings),
            "trainer": trainer_settings(trainer),
            "optimizers": self._optimizers,
            "identity": {**module.identity, "data": identity_of_data(trainer)},
            "inside_batch": is_inside_batch(checkpoint),
            "monitored": {name: float(value) for name, value in trainer.callback_metrics.items()},
            **first,
            "other_ranks": others,
        }
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            let_validation_follow(trainer, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        module: Any = pl_module
        data = getattr(trainer, "datamodule", None)
        content = read_content(checkpoint, "The checkpoint")
        stored, own = content["identity"].get("data", {}), identity_of_data(trainer)
        if trainer.state.fn != "fit":
            _report_other_data("the checkpoint", stored, own)
            return
        is_stream = bool(getattr(data, "streaming", False))
        accepted = bool(getattr(data, "accept_changed_data", False))
        check_data(stored, own, is_inside_epoch(checkpoint) or is_stream, accepted)
        check_save_point(content, trainer.accumulate_grad_batches)
        leave_validation_out(trainer, checkpoint)
        if is_stream:
            lengthen_stream(trainer, checkpoint)
        self._content, self._checkpoint = content, checkpoint
        _report_other_data("the checkpoint", stored, own, with_samples=True)
        changes = [
            *find_changes(content["settings"], plain_settings(module.hparams), "model", module),
            *find_changes(stored.get("settings", {}), own.get("settings", {}), "data", data),
            *find_changes(content["trainer"], trainer_settings(trainer), "trainer"),
            *keep_patience(trainer, checkpoint["callbacks"]),
        ]
        if changes:
            _report(describe_changes(changes))
        saved = 1 + len(content["other_ranks"])
        if saved != trainer.world_size:
            _report(
                f"Processes: {saved} saved the checkpoint, {trainer.world_size} resume it. Keep batch_size times "
                "processes times trainer.accumulate_grad_batches, and each step has the same rows. But dropout and "
                "rounding differ: the adapter will be as good, and not the same bit for bit."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._optimizers = describe_optimizers(trainer)
        if self._content is not None:  # Lightning restores the optimizers after this hook
            for line in keep_configured(trainer, self._checkpoint, self._content["optimizers"]):
                _report(line)
        self._checkpoint = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._content is not None:
            # Lightning may end an epoch first, whose validation was before: there early stopping looks at them.
            monitored = self._content["monitored"]
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in monitored.items()})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._put_back(trainer, pl_module)  # a run that stopped inside a validation begins with it

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        count_epoch(trainer)
        self._put_back(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._content is not None:
            _report(
                f"Nothing is left to train: with the checkpoint's step {trainer.global_step} trainer.max_steps "
                f"({trainer.max_steps}) or trainer.max_epochs ({trainer.max_epochs}) is reached. Raise it to train on. "
                "A validation that had not ended is made up for by `qlora-lightning validate --config "
                f"{trainer.default_root_dir}/config.yaml --ckpt_path last`."
            )
        self._put_back(trainer, pl_module)

    def _put_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._content is None:
            return
        module: Any = pl_module
        first = {name: self._content[name] for name in ("generators", "window")}
        own = share_states([first, *self._content["other_ranks"]], trainer.global_rank, trainer.world_size)
        module.window.load_state_dict(own["window"], trainable_tensors(module))
        if own["generators"]:  # a rank that there was not has none
            restore_generators(own["generators"])  # last: making loaders and iterators draws numbers too
        self._content = None


_report = rank_zero_only(say)


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
