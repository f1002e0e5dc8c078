"""Batches in the order of an epoch, from which a run can stop and go on."""

from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler, SequentialSampler

from qlora_lightning.data.batches import Batch, collate
from qlora_lightning.data.order import RankBatch, count_batches, epoch_order, rank_batches
from qlora_lightning.data.samples import Sample, mute
from qlora_lightning.errors import UserError


class ShuffledOrder(Sampler[int]):
    """Rows in an order that is a pure function of (seed, epoch); Lightning sets the epoch."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.n, self.seed, self.epoch))


class FileOrder(SequentialSampler):
    """Rows in file order, in every epoch; Lightning knows a sequential sampler as one that does not shuffle."""

    def __init__(self, n: int) -> None:
        super().__init__(range(n))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Remember the epoch, to which a saved position belongs."""
        self.epoch = epoch


class FlatLoader:
    """One rank's batches of a split, with a position that Lightning saves and restores.

    torch's ``DataLoader`` has no position to save. Here the state counts batches handed out, which under Lightning
    (it fetches nothing ahead from a sized loader) are batches consumed. There are no worker processes: laying ready
    tokens end to end takes less time than sending them.

    Args:
        samples: all samples of the split, the same on every rank.
        batch_size: rows per micro-batch on each rank.
        seed: of the order.
        shuffle: a new order each epoch; else file order.
        rank: of this process.
        world_size: number of processes that share the rows.

    Raises:
        UserError: if ``batch_size`` is less than 1.
    """

    batch_sampler = None  # Lightning reads it wherever there is a `sampler`

    def __init__(
        self,
        samples: Sequence[Sample],
        batch_size: int,
        seed: int = 0,
        shuffle: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size: expected at least 1, found {batch_size}.")
        self.samples = samples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.sampler = ShuffledOrder(len(samples), seed) if shuffle else FileOrder(len(samples))
        self._tokens = sum(len(sample.ids) for sample in samples)
        self._epoch = 0
        self._position = 0
        self._restored = False

    def __len__(self) -> int:
        return count_batches(len(self.samples), self.batch_size, self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing below runs before the first batch is asked for, when Lightning has set the epoch.
        epoch = self.sampler.epoch
        goes_on = self._restored and self._epoch == epoch and self._position < len(self)
        start = self._position if goes_on else 0
        self._epoch, self._position, self._restored = epoch, start, False
        batches = rank_batches(list(self.sampler), self.batch_size, self.rank, self.world_size)
        for position in range(start, len(batches)):
            self._position = position + 1
            yield self._collate(batches[position])

    def _collate(self, batch: RankBatch) -> Batch:
        samples = [self.samples[row] for row in batch.rows]
        return collate([mute(sample) for sample in samples] if batch.filler else samples)

    def state_dict(self) -> dict[str, int]:
        """Return epoch, batches consumed in it, and what they were cut from, as plain numbers."""
        return {
            "epoch": self.sampler.epoch,
            "position": self._position if self._epoch == self.sampler.epoch else 0,
            "rows": len(self.samples),
            "tokens": self._tokens,
            "rows_per_batch": self.batch_size * self.world_size,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on behind the batches that were consumed, if the next iteration is of the same epoch.

        Raises:
            UserError: if the position lies inside an epoch of other data, or of batches of another size.
        """
        mine, saved = self.state_dict(), state_dict
        inside = 0 < saved["position"] < count_batches(saved["rows"], saved["rows_per_batch"], 1)
        for key in ("rows", "tokens", "rows_per_batch"):
            if inside and mine[key] != saved[key]:
                raise UserError(
                    f"the checkpoint was saved after batch {saved['position']} of an epoch with {key} = {saved[key]} "
                    f"(batches over all processes), but now {key} = {mine[key]}: to go on inside that epoch keep the "
                    "training data, max_length and batch_size times processes as they were."
                )
        self._epoch, self._position, self._restored = saved["epoch"], saved["position"], True
        self.sampler.set_epoch(saved["epoch"])
