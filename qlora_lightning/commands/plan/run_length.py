"""How long the run of a config is, and its largest micro-batch: from its data where they can be read."""

from dataclasses import dataclass
from typing import Any

from qlora_lightning.commands.epoch import Epoch, plan_epoch, training_plan
from qlora_lightning.data.batches.epoch_plan import epochs_to_look_at, first_and_largest
from qlora_lightning.data.rows.sources import find_sources
from qlora_lightning.model.batch import BatchShape, computed_counter, shape_of_rows
from qlora_lightning.model.layout import filled
from qlora_lightning.model.memory.plan import MOST_LENGTHS
from qlora_lightning.support.errors import UserError


@dataclass(frozen=True)
class RunLength:
    """What a run trains on.

    Attributes:
        batch: The largest micro-batch, or the largest that the settings allow.
        batch_lengths: How many numbers of tokens the micro-batches have, as far as it matters.
        epoch: One epoch, and the steps of the run; ``None`` where the data were not read.
        ids: Token ids of all training rows that were read.
        why_not: Why they were not, in a sentence.
    """

    batch: BatchShape
    epoch: Epoch | None = None
    batch_lengths: int = 1
    ids: Any = None
    why_not: str | None = None

    @property
    def tokens(self) -> int | None:
        """Tokens of all optimizer steps; ``None`` where nobody knows."""
        epoch = self.epoch
        if epoch is None or epoch.all_steps is None:
            return None
        if not epoch.streaming and epoch.epochs is not None and epoch.all_steps == epoch.epochs * epoch.steps:
            return round(epoch.epochs * epoch.batches * epoch.devices * epoch.mean_tokens)
        return round(epoch.all_steps * epoch.accumulate * epoch.devices * epoch.mean_tokens)


def measure_run(data: Any, trainer: dict[str, Any], no_tokenizer: str | None, leaves_out: bool = True) -> RunLength:
    """Read the training data and plan their batches; where that cannot be done, take the largest batch there can be.

    Args:
        data: The data module, not yet set up.
        trainer: The trainer section of the config.
        no_tokenizer: Why the data cannot be rendered here.
        leaves_out: Whether tokens that the loss does not need are left out.
    """
    try:
        _refuse_fetching(data)
        if no_tokenizer is not None:
            raise UserError(no_tokenizer)
        data.setup("fit")
    except UserError as error:
        if "train" not in data.samples:
            return RunLength(largest_allowed(data), why_not=str(error))
    plan = training_plan(data)
    epoch = plan_epoch(plan, trainer, streaming=data.streaming)
    epochs = range(1) if data.streaming else epochs_to_look_at(plan, max_epochs=epoch.epochs)
    count = computed_counter(plan.samples, leaves_out)
    found = first_and_largest(plan, epochs, limit=epoch.batches, count=count)
    if found is None:
        return RunLength(largest_allowed(data), why_not="There are no training rows.")
    batches = [batch for number in epochs for batch in plan.batches(number)[: epoch.batches]]
    batches = batches[: None if epoch.all_steps is None else epoch.all_steps * epoch.accumulate]
    lengths: set[int] = set()
    for batch in batches:
        lengths.add(filled(count(batch.rows)))
        if len(lengths) == MOST_LENGTHS:
            break
    return RunLength(shape_of_rows(plan.samples, found[1].rows), epoch, len(lengths), plan.samples.ids)


def largest_allowed(data: Any) -> BatchShape:
    """Give the largest micro-batch that the settings allow: rows of ``max_length``, every token of them labelled."""
    if data.tokens_per_batch is None:
        lengths = (data.max_length,) * data.batch_size
    else:
        whole, rest = divmod(data.tokens_per_batch, data.max_length)
        lengths = (data.max_length,) * whole + ((rest,) if rest else ())
    return BatchShape(lengths, sum(lengths) - len(lengths))


def _refuse_fetching(data: Any) -> None:
    """Raise what would have to be fetched."""
    for split in ("train", "val"):
        value = data.files[split]
        for source in [] if value is None else find_sources(value, split):
            if source.is_remote:
                raise UserError(f"{source.path} in data.{split} is not on this machine, and plan fetches nothing.")
