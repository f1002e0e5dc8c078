"""Steps on one batch of random tokens: any base, any sizes, for what no file of rows has."""

from qlora_lightning import GradientCheckpointing  # first: it imports quicker

# isort: split

import argparse
import tempfile
from typing import Any

import lightning
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.utils.data import DataLoader

from qlora_lightning.data.batches.collate import Batch, collate
from qlora_lightning.data.samples import make_sample
from tests.benchmarks import settings
from tests.benchmarks.ceilings import Ceilings
from tests.benchmarks.children import print_figures
from tests.benchmarks.meter import Meter
from tests.benchmarks.ours import make_module, make_trainer
from tests.benchmarks.peak_memory import PeakMemory


class Memory(Callback):
    """Watch the process, and of it the steps from the first one's begin, until so many steps are done."""

    def __init__(self, steps: int) -> None:
        self.whole, self.step = PeakMemory().__enter__(), PeakMemory()
        self.before = 0
        self._steps = steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.step = PeakMemory(pl_module.device).__enter__()
            self.before = self.step.private

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self._steps - 1:
            self.step.__exit__()
            self.whole.__exit__()


def main() -> None:
    """Train and print the figures, in bytes and seconds: those of the quickest step, or of one beside its ceiling."""
    parser = argparse.ArgumentParser(description="Steps on one random batch.")
    parser.add_argument("base")
    parser.add_argument("--tokens", type=int, required=True, help="of the batch")
    parser.add_argument("--row-tokens", type=int, required=True, help="of each row; the last may be shorter")
    parser.add_argument("--steps", type=int, default=1, help="whose memory is watched")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of products")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--ceilings", type=int, default=0, help="so many more steps, each beside its products alone")
    arguments = parser.parse_args()
    lightning.seed_everything(settings.SEED)
    module, meter, memory = make_module(arguments.base, arguments.dtype), Meter(), Memory(arguments.steps)
    ceilings = Ceilings(arguments.gradient_checkpointing, skipped=arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [GradientCheckpointing(enabled=arguments.gradient_checkpointing), meter, memory, ceilings]
        trainer = make_trainer(folder, arguments.accelerator, callbacks, max_epochs=1)
        batch = random_batch(arguments.tokens, arguments.row_tokens)
        batches: Any = [batch] * (arguments.steps + arguments.ceilings)
        trainer.fit(module, DataLoader(batches, batch_size=None))
    seconds, ceiling = min(meter.step_seconds), None
    if ceilings.measured:
        beside = zip(meter.step_seconds[arguments.steps :], ceilings.measured, strict=True)
        by_share = sorted(beside, key=lambda pair: pair[1]["seconds"] / pair[0])
        seconds, ceiling = by_share[len(by_share) // 2]
    figures: dict[str, Any] = {
        "tokens": arguments.tokens,
        "seconds": seconds,
        "tokens_per_second": arguments.tokens / seconds,
        "start_seconds": meter.start_seconds,
        "step_private_bytes": memory.step.private - memory.before,
        "private_bytes": memory.whole.private,
        "mapped_bytes": memory.whole.mapped,
        "together_bytes": memory.whole.together,
        "all_seconds": meter.step_seconds,
        "ceiling": ceiling,
        "all_ceiling_seconds": [each["seconds"] for each in ceilings.measured],
    }
    print_figures(figures)


def random_batch(tokens: int, row_tokens: int) -> Batch:
    """Make rows of token ids below 1,000, the second half of each labelled."""
    generator = torch.Generator().manual_seed(settings.SEED)
    samples = []
    for row, start in enumerate(range(0, tokens, row_tokens)):
        length = min(row_tokens, tokens - start)
        ids = torch.randint(1000, (length,), generator=generator).tolist()
        labels = [-100] * (length // 2) + ids[length // 2 :]
        samples.append(make_sample(ids, labels, row))
    return collate(samples)


if __name__ == "__main__":
    main()
