"""Memory and speed of a training, as they are logged."""

import time
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning import Callback, LightningModule, Trainer

from qlora_lightning.sources.tensors import GIB
from qlora_lightning.support.console import say
from qlora_lightning.support.files import MEMORY_PEAKS
from qlora_lightning.support.settings import check_arguments


class GPUMemoryMonitor(Callback):
    """Log memory in GiB per logging interval, and report the peak after loading.

    On CUDA, it logs ``memory_allocated_gib``, ``memory_reserved_gib`` and ``memory_peak_gib`` (the peak since the last
    logging, which resets it). On a CPU, it logs the memory of the process: ``private_memory_gib`` (without a base that
    is mapped from a file) and ``peak_rss_gib`` (the peak since the process began).

    Args:
        enabled: ``False`` logs nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        check_arguments("gpu_memory", GPUMemoryMonitor.__init__, locals())
        self.enabled = enabled

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled and trainer.is_global_zero:
            peaks = [gib for name, gib in read_memory(pl_module.device).items() if name in MEMORY_PEAKS]
            say(f"Memory after loading: {peaks[0]:.2f} GiB at its peak")
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not self.enabled or pl_module.window.batches:
            return  # inside an accumulation window the peak is not reached yet
        if trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            for name, gib in read_memory(pl_module.device).items():
                pl_module.log(name, torch.tensor(gib), prog_bar=name in MEMORY_PEAKS)
            if pl_module.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(pl_module.device)


class ThroughputMonitor(Callback):
    """Log speed per optimizer step, over all ranks.

    Logs ``tokens_per_second``, ``labelled_tokens_per_second`` (tokens that the loss counts) and ``tokens_seen`` (since
    the run began, resumes included). A loss of preferences counts rows, so ``rows_per_second`` is logged instead. The
    clock runs only during training steps, not during validation and saving.

    Args:
        enabled: ``False`` logs nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        check_arguments("throughput", ThroughputMonitor.__init__, locals())
        self.enabled = enabled
        self.tokens_seen = self.labelled_seen = 0
        self._seconds = 0.0  # of the open accumulation window

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if not self.enabled:
            return
        # The GPU has finished the forward and backward: their loss was read before the optimizer step.
        self._seconds += time.perf_counter() - self._began
        if pl_module.window.batches:
            return  # inside an accumulation window
        tokens, labelled = int(pl_module.window.totals["tokens"]), pl_module.window.totals["labelled_tokens"]
        self.tokens_seen += tokens
        self.labelled_seen += labelled
        # as tensors on the host: Lightning would put numbers on the GPU, and each read would wait for it
        pl_module.log("tokens_per_second", torch.tensor(tokens / self._seconds), prog_bar=True)
        counted = "rows" if pl_module.pairs else "labelled_tokens"
        pl_module.log(f"{counted}_per_second", torch.tensor(labelled / self._seconds))
        pl_module.log("tokens_seen", torch.tensor(float(self.tokens_seen)))
        self._seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"tokens_seen": self.tokens_seen, "labelled_seen": self.labelled_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens_seen, self.labelled_seen = state_dict["tokens_seen"], state_dict["labelled_seen"]


def read_memory(device: torch.device) -> dict[str, float]:
    """Read memory in use and its peak, in GiB: of the CUDA device, or of this process."""
    if device.type == "cuda":
        return {
            "memory_allocated_gib": torch.cuda.memory_allocated(device) / GIB,
            "memory_reserved_gib": torch.cuda.memory_reserved(device) / GIB,
            "memory_peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
        }
    private = peak = psutil.Process().memory_info().rss
    status = Path("/proc/self/status")  # of Linux
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if {"RssAnon", "VmHWM"} <= fields.keys():  # some sandboxes lack them
            private, peak = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmHWM"))
    return {"private_memory_gib": private / GIB, "peak_rss_gib": peak / GIB}
