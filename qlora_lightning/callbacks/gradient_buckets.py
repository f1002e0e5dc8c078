"""Gradients of several processes, summed in one order from the first step on: a resumed run adds up alike."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.nn.parallel import DistributedDataParallel

from qlora_lightning.data.batches import collate_rows
from qlora_lightning.model.adapters import trainable_tensors
from qlora_lightning.model.generators import capture_generators, restore_generators


class GradientBuckets(Callback):
    """Let DDP settle how it lays gradients into buckets before the first step counts.

    After the first backward DDP lays them out anew, in the order in which they became ready. Where a number lies in a
    bucket decides in which order three or more ranks are added up, and so its last bit: the first step after a resume
    would be rounded otherwise than the same step of a run that was never stopped.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        ddp, data = trainer.strategy.model, getattr(trainer, "datamodule", None)
        samples = getattr(data, "samples", {}).get("train")
        if not isinstance(ddp, DistributedDataParallel) or not samples:
            return
        filler: Any = collate_rows(samples, [int(samples.lengths.argmin())], filler=True)
        batch = trainer.strategy.batch_to_device(filler, module.device)
        generators = capture_generators()
        module.forward = lambda batch: module.compute_loss(batch).nll_sum
        try:
            # The second forward takes the layout that the first backward has found.
            for _ in range(2):
                with trainer.precision_plugin.train_step_context():
                    ddp(batch).backward()
        finally:
            del module.forward
            for parameter in trainable_tensors(module).values():
                parameter.grad = None
            restore_generators(generators)
