"""Memory of a training: measured and logged, warned of when it runs short, and compared with the plan.

One number is reported: the peak, in GiB. On CUDA that is the most that torch allocated, elsewhere the most of the whole
process that was resident (peak RSS), imports and the mapped base included.
"""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from qlora_lightning.base.tensors import format_gib
from qlora_lightning.callbacks.dry_batch import leaves_out, look_ahead
from qlora_lightning.callbacks.gradient_checkpointing import GradientCheckpointing
from qlora_lightning.callbacks.run_report import note_warning
from qlora_lightning.model.load.build import meta_copy
from qlora_lightning.model.load.device import (
    PeakWatch,
    device_memory_gib,
    give_back_freed_memory,
    name_of_peak,
    read_memory,
    read_peak_gib,
    read_resident_bytes,
)
from qlora_lightning.model.memory.plan import Sharding, StepSettings, plan_memory
from qlora_lightning.model.module import QLoRAModule
from qlora_lightning.model.sharded.strategy import ShardedDDPStrategy
from qlora_lightning.model.step.batch import BatchShape, shape_of_batch, shape_of_rows
from qlora_lightning.model.step.layout import filled
from qlora_lightning.support.console import print_detail, say, terminal
from qlora_lightning.support.files import PLAN, write_whole
from qlora_lightning.support.trainer import find_callback, is_trial_run, log_interval

_FULL = 0.95  # of the device's memory
_REMEDIES = (
    "The cheapest remedies: gradient_checkpointing.enabled: true; half the data.batch_size with twice the "
    "trainer.accumulate_grad_batches (the result stays the same); a smaller data.max_length."
)


class GPUMemoryMonitor(Callback):
    """Log memory in GiB per logging interval, and report the peak after loading and after the first step.

    On CUDA it logs ``memory_allocated_gib``, ``memory_reserved_gib`` and ``memory_peak_gib`` (the most allocated since
    the last logging; the peak is reset then). Elsewhere ``private_memory_gib`` (memory of this process alone, without
    a base mapped from a file) and ``peak_rss_gib`` (the most that was resident since the process began).

    It warns once, with the cheapest remedies, when the peak passes 95 % of the device's memory.

    Args:
        enabled: ``False`` logs nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._warned = False
        self._first = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, "after loading")

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not self.enabled or trainer.global_step == self._step:
            return  # inside an accumulation window the peak is not reached yet
        if self._first:
            self._first = False
            self._report(trainer, pl_module, "after the first step")
        if trainer.global_step % log_interval(trainer) == 0:
            values, shown = read_memory(pl_module.device), name_of_peak(pl_module.device)
            for name, gib in values.items():
                pl_module.log(name, torch.tensor(gib), prog_bar=name == shown)
            capacity = device_memory_gib(pl_module.device)
            if values[shown] > _FULL * capacity and not self._warned:
                self._warned = True
                found = f"Peak memory {values[shown]:.2f} GiB is over 95 % of {capacity:.2f} GiB."
                terminal().print(f"[yellow]{found}[/yellow] {_REMEDIES}")
                note_warning(trainer, found)
            if pl_module.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(pl_module.device)

    def _report(self, trainer: Trainer, pl_module: LightningModule, when: str) -> None:
        if self.enabled and trainer.is_global_zero:
            print_detail(f"Memory {when}: {read_peak_gib(pl_module.device):.2f} GiB at its peak")


class MemoryComparison(Callback):
    """Write ``plan.json`` into the run folder at the end of a fit, and report how well memory was planned.

    Predicted is what ``qlora-lightning plan`` predicts for the config: for the largest micro-batch of the epochs to
    come, or a larger one if it came. Measured is the most from the first step to the last: on a CPU what is resident of
    the process, on CUDA what torch allocates.

    It comes before :class:`DryBatch` among the callbacks, whose batch is one of those that are measured. A module with
    a ``build_model`` of its own is left alone.
    """

    def __init__(self) -> None:
        self._process = 0
        self._largest: BatchShape | None = None
        self._leaves_out = False
        self._watch: PeakWatch | None = None
        self._measured = 0
        self._lengths: set[int] = set()
        self._ids: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        give_back_freed_memory()  # what unpacking a base and reading the data have left
        self._process = read_resident_bytes()  # imports and data; the model comes next

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_trial_run(trainer) or not isinstance(pl_module, QLoRAModule) or pl_module.overrides("build_model"):
            return
        self._leaves_out = leaves_out(pl_module)
        ahead = look_ahead(trainer, pl_module)
        if ahead is not None:
            plan, _, largest = ahead
            self._ids = plan.samples.ids
            self._largest = self._computed(shape_of_rows(plan.samples, largest.rows))
        self._watch = PeakWatch(pl_module.device)
        self._watch.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._watch is None:
            return
        module: Any = pl_module
        tokens = module.layout_of(batch).input_ids.shape[1]  # made on the host; a GPU's numbers would be waited for
        self._lengths.add(tokens)
        if self._largest is None or tokens > filled(self._largest.computed):
            self._largest = self._computed(shape_of_batch(batch))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._watch is not None:
            self._watch.look()  # before GPUMemoryMonitor resets what CUDA remembers

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measured = self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._largest is None or not self._measured or not trainer.is_global_zero:
            return
        module: Any = pl_module
        checkpointing = find_callback(trainer, GradientCheckpointing)
        dtype: torch.dtype = getattr(torch, module.identity["compute_dtype"])
        strategy: Any = trainer.strategy
        device: torch.device = strategy.root_device  # the Trainer has moved the module to the CPU by now
        is_sharded = isinstance(strategy, ShardedDDPStrategy)
        settings = StepSettings(
            device=device.type,
            dtype=dtype,
            quantization=module.quantization,
            double_quant=module.identity["double_quant"],
            optimizer=module.optimizer_choice,
            process=self._process if device.type == "cpu" else 0,  # on CUDA only torch's memory is measured
            autocasts=module.autocast_dtype is not None,
            every_n_layers=checkpointing.every_n_layers if checkpointing and checkpointing.enabled else 0,
            offload=bool(checkpointing and checkpointing.offload),
            batch_lengths=max(1, len(self._lengths)),
            ids=self._ids if module.cache else None,
            sharding=Sharding(trainer.world_size, strategy.offload) if is_sharded else None,
            processes=trainer.world_size,
        )
        hollow = meta_copy(module.model, dtype, module.quantization, module.fast)
        plan = plan_memory(hollow, self._largest, settings)
        found = {
            "predicted": {"parts": plan.parts, "peak_bytes": plan.peak_bytes},
            "measured": {"peak_bytes": self._measured, "device": device.type},
            "largest_batch": self._largest.figures(),
        }
        write_whole(Path(trainer.default_root_dir) / PLAN, found)
        say(
            f"Memory: planned {format_gib(plan.peak_bytes)}, measured {format_gib(self._measured)} at its peak "
            f"({self._measured / plan.peak_bytes - 1:+.1%})"
        )

    def _computed(self, shape: BatchShape) -> BatchShape:
        return shape if self._leaves_out else shape.whole()

    def _stop(self) -> int:
        watch, self._watch = self._watch, None
        return 0 if watch is None else watch.stop()
