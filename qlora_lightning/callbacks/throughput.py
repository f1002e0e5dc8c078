"""How fast it trains: tokens per second, all of them and the labelled ones."""

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer


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
        """Return the tokens seen so far."""
        return {"tokens_seen": self.tokens_seen, "labelled_seen": self.labelled_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self.tokens_seen, self.labelled_seen = state_dict["tokens_seen"], state_dict["labelled_seen"]
