"""Gradient checkpointing: save only each layer's input, on the device or on the host."""

from typing import Any, Literal, NamedTuple

from lightning import Callback
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lightning.model.layers.attention import recompute_contexts
from qlora_lightning.support.settings import check_arguments


class GradientCheckpointing(Callback):
    """Choose when layers keep only their input, and recompute their other activations in backward.

    Without this callback it is ``auto``. It affects training only.

    Args:
        enabled: ``auto`` switches it on if a single row would not fit without it, or runs out of memory; then
            with ``offload`` on a GPU.
        offload: Keep the inputs of these layers in pinned host memory instead of on the GPU, for long rows. The result
            is the same to the last bit. On a CPU it changes nothing.
    """

    def __init__(self, enabled: bool | Literal["auto"] = "auto", offload: bool = False) -> None:
        check_arguments("gradient_checkpointing", GradientCheckpointing.__init__, locals())
        self.enabled, self.offload = enabled, offload


class Checkpointing(NamedTuple):
    """Whether layers are checkpointed, and whether their inputs are kept in host memory."""

    checkpointed: bool = False
    offload: bool = False

    def __str__(self) -> str:
        if not self.checkpointed:
            return "without gradient checkpointing"
        return "with gradient checkpointing" + (", its inputs in host memory" if self.offload else "")


def checkpointing_choices(
    enabled: bool | Literal["auto"] = "auto", offload: bool = False, *, on_cuda: bool
) -> list[Checkpointing]:
    """Return the choices of checkpointing, in the order in which they are tried."""
    checkpointed = [Checkpointing(True, offload and on_cuda), Checkpointing(True, on_cuda)]
    choices = {True: checkpointed[:1], False: [Checkpointing()], "auto": [Checkpointing(), *checkpointed]}
    return list(dict.fromkeys(choices[enabled]))


def switch_checkpointing(causal_lm: Any, before: Checkpointing, choice: Checkpointing) -> None:
    """Switch from the choice of the fit before; checkpointing that a ``build_model`` has enabled stays on."""
    if choice.checkpointed:
        enable_activation_checkpointing(causal_lm, choice.offload)
    elif before.checkpointed:
        for layer in causal_lm.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.gradient_checkpointing = False


def enable_activation_checkpointing(causal_lm: Any, offload: bool = False) -> None:
    """Checkpoint the decoder layers of a transformers model, non-reentrant; ``offload``: keep their inputs on the host.

    Backward recomputes a layer with its packed batch, and with the random numbers that it drew: torch saves the states
    of the generators, which are on the host, a GPU's too.
    """
    options = {"use_reentrant": False, "context_fn": recompute_contexts}
    if hasattr(causal_lm, "activation_checkpointing_enable"):
        causal_lm.activation_checkpointing_enable(options, offload=offload)
    else:  # its name in transformers 5.17
        causal_lm.gradient_checkpointing_enable(options, offload=offload)
    # only reentrant checkpointing needs it, and it would compute gradients below the first adapter too
    causal_lm.disable_input_require_grads()
