"""Gradient checkpointing: keep only each layer's input, and compute its other activations again in backward."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch.autograd.graph import save_on_cpu
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lightning.model.adapters.inject import trainable_tensors
from qlora_lightning.model.layers.attention import has_dropout
from qlora_lightning.support.versions import enable_activation_checkpointing


class Checkpointing(NamedTuple):
    """Whether layers are checkpointed, and whether their inputs wait in host memory."""

    checkpointed: bool = False
    offload: bool = False

    def __str__(self) -> str:
        if not self.checkpointed:
            return "without gradient checkpointing"
        return "with gradient checkpointing" + (", its inputs in host memory" if self.offload else "")


def checkpointing_choices(
    enabled: bool | Literal["auto"] = "auto", offload: bool = False, *, on_cuda: bool
) -> list[Checkpointing]:
    """Return what may be done about memory, in the order in which it is."""
    if enabled != "auto":
        return [Checkpointing(enabled, offload and on_cuda)]
    found = [Checkpointing(), Checkpointing(True, offload and on_cuda), Checkpointing(True, on_cuda)]
    return list(dict.fromkeys(found))


def switch_on(causal_lm: Any, choice: Checkpointing) -> None:
    """Checkpoint layers as a choice has it, non-reentrant.

    transformers' switch alone would let the gradient run on below the adapters, down to the embedding.
    """
    if not choice.checkpointed:
        return
    enable_activation_checkpointing(causal_lm, draws=has_dropout(causal_lm))
    causal_lm.disable_input_require_grads()  # which only reentrant checkpointing would need
    layers = [
        layer
        for layer in causal_lm.modules()
        if isinstance(layer, GradientCheckpointingLayer)
        and layer.gradient_checkpointing
        and trainable_tensors(layer)  # what is below all adapters never runs again
    ]
    if not layers:
        raise RuntimeError("gradient_checkpointing is enabled, but no layer with an adapter can be checkpointed.")
    for layer in layers if choice.offload else ():
        layer._gradient_checkpointing_func = functools.partial(
            _checkpoint_offloaded, layer._gradient_checkpointing_func
        )


def _checkpoint_offloaded(checkpoint: Callable[..., Any], function: Callable[..., Any], *inputs: Any) -> Any:
    """Checkpoint a layer whose inputs wait for backward in pinned memory of the host."""
    with save_on_cpu(pin_memory=True):
        return checkpoint(function, *inputs)
