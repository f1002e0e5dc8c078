"""Runs along with a fit and records where its steps' time and memory go."""

import contextlib
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile, record_function

from qlora_lightning.commands.profile.attribution import STEP, Attribution
from qlora_lightning.commands.profile.kept import KeptTensors
from qlora_lightning.commands.profile.memory import Memory, PeakWatch, count_bytes, read_base, tensors_of_optimizer
from qlora_lightning.commands.profile.parts import Widths, read_widths
from qlora_lightning.commands.profile.scopes import Scopes, marking_parts
from qlora_lightning.model.adapters.lora import trainable_tensors

BEFORE = 2  # optimizer steps: one to warm up, one whose memory is measured, which costs time


class StepRecorder(Callback):
    """Measure the memory of the second optimizer step, and profile those after it.

    A profiled step begins where the one before it ends, so that waiting for its batches is in it.

    Args:
        steps: How many to profile.

    Attributes:
        scopes: The ranges that are open.
        recorded: How many steps were profiled.
        tokens: Of these steps.
        memory: Of the second step.
        time: Of the profiled steps.
        device: What trained, in words.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.scopes = Scopes()
        self.recorded, self.tokens = 0, 0
        self.memory = Memory()
        self.time = Attribution(Widths(frozenset(), 0, 0))
        self.device = ""
        self._undo = contextlib.ExitStack()
        self._step = contextlib.ExitStack()  # the profiler of a step, and the range around it
        self._profiler: Any = None
        self._kept: KeptTensors | None = None
        self._peak: PeakWatch | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        head = module.causal_lm.get_output_embeddings()
        widths = read_widths(module.model, module.causal_lm.config.hidden_size, head.weight.shape[0])
        self._bytes_per_row = widths.vocabulary * head.weight.element_size()
        self.time = Attribution(widths, on_cuda=pl_module.device.type == "cuda")
        self.device = _describe(pl_module.device)
        autocasts = module.autocast_dtype is not None or str(trainer.precision).endswith("-mixed")
        self._undo.enter_context(marking_parts(pl_module, self.scopes, autocasts))
        self.memory.base = read_base(module.model)
        self.memory.adapters = count_bytes(trainable_tensors(module).values())

    # ---- the memory of a step --------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._at = trainer.global_step
        if self._at == BEFORE - 1 and self._peak is None:
            module: Any = pl_module
            self._peak = PeakWatch(pl_module.device)
            self._peak.start()
            self._kept = KeptTensors(module.model, self.scopes, self.time.widths)
            self._kept.start()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        if self._kept is not None:
            self._kept.stop()
            self.memory.kept = self._kept.bytes_by_part(loss)
            self._kept = None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._at == BEFORE - 1:
            self.memory.gradients = count_bytes(each.grad for each in trainable_tensors(pl_module).values())

    # ---- the time of the others ------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._profiler is not None:
            self.tokens += batch["input_ids"].numel()
        if trainer.global_step == self._at:
            return  # inside an accumulation window
        if trainer.global_step == BEFORE and self._peak is not None:
            self.memory.optimizer = sum(count_bytes(tensors_of_optimizer(each)) for each in trainer.optimizers)
            self.memory.peaks = self._peak.stop()
        if self._profiler is not None:
            self._end_step(pl_module)
        if trainer.global_step >= BEFORE and self.recorded < self.steps:
            self._begin_step()

    def _begin_step(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.time.on_cuda else [])]
        self._profiler = self._step.enter_context(profile(activities=activities, record_shapes=True))
        self._step.enter_context(record_function(STEP))

    def _end_step(self, pl_module: LightningModule) -> None:
        if self.time.on_cuda:
            torch.cuda.synchronize(pl_module.device)
        self._step.close()
        self.time.add(self._profiler.events())
        self._profiler = None
        self.recorded += 1
        self.memory.logits = self.time.logit_rows * self._bytes_per_row

    # ---- the end ---------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._kept is not None:
            self._kept.stop()
        if self._peak is not None:
            self._peak.stop()
        self._step.close()
        self._undo.close()


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
