"""Steps on one batch of random tokens: any base, any sizes, for what no file of rows has."""

from qlora_lightning import GradientCheckpointing  # first: it imports quicker

# isort: split

import argparse
import tempfile
from typing import Any

import lightning
import torch
from lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from qlora_lightning.data.batches import Batch, collate
from qlora_lightning.data.samples import make_sample
from tests.benchmarks import settings
from tests.benchmarks.children import print_figures
from tests.benchmarks.meter import Meter
from tests.benchmarks.ours import make_module, make_trainer, step_ceiling
from tests.benchmarks.peak_memory import PeakMemory, read_bytes


class StepMemory(Callback):
    """Watch memory from the first step's begin to the last step's end."""

    def __init__(self) -> None:
        self.before = 0
        self.peak: PeakMemory | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.peak is None:
            self.before, _ = read_bytes(pl_module.device)
            self.peak = PeakMemory(pl_module.device).__enter__()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.peak is not None:
            self.peak.__exit__()


def main() -> None:
    """Train and print the figures of the quickest step, in bytes and seconds."""
    parser = argparse.ArgumentParser(description="Steps on one random batch.")
    parser.add_argument("base")
    parser.add_argument("--tokens", type=int, required=True, help="of the batch")
    parser.add_argument("--row-tokens", type=int, required=True, help="of each row; the last may be shorter")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--ceiling", action="store_true", help="measure the step's products too")
    arguments = parser.parse_args()
    lightning.seed_everything(settings.SEED)
    module, meter, memory = make_module(arguments.base), Meter(), StepMemory()
    with tempfile.TemporaryDirectory() as folder, PeakMemory() as whole:
        callbacks = [GradientCheckpointing(enabled=arguments.gradient_checkpointing), memory, meter]
        trainer = make_trainer(folder, arguments.accelerator, callbacks, max_epochs=1)
        batches: Any = [random_batch(arguments.tokens, arguments.row_tokens)] * arguments.steps
        trainer.fit(module, DataLoader(batches, batch_size=None))
    seconds = min(meter.step_seconds)
    figures: dict[str, Any] = {
        "tokens": arguments.tokens,
        "seconds": seconds,
        "tokens_per_second": arguments.tokens / seconds,
        "start_seconds": meter.start_seconds,
        "step_private_bytes": 0 if memory.peak is None else memory.peak.private - memory.before,
        "private_bytes": whole.private,
        "mapped_bytes": whole.mapped,
        "together_bytes": whole.together,
    }
    if arguments.ceiling:
        batches = meter.batches[:1]
        figures["ceiling"] = step_ceiling(
            module, batches, arguments.accelerator, gradient_checkpointing=arguments.gradient_checkpointing
        )
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
