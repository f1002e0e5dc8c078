"""How much memory training takes, on the GPU where there is one, in the process elsewhere."""

from typing import Any

import rich
import torch
from lightning import Callback, LightningModule, Trainer

from qlora_lightning.callbacks.run_warnings import note_warning
from qlora_lightning.model.device import device_memory_gib, read_memory
from qlora_lightning.support.console import describe
from qlora_lightning.support.trainer import log_interval

_REMEDIES = (
    "The cheapest ways down: gradient_checkpointing.enabled: true; half the data.batch_size with twice the "
    "trainer.accumulate_grad_batches (the result stays the same); a smaller data.max_length."
)


class GPUMemoryMonitor(Callback):
    """Log memory in GiB per logging interval, and say it after loading, after the first step and at the end.

    On CUDA it logs ``memory_allocated_gib``, ``memory_reserved_gib`` and ``memory_peak_gib`` (the most allocated since
    the last logging; the peak is reset then). Elsewhere ``private_memory_gib`` (memory of this process alone; a base
    mapped from a file is not in it) and ``peak_rss_gib`` (the most that was resident since the process began).

    It warns once, with the cheapest remedies, when the peak passes 95 % of the device's memory.

    Args:
        enabled: ``False`` logs nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._warned = False
        self._first = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._say(trainer, pl_module, "after loading")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.enabled or trainer.global_step == self._step:
            return  # inside an accumulation window the peak is not reached yet
        if self._first:
            self._first = False
            self._say(trainer, pl_module, "after the first step")
        if trainer.global_step % log_interval(trainer) == 0:
            values = read_memory(pl_module.device)
            warned = self._warn_if_full(pl_module.device, values)
            if warned:
                note_warning(trainer, warned)
            shown = "memory_peak_gib" if "memory_peak_gib" in values else "private_memory_gib"
            for name, gib in values.items():
                pl_module.log(name, torch.tensor(gib), prog_bar=name == shown)
            if pl_module.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._say(trainer, pl_module, "at the end")

    def _say(self, trainer: Trainer, pl_module: LightningModule, when: str) -> None:
        if self.enabled and trainer.is_global_zero:
            values = read_memory(pl_module.device)
            parts = [f"{gib:.2f} GiB {name.removesuffix('_gib').replace('_', ' ')}" for name, gib in values.items()]
            describe(f"Memory {when}: {', '.join(parts)}")

    def _warn_if_full(self, device: torch.device, values: dict[str, float]) -> str | None:
        """Warn, if there is cause to and it was not said before; gives what it said."""
        peak = values.get("memory_peak_gib", values.get("peak_rss_gib", 0.0))
        capacity = device_memory_gib(device)
        if peak > 0.95 * capacity and not self._warned:
            self._warned = True
            found = f"Peak memory {peak:.2f} GiB is over 95 % of {capacity:.2f} GiB."
            rich.print(f"[yellow]{found}[/yellow] {_REMEDIES}")
            return found
        return None
