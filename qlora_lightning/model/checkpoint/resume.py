"""Goes on exactly where a run stopped: what a checkpoint holds beside tensors, and when it is put back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from qlora_lightning.model.adapters.identity import check_identity, data_differences, identity_of_data
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.checkpoint.format import KEY, known_settings, plain_settings, read_content
from qlora_lightning.model.checkpoint.ranks import (
    capture_generators,
    describe_other_number,
    gather_states,
    restore_generators,
    share_states,
)
from qlora_lightning.model.checkpoint.setting_changes import (
    Change,
    FreshOptimizers,
    describe_changes,
    find_changes,
    forget_scores,
    keep_patience,
    show_change,
    trainer_settings,
)
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import callbacks_of
from qlora_lightning.support.versions import FORMAT_VERSION


def validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a validation is due after this batch."""
    if not trainer.enable_validation:
        return False
    every_epochs = trainer.check_val_every_n_epoch
    if every_epochs is not None and (trainer.current_epoch + 1) % every_epochs:
        return False
    interval = trainer.val_check_batch
    if interval is None or interval == float("inf"):
        return bool(trainer.is_last_batch)
    batches = trainer.fit_loop.total_batch_idx if every_epochs is None else batch_idx
    return (batches + 1) % int(interval) == 0


def ends_training(trainer: Trainer) -> bool:
    """Whether training ends with this batch.

    Lightning ends the epoch before ``on_train_end``, even in its middle: a longer run could not go on exactly from a
    checkpoint that is written there.
    """
    ends_epoch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or ends_epoch or trainer.should_stop


def is_inside_batch(checkpoint: dict[str, Any]) -> bool:
    """Whether a batch had been fetched and not trained on to its end, or an epoch was just about to start."""
    loops = checkpoint["loops"]["fit_loop"]
    epoch, batch = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]["current"]
    return bool(epoch["ready"] > epoch["started"] or batch["ready"] > batch["processed"])


def let_validation_follow(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a resume begin with the validation that was due, or that had begun, when the checkpoint was made.

    Lightning takes a validation up before it trains on where its very first batch is in work, so that is what the
    checkpoint is made to say. From a later batch its counters would go on, while loader and metrics begin anew.

    Args:
        trainer: Who makes the checkpoint.
        checkpoint: As the trainer made it.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches, validation = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
    done = validation["current"]["completed"]
    if trainer.validating:
        ended = validation["is_last_batch"] and done == validation["current"]["ready"]
        if not ended:
            _rewind(validation, before=validation["total"]["completed"] - done)
    elif trainer.training:
        current = batches["current"]
        ends = current["processed"] == current["completed"] + 1  # as long as on_train_batch_end lasts
        if ends and validation_follows(trainer, current["processed"] - 1):
            for counts in (batches["total"], current):
                counts["completed"] += 1
            _rewind(validation, before=validation["total"]["completed"])


def leave_validation_out(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a resume go on behind an epoch whose end was validated, where no validation ends it any more.

    Lightning then takes its first batch for one more of the epoch that is over. As the checkpoint of a run without
    validation is saved, in the epoch's last batch, it counts right.

    Args:
        trainer: Who is about to resume.
        checkpoint: As it was loaded.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches, epoch = loops["epoch_loop.batch_progress"], loops["epoch_progress"]["current"]
    current = batches["current"]
    is_behind_the_last = batches["is_last_batch"] and 0 < current["completed"] == current["ready"]
    if is_behind_the_last and not _validates_end_of_epoch(trainer, epoch["processed"], current["ready"]):
        for counts in (batches["total"], current):
            counts["completed"] -= 1


def lengthen_stream(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a stream, which is one epoch as long as ``max_steps``, go on behind the end that it had.

    Args:
        trainer: Who is about to resume.
        checkpoint: As it was loaded.
    """
    if checkpoint["global_step"] < trainer.max_steps:
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False


def _validates_end_of_epoch(trainer: Trainer, epoch: int, batches: int) -> bool:
    every_epochs, interval = trainer.check_val_every_n_epoch, trainer.val_check_interval
    if not trainer.enable_validation or (every_epochs is not None and (epoch + 1) % every_epochs):
        return False
    every = interval if isinstance(interval, int) else max(1, int(batches * interval))
    return every_epochs is None or batches % every == 0


def count_epoch(trainer: Trainer) -> None:
    """Count the epoch that has begun, where Lightning did not: after a resume at the end of the one before it.

    A checkpoint from inside such an epoch would be read as one from its end: the rest of it would be lost.

    Args:
        trainer: At the start of a batch.
    """
    progress: Any = trainer.fit_loop.epoch_progress
    if progress.current.ready == progress.current.processed:
        progress.increment_ready()
        progress.increment_started()


def _rewind(progress: dict[str, Any], before: int) -> None:
    """Put the first batch in work, behind those of the epoch's earlier validations."""
    for counts, done in ((progress["total"], before), (progress["current"], 0)):
        counts.update(ready=done + 1, started=done + 1, processed=done, completed=done)
    progress["is_last_batch"] = False


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


def check_window(content: Mapping[str, Any], accumulate: int) -> None:
    """Refuse to close an accumulation window with another number of micro-batches than it was opened for.

    Its gradients are divided by the old number already.

    Args:
        content: Our part of the checkpoint.
        accumulate: Micro-batches of an optimizer step now.

    Raises:
        UserError: The number was another, and a window is open.
    """
    before = content.get("trainer", {}).get("accumulate_grad_batches", accumulate)
    done = content["window"].get("micro_batches", 0)
    if done and before != accumulate:
        raise UserError(
            f"trainer.accumulate_grad_batches was {before} and is {accumulate}, but the checkpoint was saved inside an "
            f"optimizer step, after {done} of its {before} micro-batches. Set it to {before} to go on from here; it "
            "may change only where a step ends, as at the end of an epoch or where "
            "adapter_checkpoint.every_n_train_steps or every_minutes saves."
        )


def check_data(stored: Mapping[str, Any], own: Mapping[str, Any], inside_epoch: bool, accepted: bool) -> None:
    """Refuse other samples, unless they are meant; inside an epoch other training samples in any case.

    There some would come twice and others never. Another tokenizer or template that gives the same samples is none of
    that.

    Args:
        stored: The identity of the data that the checkpoint learnt.
        own: That of the data at hand.
        inside_epoch: Whether training stopped inside an epoch, or inside a stream.
        accepted: Whether the user says that the change is meant.

    Raises:
        UserError: The samples are others.
    """
    differences = data_differences(stored, own)
    samples = {name: differences.pop(name) for name in ("train", "val") if name in differences}
    changes = find_changes(stored.get("settings", {}), own.get("settings", {}), "data")
    causes = ", ".join([*differences.values(), *map(show_change, changes)])
    causes = f" These differ too: {causes}." if causes else ""
    known = stored.get("train") and own.get("train")
    cut = [words for name, words in samples.items() if name == "train"] if known else list(differences.values())
    if inside_epoch and cut:
        raise UserError(
            f"The checkpoint was saved inside an epoch with other {', other '.join(cut)}: a run cannot go on exactly "
            f"there.{causes if known else ''} Put data, tokenizer and chat template back as they were, or begin a new "
            "run from the adapter folder with model.adapter. (data.accept_changed_data allows other training samples "
            "only from the end of an epoch.)"
        )
    if samples and not accepted:
        ranking = "starts over, since losses on different samples do not compare" if "val" in samples else "stays"
        raise UserError(
            f"The data are not those of the checkpoint: other {' and other '.join(samples.values())}.{causes} Put them "
            "back as they were, or say that the change is meant, by `--data.accept_changed_data true` (in Python "
            "InstructionDataModule(accept_changed_data=True), or that attribute of your own data module): then the "
            f"run continues with the current data, and the ranking of the best adapter {ranking}."
        )


def has_other_validation(checkpoint: Mapping[str, Any], trainer: Any) -> bool:
    """Whether the checkpoint was judged on other validation samples than those at hand."""
    stored = checkpoint.get(KEY, {}).get("identity", {}).get("data", {})
    return "val" in data_differences(stored, identity_of_data(trainer))


def is_inside_epoch(checkpoint: Mapping[str, Any]) -> bool:
    """Whether some of an epoch's batches, and not all, were trained on."""
    progress = _fit_loop(checkpoint).get("epoch_loop.batch_progress", {})
    return bool(progress.get("current", {}).get("completed")) and not progress.get("is_last_batch", False)


def describe_nothing_left(checkpoint: Mapping[str, Any], max_epochs: int | None, max_steps: int) -> str | None:
    """Describe a resume that has no step left to train; ``None`` if there is one.

    Args:
        checkpoint: As Lightning loaded it.
        max_epochs: The Trainer's; ``None`` or -1 for no limit.
        max_steps: The Trainer's; -1 for no limit.
    """
    step = checkpoint.get("global_step", 0)
    loop = _fit_loop(checkpoint)
    epochs = loop.get("epoch_progress", {}).get("current", {})
    batches = loop.get("epoch_loop.batch_progress", {})
    begun = "ready" if batches.get("is_last_batch") and not is_inside_epoch(checkpoint) else "processed"
    for limit, value, done in (("max_steps", max_steps, step), ("max_epochs", max_epochs, epochs.get(begun, 0))):
        if value is not None and 0 <= value <= done:
            return (
                f"Nothing is left to train: with the checkpoint's step {step} trainer.{limit} ({value}) is reached. "
                "Raise it to train on."
            )
    return None


def leaves_validation_out(checkpoint: Mapping[str, Any], max_steps: int) -> bool:
    """Whether a validation was due that a resume does not run, since all steps are taken: Lightning then does nothing.

    Args:
        checkpoint: As Lightning loaded it.
        max_steps: The Trainer's; -1 for no limit.
    """
    counts = _fit_loop(checkpoint).get("epoch_loop.val_loop.batch_progress", {}).get("current", {})
    due = counts.get("ready", 0) > counts.get("completed", 0)
    return bool(due and 0 < max_steps <= checkpoint.get("global_step", 0))


def _fit_loop(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = checkpoint.get("loops", {}).get("fit_loop", {})
    return found


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
