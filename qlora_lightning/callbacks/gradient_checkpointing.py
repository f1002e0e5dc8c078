"""Keep only each layer's input, and compute the rest of its activations again in backward."""

import functools
from collections.abc import Callable
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer
from torch.autograd.graph import save_on_cpu
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lightning.model.adapters.inject import trainable_tensors
from qlora_lightning.model.layers.attention import has_dropout
from qlora_lightning.model.memory.formula import Checkpointing
from qlora_lightning.support.versions import enable_activation_checkpointing


class GradientCheckpointing(Callback):
    """Switch activation checkpointing on, non-reentrant, at the beginning of a fit. Only training is changed by it.

    transformers' switch alone would let the gradient run on below the adapters, down to the embedding.

    Args:
        enabled: ``auto`` switches it on if a row alone would not fit without, or memory runs out in one; then
            ``offload`` on a GPU.
        offload: Keep the inputs of these layers in pinned host memory instead of on the GPU, for long rows. The result
            is the same to the last bit. A CPU has them there in any case.
    """

    def __init__(self, enabled: bool | Literal["auto"] = "auto", offload: bool = False) -> None:
        self.enabled, self.offload = enabled, offload

    def choices(self, on_cuda: bool) -> list[Checkpointing]:
        """Return what may be done about memory, in the order in which it is."""
        if self.enabled != "auto":
            return [Checkpointing(self.enabled, self.offload and on_cuda)]
        found = [Checkpointing(), Checkpointing(True, self.offload and on_cuda), Checkpointing(True, on_cuda)]
        return list(dict.fromkeys(found))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        module: Any = pl_module
        if stage != "fit":
            return
        on_cuda = trainer.strategy.root_device.type == "cuda"
        module.micro_batch_size.choices = self.choices(on_cuda)
        module.micro_batch_size.apply = functools.partial(self._apply, module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        if not module.causal_lm.supports_gradient_checkpointing and self.enabled == "auto":
            module.micro_batch_size.choices = [Checkpointing()]
        self._apply(module, module.micro_batch_size.choices[0])

    def _apply(self, module: Any, choice: Checkpointing) -> None:
        if not choice.checkpointed:
            return
        model = module.causal_lm
        enable_activation_checkpointing(model, draws=has_dropout(model))
        model.disable_input_require_grads()  # which only reentrant checkpointing would need
        layers = [
            layer
            for layer in model.modules()
            if isinstance(layer, GradientCheckpointingLayer)
            and layer.gradient_checkpointing
            and trainable_tensors(layer)  # what is below all adapters never runs again
        ]
        if not layers:
            raise RuntimeError("gradient_checkpointing is enabled, but no layer with an adapter can be checkpointed.")
        for layer in layers if choice.offload else ():
            checkpoint = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = functools.partial(_checkpoint_offloaded, checkpoint)


def _checkpoint_offloaded(checkpoint: Callable[..., Any], function: Callable[..., Any], *inputs: Any) -> Any:
    """Checkpoint a layer whose inputs wait for backward in pinned memory of the host."""
    with save_on_cpu(pin_memory=True):
        return checkpoint(function, *inputs)
