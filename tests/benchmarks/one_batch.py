"""Steps on one batch of random tokens: any base, any sizes, for what no file of rows has. On a CPU."""

from tests.benchmarks.ours import Meter, make_module, make_trainer  # first: it imports quicker

# isort: split

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import lightning
import psutil
import torch
from lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from qlora_lightning import GradientCheckpointing
from tests.benchmarks import child

_INTERVAL = 0.02  # seconds; more often, and the threads of a product wait for each other


class MemoryWatch:
    """Read the memory of this process again and again from a thread: the kernel keeps a peak of all of it only.

    Attributes:
        looks: Each time, the bytes that are private, and those of mapped files: the cached base, libraries.
    """

    def __init__(self) -> None:
        self.looks: list[tuple[int, int]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Read the memory now."""
        info = psutil.Process().memory_info()
        mapped = getattr(info, "shared", 0)  # Linux alone tells
        self.looks.append((info.rss - mapped, mapped))

    def stop(self) -> list[tuple[int, int]]:
        """Look for the last time."""
        self._stopped.set()
        self._thread.join()
        self.look()
        return self.looks

    def _watch(self) -> None:
        self.look()
        while not self._stopped.wait(_INTERVAL):
            self.look()


class StepMemory(Callback):
    """Watch the memory of the process until so many steps are done, and note how many looks are before the first."""

    def __init__(self, steps: int) -> None:
        self.watch, self.before, self._steps = MemoryWatch(), 0, steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.before = len(self.watch.looks)
            self.watch.look()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self._steps - 1:
            self.watch.stop()


def measure(base: str, lengths: Sequence[int], dtype: Any, ceilings: int = 0) -> dict[str, Any]:
    """Train with gradient checkpointing: two steps, whose memory is watched, and more, each beside its ceiling.

    Args:
        base: As in ``model.base``.
        lengths: Tokens of each row.
        dtype: Of products.
        ceilings: How many steps are taken beside their ceilings.

    Returns:
        Figures in bytes and seconds: the quicker step, or the middle one by its share of the ceiling.
    """
    steps = 2  # the optimizer has its state from the second on
    lightning.seed_everything(child.SEED)
    meter, memory = Meter(steps, checkpointing=True), StepMemory(steps)
    trainer = make_trainer("cpu", GradientCheckpointing(True), meter, memory, max_epochs=1)
    batches: Any = [make_batch(lengths)] * (steps + ceilings)
    trainer.fit(make_module(base, dtype), DataLoader(batches, batch_size=None))
    tokens, seconds = sum(lengths), min(meter.step_seconds)
    figures: dict[str, Any] = {"all_seconds": meter.step_seconds, "start_seconds": meter.start_seconds}
    if ceilings:
        timed = zip(meter.step_seconds[steps:], meter.ceilings, strict=True)
        by_share = sorted(timed, key=lambda pair: pair[1]["seconds"] / pair[0])
        seconds, ceiling = by_share[len(by_share) // 2]
        beside = {"ceiling_seconds": ceiling["seconds"], "ceiling_flop": ceiling["flop"]}
        figures["steady"] = {"tokens": tokens, "seconds": seconds, **beside}
    looks = memory.watch.looks
    return figures | {
        "tokens": tokens,
        "seconds": seconds,
        "private_bytes": max(private for private, _ in looks),
        "mapped_bytes": max(mapped for _, mapped in looks),
        "together_bytes": max(map(sum, looks)),
        "step_private_bytes": max(private for private, _ in looks[memory.before :]) - looks[memory.before][0],
    }


def make_batch(lengths: Sequence[int]) -> dict[str, Any]:
    """Return rows of token ids below 1,000 as a flat batch; the second half of each is labelled."""
    bounds = [0, *itertools.accumulate(lengths)]
    ids = torch.randint(1000, (1, bounds[-1]), generator=torch.Generator().manual_seed(child.SEED))
    labels = ids.clone()
    for start, length in zip(bounds, lengths, strict=False):
        labels[0, start : start + length // 2] = -100
    return {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": labels,
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        "longest": max(lengths),
        "row_ids": torch.arange(len(lengths)),
        "source": torch.zeros(len(lengths), dtype=torch.int64),
    }


if __name__ == "__main__":
    child.serve(measure)
