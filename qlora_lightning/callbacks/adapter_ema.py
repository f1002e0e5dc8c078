"""An exponential moving average of the adapter, which is validated with and saved in the adapter's place."""

import contextlib
from collections.abc import Iterator
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from qlora_lightning.model.adapters.lora import copy_tensors, trainable_tensors
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import find_callback

_KEY = "adapter_ema"  # of a checkpoint
_DECAY = 0.999


class AdapterEMA(Callback):
    """Average what trains over the optimizer steps, and nothing of the base.

    Lightning's ``WeightAveraging`` copies the whole model and averages the packed bytes of a 4-bit base.

    After each step ``average = d · average + (1 - d) · adapter``, with ``d`` the smaller one of ``decay`` and
    ``(1 + n) / (10 + n)`` after n steps (as TensorFlow's ``ExponentialMovingAverage`` has it): a short run is not
    held at its start. The average is validated, ranked, and written into ``adapter/`` and as the ``state_dict`` of a
    checkpoint, which holds the trained adapter beside it, to resume from. At the end of a fit the model holds it.

    Args:
        decay: How slowly it follows, from 0 (not behind at all) to below 1; ``None``: 0.999.
        enabled: ``False`` averages nothing; ``None`` neither, unless a decay is given.

    Raises:
        UserError: ``decay`` is out of range.
    """

    def __init__(self, decay: float | None = None, enabled: bool | None = True) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise UserError(f"ema.decay is {decay:g}: expected a number from 0 to below 1, such as 0.999.")
        self.enabled = decay is not None if enabled is None else enabled
        self.decay = _DECAY if decay is None else decay
        self._average: dict[str, Tensor] = {}
        self._trained: dict[str, Tensor] = {}  # waits while the average is in the model
        self._updates = 0
        self._step = 0  # up to which the average has followed

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        stored = checkpoint.get(_KEY, {})
        self._average, self._trained = {}, {}
        if stored and self.enabled:  # the model holds the average now
            self._average = _copies(pl_module)
            self._updates, self._step = stored["updates"], checkpoint["global_step"]
        if stored:
            copy_tensors(pl_module, stored["trained"], "The trained adapter of the checkpoint")
        before, now = stored.get("decay", "off"), self.decay if self.enabled else "off"
        # Lightning's learning-rate finder loads a checkpoint of step 0
        if before != now and checkpoint["global_step"] and trainer.is_global_zero:
            say(f"Settings that differ from the checkpoint's: ema.decay: {before} → {now}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled:
            return
        if not self._average or trainer.global_step == 0:
            self._average, self._updates, self._step = _copies(pl_module), 0, trainer.global_step
        own = trainable_tensors(pl_module)
        self._average = {name: tensor.to(own[name].device) for name, tensor in self._average.items()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not self._average or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._updates += 1
        decay = min(self.decay, (1 + self._updates) / (10 + self._updates))
        for name, tensor in trainable_tensors(pl_module).items():
            self._average[name].lerp_(tensor.detach(), 1 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.put_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.take_out(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average and trainer.state.fn == "fit":
            if not self._trained:
                self.on_train_batch_end(trainer, pl_module)  # which may come after another callback's, which saves
            trained = self._trained or _copies(pl_module)
            checkpoint[_KEY] = {"decay": self.decay, "updates": self._updates, "trained": trained}
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **self._average}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.put_in(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = {}  # the average stays

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.take_out(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the decay: Lightning reports which callback is missing if a run is resumed without it."""
        return {"decay": self.decay} if self.enabled else {}

    def put_in(self, pl_module: LightningModule) -> bool:
        """Put the average into the model; return False if there is none, or the model holds it already."""
        if not self._average or self._trained:
            return False
        self._trained = _copies(pl_module)
        copy_tensors(pl_module, self._average, "The average")
        return True

    def take_out(self, pl_module: LightningModule) -> None:
        """Put the trained adapter back, if the model holds the average."""
        if self._trained:
            copy_tensors(pl_module, self._trained, "The trained adapter")
            self._trained = {}


@contextlib.contextmanager
def holding_average(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Hold the average of an :class:`AdapterEMA` of the trainer in the model, if there is one."""
    ema = find_callback(trainer, AdapterEMA)
    holds = ema is not None and ema.put_in(pl_module)
    try:
        yield
    finally:
        if ema is not None and holds:
            ema.take_out(pl_module)


def _copies(pl_module: LightningModule) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainable_tensors(pl_module).items()}
