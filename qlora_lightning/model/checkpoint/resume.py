"""Goes on exactly where a run stopped: what a checkpoint holds beside tensors, and when it is put back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from qlora_lightning.console import say
from qlora_lightning.format_version import FORMAT_VERSION
from qlora_lightning.model.adapters.identity import check_identity, data_differences, identity_of_data
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.checkpoint.format import KEY, known_settings, plain_settings, read_content
from qlora_lightning.model.checkpoint.generators import capture_generators, restore_generators
from qlora_lightning.model.checkpoint.rank_states import describe_other_number, gather_states, share_states
from qlora_lightning.model.checkpoint.resume_checks import (
    check_data,
    check_save_point,
    check_window,
    describe_nothing_left,
    has_other_validation,
    is_inside_epoch,
    leaves_validation_out,
)
from qlora_lightning.model.checkpoint.save_points import (
    count_epoch,
    is_inside_batch,
    leave_validation_out,
    lengthen_stream,
    let_validation_follow,
)
from qlora_lightning.model.checkpoint.setting_changes import (
    Change,
    FreshOptimizers,
    describe_changes,
    find_changes,
    forget_scores,
    keep_patience,
    trainer_settings,
)
from qlora_lightning.trainer import callbacks_of

_VALIDATION_LEFT_OUT = (
    "The validation after the last step had not ended, and is not run. `qlora-lightning validate --ckpt_path last` "
    "judges the adapter."
)


class ExactResume(Callback):
    """Save and restore what Lightning does not: random generators, the gradients of an open window, and an identity.

    The module brings it along by ``configure_callbacks``. It is a callback, not hooks of the module, so that a
    subclass that overrides ``on_save_checkpoint`` without calling ``super()`` breaks nothing.
    """

    def __init__(self) -> None:
        self._content: dict[str, Any] | None = None
        self._optimizer_states: list[dict[str, Any]] = []  # those that Lightning is about to restore
        self._configured: FreshOptimizers | None = None
        self._forgets_scores = False  # those that early stopping knows are of other validation samples

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forgets_scores = False
        self._content = None  # Lightning's learning-rate finder loads a checkpoint, and ends before a batch

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        module: Any = pl_module
        module.check_base()
        settings = checkpoint.pop("hyper_parameters", {})
        own = {"generators": capture_generators(), "window": module.window.state_dict(trainable_tensors(module))}
        states = gather_states(own, trainer.global_rank, trainer.world_size) or [own]  # the first process writes
        checkpoint[KEY] = {
            "format_version": FORMAT_VERSION,
            "settings": plain_settings(settings),
            "trainer": trainer_settings(trainer),
            "optimizers": self._configured.state_dict() if self._configured else [],
            "identity": {**module.identity, "data": identity_of_data(trainer)},
            "inside_batch": is_inside_batch(checkpoint),
            "monitored": _monitored(trainer),
            **states[0],
            "other_ranks": states[1:],
        }
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            let_validation_follow(trainer, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        module: Any = pl_module
        content = read_content(checkpoint, "The checkpoint")
        check_identity(content["identity"], module.identity, "The checkpoint")
        stored, own = content["identity"].get("data", {}), identity_of_data(trainer)
        resumes = trainer.state.fn == "fit"
        if resumes:
            data = getattr(trainer, "datamodule", None)
            accepted = bool(getattr(data, "accept_changed_data", False))
            is_stream = bool(getattr(data, "streaming", False))
            check_data(stored, own, is_inside_epoch(checkpoint) or is_stream, accepted)
            self._forgets_scores = has_other_validation(checkpoint, trainer)
        if trainer.is_global_zero:
            _tell(_words_on_data(stored, own, with_rows=resumes))
        if resumes:
            check_save_point(content)
            check_window(content, trainer.accumulate_grad_batches)
            leave_validation_out(trainer, checkpoint)
            if is_stream:
                lengthen_stream(trainer, checkpoint)
            self._content, self._optimizer_states = content, checkpoint.get("optimizer_states", [])
            patience = keep_patience(trainer, checkpoint.get("callbacks", {}))
            if trainer.is_global_zero:
                _tell(_words_on_settings(content, trainer, module, patience))
                max_epochs = None if is_stream else trainer.max_epochs  # a stream is as long as max_steps has it
                nothing_left = describe_nothing_left(checkpoint, max_epochs, trainer.max_steps)
                _tell([nothing_left] if nothing_left else [])
                _tell([_VALIDATION_LEFT_OUT] if leaves_validation_out(checkpoint, trainer.max_steps) else [])
                saved = len(_states_of_ranks(content))
                _tell([describe_other_number(saved, trainer.world_size)] if saved != trainer.world_size else [])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._configured = FreshOptimizers(trainer)
        if self._content is not None:  # Lightning restores the optimizers after this hook
            stored = self._content.get("optimizers", [])
            words = self._configured.replace_foreign_states(trainer, self._optimizer_states, stored)
            self._configured.check_groups(trainer, self._optimizer_states)
            _tell(words if trainer.is_global_zero else [])
        self._optimizer_states = []
        _compare_with_adapter_folder(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._content is not None and self._configured is not None:
            self._configured.put_back(trainer, self._content.get("optimizers", []))
            # Lightning may end an epoch first, whose validation was before: there early stopping looks at them.
            monitored = self._content.get("monitored", {})
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in monitored.items()})

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _compare_with_adapter_folder(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _compare_with_adapter_folder(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            _compare_with_adapter_folder(trainer, pl_module)
        elif not trainer.sanity_checking:
            self._put_back(trainer, pl_module)  # a run that stopped inside a validation begins with it
            if self._forgets_scores:
                forget_scores(trainer)
                self._forgets_scores = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        module: Any = pl_module
        module.check_base(wait=False)
        count_epoch(trainer)
        self._put_back(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_back(trainer, pl_module)  # where nothing was left to train

    def _put_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._content is None:
            return
        module: Any = pl_module
        own = share_states(_states_of_ranks(self._content), trainer.global_rank, trainer.world_size)
        module.window.load_state_dict(own["window"], trainable_tensors(module))
        if own["generators"]:  # a rank that there was not has none
            restore_generators(own["generators"])  # last: making loaders and iterators draws numbers too
        self._content = None


def _monitored(trainer: Trainer) -> dict[str, float]:
    """Give the metrics that callbacks look at, early stopping for one, as far as they are known."""
    names = {getattr(callback, "monitor", None) for callback in callbacks_of(trainer)}
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name in names}


def _states_of_ranks(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    own = {"generators": content["generators"], "window": content["window"]}
    return [own, *content.get("other_ranks", [])]


def _words_on_data(stored: Mapping[str, Any], own: Mapping[str, Any], with_rows: bool) -> list[str]:
    differences = data_differences(stored, own)
    shown = [words for name, words in differences.items() if with_rows or name not in ("train", "val")]
    return [f"Other than in the checkpoint: {', '.join(shown)}."] if shown else []


def _words_on_settings(
    content: Mapping[str, Any], trainer: Trainer, module: Any, further: Sequence[Change]
) -> list[str]:
    stored, own = content["settings"], plain_settings(getattr(module, "hparams", {}))
    data = content["identity"].get("data", {}).get("settings", {})
    changes = [
        *find_changes(stored, own, "model"),
        *find_changes(data, identity_of_data(trainer).get("settings", {}), "data"),
        *find_changes(content.get("trainer", {}), trainer_settings(trainer), "trainer"),
        *further,
    ]
    unknown = sorted(stored.keys() - own.keys() - known_settings(type(module)))
    words = [f"Settings of the checkpoint that this version does not know, ignored: {', '.join(unknown)}."]
    return (words if unknown else []) + ([describe_changes(changes)] if changes else [])


def _compare_with_adapter_folder(trainer: Trainer, module: Any) -> None:
    """Say where tokenizer or template are not those that the adapter of ``model.adapter`` was trained with."""
    start = module.identity.get("trained_from")
    if start and trainer.is_global_zero:
        found = data_differences(start.get("data", {}), identity_of_data(trainer))
        words = [words for name, words in found.items() if name not in ("train", "val")]
        _tell([f"Other than in the adapter folder {start['adapter']}: {', '.join(words)}."] if words else [])


def _tell(lines: list[str]) -> None:
    for line in lines:
        say(line)
