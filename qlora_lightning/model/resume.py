"""Goes on exactly where a run stopped: what a checkpoint holds beside tensors, and when it is put back."""

from collections.abc import Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer

from qlora_lightning.console import say
from qlora_lightning.errors import UserError
from qlora_lightning.model.adapters import trainable_tensors
from qlora_lightning.model.checkpoint_format import FORMAT_VERSION, KEY, known_settings, plain_settings, read_content
from qlora_lightning.model.generators import capture_generators, restore_generators
from qlora_lightning.model.identity import check_identity, data_differences, identity_of_data
from qlora_lightning.model.rank_states import describe_other_number, gather_states, share_states
from qlora_lightning.model.save_points import is_inside_batch, let_validation_follow
from qlora_lightning.model.setting_changes import FreshOptimizers, describe_changes, find_changes, trainer_settings


class ExactResume(Callback):
    """Save and restore what Lightning does not: random generators, the gradients of an open window, and an identity.

    The module brings it along by ``configure_callbacks``. It is a callback, not hooks of the module, so that a
    subclass that overrides ``on_save_checkpoint`` without calling ``super()`` breaks nothing.
    """

    def __init__(self) -> None:
        self._content: dict[str, Any] | None = None
        self._fresh: FreshOptimizers | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        module: Any = pl_module
        settings = checkpoint.pop("hyper_parameters", {})
        own = {"generators": capture_generators(), "window": module.window.state_dict(trainable_tensors(module))}
        states = gather_states(own, trainer.global_rank, trainer.world_size) or [own]  # the first process writes
        checkpoint[KEY] = {
            "format_version": FORMAT_VERSION,
            "settings": plain_settings(settings),
            "trainer": trainer_settings(trainer),
            "identity": {**module.identity, "data": identity_of_data(trainer)},
            "inside_batch": is_inside_batch(checkpoint),
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
        check_data(stored, own, inside_epoch=resumes and _inside_epoch(checkpoint))
        if trainer.is_global_zero:
            _tell(_words_on_data(stored, own, with_rows=resumes))
        if resumes:
            check_save_point(content)
            self._content = content
            if trainer.is_global_zero:
                _tell(_words_on_settings(content, trainer, module))
                saved = len(_states_of_ranks(content))
                _tell([describe_other_number(saved, trainer.world_size)] if saved != trainer.world_size else [])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._content is not None:
            self._fresh = FreshOptimizers(trainer)
        _compare_with_adapter_folder(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fresh is not None:
            self._fresh.put_back(trainer)
            self._fresh = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _compare_with_adapter_folder(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _compare_with_adapter_folder(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            _compare_with_adapter_folder(trainer, pl_module)
        elif not trainer.sanity_checking:
            self._put_back(trainer, pl_module)  # a run that stopped inside a validation begins with it

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
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


def _states_of_ranks(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    own = {"generators": content["generators"], "window": content["window"]}
    return [own, *content.get("other_ranks", [])]


def check_save_point(content: Mapping[str, Any]) -> None:
    """Refuse to go on from the middle of a batch: it would be lost, or count twice.

    Raises:
        UserError: The checkpoint was saved there.
    """
    if content.get("inside_batch"):
        raise UserError(
            "The checkpoint was saved inside a batch or at the start of an epoch (by a callback of yours, or when an "
            "error came): a run cannot go on exactly there. Take one that was saved at the end of a batch, such as "
            "`--ckpt_path last`."
        )


def check_data(stored: Mapping[str, Any], own: Mapping[str, Any], inside_epoch: bool) -> None:
    """Refuse other training samples inside an epoch, of which some would come twice and others never.

    Another tokenizer or template that gives the same samples is none of that.

    Raises:
        UserError: Training stopped inside an epoch of other samples.
    """
    differences = data_differences(stored, own)
    if stored.get("train") and own.get("train"):
        differences = {"train": differences["train"]} if "train" in differences else {}
    differences.pop("val", None)
    if inside_epoch and differences:
        raise UserError(
            f"The checkpoint was saved inside an epoch with other {', other '.join(differences.values())}: a run "
            "cannot go on exactly there. Put data, tokenizer and chat template back as they were, or begin a new run "
            "from the adapter folder with model.adapter."
        )


def _inside_epoch(checkpoint: Mapping[str, Any]) -> bool:
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    return bool(progress.get("current", {}).get("completed")) and not progress.get("is_last_batch", False)


def _words_on_data(stored: Mapping[str, Any], own: Mapping[str, Any], with_rows: bool) -> list[str]:
    differences = data_differences(stored, own)
    shown = [words for name, words in differences.items() if with_rows or name not in ("train", "val")]
    return [f"Other than in the checkpoint: {', '.join(shown)}."] if shown else []


def _words_on_settings(content: Mapping[str, Any], trainer: Trainer, module: Any) -> list[str]:
    stored, own = content["settings"], plain_settings(getattr(module, "hparams", {}))
    data = content["identity"].get("data", {}).get("settings", {})
    changes = [
        *find_changes(stored, own, "model"),
        *find_changes(data, identity_of_data(trainer).get("settings", {}), "data"),
        *find_changes(content.get("trainer", {}), trainer_settings(trainer), "trainer"),
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
