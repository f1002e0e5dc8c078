"""A callback that measures each batch's ceiling right beside it: machines are not always as quick."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT

from qlora_lightning import QLoRAModule
from qlora_lightning.model.batch import shape_of_batch
from qlora_lightning.model.device import choose_compute_dtype
from tests.benchmarks.ceiling import measure_ceiling, synchronize
from tests.benchmarks.products import forward_products, shape_of, step_products


class Ceilings(Callback):
    """After each batch, time its products alone."""

    def __init__(self, gradient_checkpointing: bool = False, skipped: int = 0) -> None:
        """Prepare.

        Args:
            gradient_checkpointing: whether steps run with it.
            skipped: so many first batches have none.
        """
        self.measured: list[dict[str, Any]] = []
        self.tokens = 0  # of the batches
        self.seconds = 0.0  # that all this took
        self._checkpointing, self._skipped = gradient_checkpointing, skipped

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx >= self._skipped:
            self._measure(pl_module, batch, trains=True)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._measure(pl_module, batch, trains=False)

    def _measure(self, module: LightningModule, batch: Any, trains: bool) -> None:
        if not isinstance(module, QLoRAModule):
            raise TypeError(f"expected a QLoRAModule, found {type(module).__name__}")
        synchronize(module.device)  # what a card has yet to do is the batch's own
        began = time.perf_counter()
        shape, rows = shape_of(module.causal_lm), shape_of_batch(batch)
        products = step_products(shape, rows, self._checkpointing) if trains else forward_products(shape, rows)
        dtype = choose_compute_dtype(module.compute_dtype, module.device)
        self.measured.append(measure_ceiling(products, dtype, module.device))
        self.tokens += rows.tokens
        self.seconds += time.perf_counter() - began


def add_ceilings(ceilings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum up what ``measure_ceiling`` gave."""
    parts: dict[str, dict[str, float]] = {}
    for ceiling in ceilings:
        for name, part in ceiling["parts"].items():
            total = parts.setdefault(name, dict.fromkeys(part, 0))
            for key, value in part.items():
                total[key] += value
    return {key: sum(ceiling[key] for ceiling in ceilings) for key in ("seconds", "flop")} | {"parts": parts}
