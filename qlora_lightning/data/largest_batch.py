"""Which micro-batch of a run is the largest."""

from qlora_lightning.data.epoch_plan import EpochPlan
from qlora_lightning.data.order import RankBatch

_EPOCHS = 10  # whose batches are looked at,
_ROWS = 500_000  # as long as they have no more rows than that: some five seconds


def epochs_to_look_at(plan: EpochPlan, now: int = 0, max_epochs: int | None = None) -> range:
    """Give the epochs whose batches are worth a look: this one and, of small data that is shuffled, the nine after.

    Args:
        plan: Of all epochs.
        now: This epoch.
        max_epochs: Of the run; ``None`` or -1 without end.
    """
    changes = plan.shuffle and plan.tokens_per_batch is None  # packed batches are as full in every epoch
    last = max_epochs if changes and max_epochs is not None else now + 1
    most = min(_EPOCHS, _ROWS // max(1, len(plan.samples)))
    return range(now, max(now + 1, min(last, now + most)))


def first_and_largest(
    plan: EpochPlan, epochs: range, done: int = 0, limit: int | None = None, rank: int = 0
) -> tuple[RankBatch, RankBatch] | None:
    """Give the first micro-batch to come and the largest; ``None`` where none is to come.

    The largest has the most tokens; the longest row decides between equals.

    Args:
        plan: Of all epochs.
        epochs: Those that are looked at.
        done: Micro-batches of the first of them that are done.
        limit: Micro-batches of each epoch; ``None`` for all.
        rank: Whose.
    """
    lengths = plan.samples.lengths
    starts = [done, *[0] * (len(epochs) - 1)]
    parts = zip(epochs, starts, strict=True)
    batches = [batch for epoch, start in parts for batch in plan.batches(epoch, rank)[start:limit]]
    if not batches:
        return None
    costs = [(int(lengths[batch.rows].sum()), int(lengths[batch.rows].max())) for batch in batches]
    return batches[0], batches[costs.index(max(costs))]
