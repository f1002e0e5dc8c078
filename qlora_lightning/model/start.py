"""What is prepared before a run of any kind, beside the model."""

import warnings
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from qlora_lightning.support.trainer import leave_processes_at_exit

_deterministic: Any = torch.utils.deterministic


class RunStart(Callback):
    """Set what a run needs of libraries, and fill what a subclass has beside its model.

    The module adds it in ``configure_callbacks``.
    """

    def __init__(self) -> None:
        self._fills = _deterministic.fill_uninitialized_memory  # torch's switch, before the run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        leave_processes_at_exit()
        # Lightning warns of this hook beside a data module that has none of its own.
        warnings.filterwarnings("ignore", "You have overridden `transfer_batch_to_device` in `LightningModule`")
        # under trainer.deterministic torch would fill each new tensor with NaN first, and none is read before it is set
        self._fills, _deterministic.fill_uninitialized_memory = _deterministic.fill_uninitialized_memory, False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _deterministic.fill_uninitialized_memory = self._fills

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, str(trainer.state.fn))  # which Lightning leaves out then

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        module.fill_own_tensors()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_fit_start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_fit_start(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_fit_start(trainer, pl_module)
