"""Memory and speed of a training.

One number is reported of memory: the peak, in GiB. On CUDA that is the most that torch allocated, elsewhere the most of
the whole process that was resident (peak RSS), imports and the mapped base included.
"""

import logging
import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from qlora_lightning.model.load.machine import device_memory_gib, peak_metric_name, read_memory, read_peak_gib
from qlora_lightning.support.console import say

_log = logging.getLogger(__name__)
_FULL = 0.95  # of the device's memory


class GPUMemoryMonitor(Callback):
    """Log memory in GiB per logging interval, and report the peak after loading and after the first step.

    On CUDA it logs ``memory_allocated_gib``, ``memory_reserved_gib`` and ``memory_peak_gib`` (the most allocated since
    the last logging; the peak is reset then). Elsewhere ``private_memory_gib`` (memory of this process alone, without
    a base mapped from a file) and ``peak_rss_gib`` (the most that was resident since the process began).

    On a CPU it warns once when the peak passes 95 % of the machine's memory, before which no allocation fails.

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

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        if not self.enabled or trainer.global_step == self._step:
            return  # inside an accumulation window the peak is not reached yet
        if self._first:
            self._first = False
            self._report(trainer, pl_module, "after the first step")
        if trainer.global_step % trainer.log_every_n_steps == 0:
            values, shown = read_memory(pl_module.device), peak_metric_name(pl_module.device)
            for name, gib in values.items():
                pl_module.log(name, torch.tensor(gib), prog_bar=name == shown)
            self._warn_of_full_ram(pl_module, values[shown])
            if pl_module.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(pl_module.device)

    def _warn_of_full_ram(self, pl_module: LightningModule, gib: float) -> None:
        capacity = device_memory_gib(pl_module.device)
        if pl_module.device.type == "cpu" and gib > _FULL * capacity and not self._warned:
            self._warned = True
            words = "Peak memory %.2f GiB is over 95 %% of %.2f GiB. A smaller model.micro_batch_tokens takes less."
            _log.warning(words, gib, capacity)

    def _report(self, trainer: Trainer, pl_module: LightningModule, when: str) -> None:
        if self.enabled and trainer.is_global_zero:
            say(f"Memory {when}: {read_peak_gib(pl_module.device):.2f} GiB at its peak")


class ThroughputMonitor(Callback):
    """Log speed per optimizer step, over all ranks; there is no padding that could be counted.

    Logs ``tokens_per_second``, ``labelled_tokens_per_second`` (tokens that the loss counts) and ``tokens_seen`` (since
    the run began, resumes included). The clock runs during training steps only: validation and saving are left out.

    Args:
        enabled: ``False`` logs nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.tokens_seen = self.labelled_seen = 0
        self._seconds = 0.0  # of the open accumulation window

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.enabled:
            return
        # On a GPU the loss of each step has been waited for, before the optimizer took it.
        self._seconds += time.perf_counter() - self._began
        if trainer.global_step == self._step:
            return  # inside an accumulation window
        module: Any = pl_module
        tokens, labelled = (int(module.window.totals[name]) for name in ("tokens", "labelled_tokens"))
        self.tokens_seen += tokens
        self.labelled_seen += labelled
        # as tensors on the host: Lightning would put numbers on the GPU, and who reads them would wait for it
        pl_module.log("tokens_per_second", torch.tensor(tokens / self._seconds), prog_bar=True)
        pl_module.log("labelled_tokens_per_second", torch.tensor(labelled / self._seconds))
        pl_module.log("tokens_seen", torch.tensor(float(self.tokens_seen)))
        self._seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"tokens_seen": self.tokens_seen, "labelled_seen": self.labelled_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens_seen, self.labelled_seen = state_dict["tokens_seen"], state_dict["labelled_seen"]
