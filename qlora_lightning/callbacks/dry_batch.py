"""Runs the largest batch to come once before the first step, so that memory runs out at the start or not at all."""

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from qlora_lightning.data.batches.collate import Batch, collate_rows
from qlora_lightning.data.batches.epoch_plan import EpochPlan, epochs_to_look_at, first_and_largest
from qlora_lightning.data.batches.loader import FlatLoader
from qlora_lightning.data.batches.order import RankBatch
from qlora_lightning.data.batches.stream import StreamLoader
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.checkpoint.resume import capture_generators, restore_generators
from qlora_lightning.model.load.machine import read_peak_gib, reporting_out_of_memory
from qlora_lightning.model.step.batch import computed_counter
from qlora_lightning.support.console import terminal
from qlora_lightning.support.trainer import is_trial_run

_WORTH = 1.2  # times the tokens of the first batch: what is hardly larger is not worth a step's time


class DryBatch(Callback):
    """Run forward and backward of the largest micro-batch of the run before step 1, and forget all of it.

    The largest is that with the most tokens that are computed (the longest row decides between equals) among those
    still to come, in this epoch and, of small data, the nine after it; of a stream, among those of its first rows. It
    runs if it has more than 1.2 times the tokens of the next batch, which runs at once anyway; on a resumed run
    likewise, since the machine or the config may be another one. Nothing is left of it: no gradient, no step, no
    logged value, and every random generator and the loader's place are as before, so that results are bit-equal with
    and without it. ``fast_dev_run`` leaves it out.

    It comes before :class:`GradientCheckpointing` among the callbacks, which counts the layers' runs of the first step.

    Args:
        enabled: ``False`` runs nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled or is_trial_run(trainer) or not hasattr(pl_module, "compute_loss"):
            return
        batch = find_largest(trainer, pl_module)
        if batch is None:
            return
        began = time.perf_counter()
        _run(trainer, pl_module, batch)
        seconds, peak = time.perf_counter() - began, read_peak_gib(pl_module.device)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)  # the next peak logged is that of the first steps
        if trainer.is_global_zero:
            rows, tokens = len(set(batch["row_ids"].tolist())), batch["input_ids"].numel()
            size = f"{rows:,} rows, {tokens:,} tokens, the longest row {batch['longest']:,}"
            terminal().print(f"Dry run of the largest batch ({size}): {seconds:.1f} s, peak {peak:.2f} GiB")


def find_largest(trainer: Trainer, module: Any) -> Batch | None:
    """Return the largest micro-batch to come on this rank; None if it is not worth a run, or not known."""
    ahead = look_ahead(trainer, module)
    if ahead is None:
        return None
    plan, first, largest = ahead
    count = computed_counter(plan.samples, skips_unlabelled(module))
    is_worth = count(largest.rows) > _WORTH * count(first.rows)
    if getattr(module, "sharded_base", None) is not None:  # then a pass is one of all ranks
        is_worth = trainer.strategy.reduce_boolean_decision(is_worth, all=False)
    return collate_rows(plan.samples, *largest) if is_worth else None


def skips_unlabelled(module: Any) -> bool:
    """Whether a module, which may be another than ours, leaves out tokens that its loss does not need."""
    return bool(getattr(module, "skips_unlabelled", False))


def look_ahead(trainer: Trainer, module: Any) -> tuple[EpochPlan, RankBatch, RankBatch] | None:
    """Return the plan of batches to come, the first of them and the largest; None if they are not known.

    Args:
        trainer: Of a fit that is about to take its first step.
        module: That is fitted.
    """
    connected: Any = trainer
    loader = connected.train_dataloader
    if isinstance(loader, FlatLoader):
        place, now = loader.state_dict(), trainer.current_epoch
        plan, epochs = loader.plan, epochs_to_look_at(loader.plan, now, trainer.max_epochs)
        done = place["position"] if place["epoch"] == now else 0
    elif isinstance(loader, StreamLoader):
        plan = EpochPlan(
            connected.datamodule.samples["train"],  # its first rows
            loader.batch_size,
            loader.tokens_per_batch,
            seed=loader.seed,
            world_size=loader.world_size,
        )
        epochs, done = range(1), 0
    else:
        return None
    limit = int(min(trainer.num_training_batches, len(loader)))
    count = computed_counter(plan.samples, skips_unlabelled(module))
    found = first_and_largest(plan, epochs, done, limit, loader.rank, count)
    return None if found is None else (plan, *found)


def _run(trainer: Trainer, pl_module: Any, batch: Any) -> None:
    """Run a batch with the memory that a step takes; no gradient, logged value or random number is left of it."""
    trainable = list(trainable_tensors(pl_module).values())
    optimizer = trainer.optimizers[0] if trainer.optimizers else None
    generators = capture_generators()
    pl_module.log = pl_module.log_dict = lambda *args, **kwargs: None
    try:
        on_device = trainer.strategy.batch_to_device(pl_module.on_before_batch_transfer(batch, 0))
        with (
            reporting_out_of_memory(pl_module, batch),
            torch.enable_grad(),
            trainer.precision_plugin.train_step_context(),
        ):
            averages: list[torch.Tensor] = []  # of Adam, which are there from the first step on
            if isinstance(optimizer, torch.optim.Adam) and not optimizer.state:
                averages = [torch.empty_like(parameter) for parameter in trainable for _ in range(2)]
            loss = pl_module.compute_loss(on_device).nll_sum
            # Not backward(): `.grad`, and what DDP hangs on it, must not notice.
            torch.autograd.grad(loss, trainable, allow_unused=True)
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            del averages
    finally:
        del pl_module.log, pl_module.log_dict
        restore_generators(generators)
