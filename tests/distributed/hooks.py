"""Callbacks that the launched runs name in their configs, by this module's name alone."""

import json
import os
import signal
from pathlib import Path

import torch
from lightning import Callback

from qlora_lightning import LossSums, QLoRAModule
from qlora_lightning.model import self_check
from tests.errors import MachineFailed


class Die(Callback):
    """Kill one rank after its second batch; the other goes on, which leads it into the next exchange."""

    def __init__(self, rank: int):
        self.rank = rank

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            Path(f"pid-{trainer.global_rank}").write_text(str(os.getpid()))
            trainer.strategy.barrier()
            if trainer.global_rank == self.rank:
                os.kill(os.getpid(), signal.SIGKILL)


class Ask(Callback):
    """Send a signal to one rank when the n-th batch of a life begins, those of validations counted; 0 is a crash."""

    def __init__(self, at: int, number: int = int(signal.SIGTERM), rank: int = 0):
        self.left, self.number, self.rank = at, number, rank

    def on_train_batch_start(self, trainer, *_):
        self.left -= 1
        if self.left == -1 and trainer.global_rank == self.rank:
            if not self.number:
                raise MachineFailed
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer, *_):
        if not trainer.sanity_checking:
            self.on_train_batch_start(trainer)


class LogNorm(Callback):
    """Log the norm of the gradients that a callback sees."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = [param.grad for param in pl_module.parameters() if param.grad is not None]
        pl_module.log("seen_norm", torch.nn.utils.get_total_norm(grads))


class NamesByRank(QLoRAModule):
    """An objective that logs under another name in each process."""

    def compute_loss(self, batch):
        sums = super().compute_loss(batch)
        return LossSums(sums.loss_sum, sums.count, {f"metric_{self.global_rank}": sums.loss_sum})


class LoseMachine(Callback):
    """Kill this process and its launcher at the batch that the environment names."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if str(batch_idx) == os.environ.get("LOST_AT_BATCH"):
            for process in (os.getppid(), os.getpid()):
                os.kill(process, signal.SIGKILL)


class Weigh(Callback):
    """Write how many bytes of the decoder layers, and of embedding and head, this process holds when training ends."""

    def on_train_end(self, trainer, pl_module):
        held = {"layers": 0, "others": 0}
        for name, tensor in pl_module.causal_lm.named_parameters():
            if not tensor.requires_grad:
                part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                held["layers" if ".layers." in name else "others"] += part.nbytes
        folder = Path(trainer.default_root_dir)
        (folder / f"held-{trainer.global_rank}.json").write_text(json.dumps(held))


class DieOnce(Callback):
    """Kill the last rank after its third batch, in the first attempt at a run."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2 and trainer.global_rank == trainer.world_size - 1 and not Path("died").exists():
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)


class FaultyCard(QLoRAModule):
    """The devices of both processes are checked as two kinds of cards, and that of the second has a fault."""

    def configure_model(self):
        fault = self_check.Comparison("layer", "output", 1.0, 0.06)
        self_check.CHECKED_DEVICES = ("cpu",)
        self_check.name_device = lambda device: f"card {self.global_rank}"
        self_check.compare_paths = lambda *_: [fault] * self.global_rank
        super().configure_model()

    def on_train_end(self):
        print(f"process {self.global_rank} runs fused: {self.fast}", flush=True)
