"""The losses of a validation or a test: begun, and logged at its end."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from qlora_lightning.model.step.loss import TokenStatistics, reject_uncounted
from qlora_lightning.support.trainer import gather_lists, say_once


class ValidationLosses(Callback):
    """Log the means of all ranks; of a subclass's own ``validation_step``, which logs what it likes, none.

    The module adds it in ``configure_callbacks``; its ``validation_step`` adds up the sums.
    """

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        module.statistics = TokenStatistics()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _log_losses(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _log_losses(trainer, pl_module, "test")


def _log_losses(trainer: Trainer, module: Any, split: str) -> None:
    statistics: TokenStatistics = module.statistics
    if faults := gather_lists(trainer, [statistics.fault] if statistics.fault else []):  # a row did not fit into memory
        statistics.fault = faults[0]
        say_once(f"The validation at step {trainer.global_step} has no loss. {faults[0]}")
        module.log(f"{split}_loss", torch.tensor(torch.nan), prog_bar=True, sync_dist=True)
    elif statistics.sums:
        # They are over all ranks already: sync_dist changes nothing, but Lightning asks for it.
        means = statistics.compute(over_ranks=trainer.world_size > 1)
        if not statistics.counted:
            reject_uncounted(f"The {split} rows")
        module.log_means(split, means, sync_dist=True)
