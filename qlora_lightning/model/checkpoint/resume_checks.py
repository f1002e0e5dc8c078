"""Where a run cannot go on exactly from a checkpoint: said before anything is trained."""

from collections.abc import Mapping
from typing import Any

from qlora_lightning.errors import UserError
from qlora_lightning.model.adapters.identity import data_differences


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
            "adapter_checkpoint.every_n_train_steps saves."
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
