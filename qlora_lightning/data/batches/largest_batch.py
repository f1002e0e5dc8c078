"""Which micro-batch of a run is the largest."""

from collections.abc import Callable, Sequence

from qlora_lightning.data.batches.epoch_plan import EpochPlan
from qlora_lightning.data.batches.order import RankBatch

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
    plan: EpochPlan,
    epochs: range,
    done: int = 0,
    limit: int | None = None,
    rank: int = 0,
    count: Callable[[Sequence[int]], int] | None = None,
) -> tuple[RankBatch, RankBatch] | None:
    """Give the first micro-batch to come and the largest; ``None`` where none is to come.

    The largest has the most tokens that are computed; the longest row decides between equals.

    Args:
        plan: Of all epochs.
        epochs: Those that are looked at.
        done: Micro-batches of the first of them that are done.
        limit: Micro-batches of each epoch; ``None`` for all.
        rank: Whose.
        count: Counts the tokens that are computed of a batch of rows; ``None``: all of them are.
    """
    lengths = plan.samples.lengths
    starts = [done, *[0] * (len(epochs) - 1)]
    parts = zip(epochs, starts, strict=True)
    batches = [batch for epoch, start in parts for batch in plan.batches(epoch, rank)[start:limit]]
    if not batches:
        return None
    costs = [(int(lengths[batch.rows].sum()), int(lengths[batch.rows].max())) for batch in batches]
    largest, most = 0, (-1, -1)
    for number in sorted(range(len(batches)), key=costs.__getitem__, reverse=True):
        tokens, longest = costs[number]
        if tokens < most[0]:
            break  # no more are computed than there are
        cost = (tokens if count is None else count(batches[number].rows), longest)
        if cost > most:
            largest, most = number, cost
    return batches[0], batches[largest]
