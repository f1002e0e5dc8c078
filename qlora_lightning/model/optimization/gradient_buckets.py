"""Gradients of several processes, summed in one order from the first step on: a resumed run adds up alike."""

from collections.abc import Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.checkpoint.generators import capture_generators, restore_generators

_FEWEST = 3  # ranks: a sum of two numbers has only one order


class GradientBuckets(Callback):
    """Let DDP settle how it lays gradients into buckets before the first step counts.

    After the first backward DDP lays them out anew, in the order in which they became ready. Where a number lies in a
    bucket decides in which order three or more ranks are added up, and so its last bit: the first step after a resume
    would be rounded otherwise than the same step of a run that was never stopped. So the first batch after a start is
    run twice before it counts. The module brings this along by ``configure_callbacks``.
    """

    def __init__(self) -> None:
        self._settled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settled = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        ddp = trainer.strategy.model
        if self._settled or not isinstance(ddp, DistributedDataParallel) or trainer.world_size < _FEWEST:
            return
        self._settled = True
        module: Any = pl_module
        generators, trainable = capture_generators(), trainable_tensors(module)
        gradients = {name: parameter.grad for name, parameter in trainable.items()}  # of a window that is gone on with
        _set_gradients(trainable, dict.fromkeys(trainable))
        module.forward = lambda batch: module.compute_loss(batch).nll_sum
        try:
            # The second forward takes the layout that the first backward has found.
            for _ in range(2):
                with trainer.precision_plugin.train_step_context():
                    ddp(batch).backward()
        finally:
            del module.forward
            _set_gradients(trainable, gradients)
            restore_generators(generators)


def _set_gradients(trainable: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor | None]) -> None:
    for name, parameter in trainable.items():
        parameter.grad = gradients[name]
