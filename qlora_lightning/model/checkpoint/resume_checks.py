"""Where a run cannot go on exactly from a checkpoint: said before anything is trained."""

from collections.abc import Mapping
from typing import Any

from qlora_lightning.errors import UserError
from qlora_lightning.model.adapters.identity import data_differences, identity_of_data
from qlora_lightning.model.checkpoint.format import KEY
from qlora_lightning.model.checkpoint.setting_changes import find_changes, show_change


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
