"""Gradient checkpointing: save only each layer's input, on the device or on the host."""

from typing import Any, Literal, NamedTuple

from lightning import Callback, LightningModule, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lightning.model.layers.attention import recompute_contexts
from qlora_lightning.support.settings import check_arguments


class Checkpointing(NamedTuple):
    """Whether layers are checkpointed, and whether their inputs are kept in host memory."""

    checkpointed: bool = False
    offload: bool = False

    def __str__(self) -> str:
        if not self.checkpointed:
            return "without gradient checkpointing"
        return "with gradient checkpointing" + (", its inputs in host memory" if self.offload else "")


class GradientCheckpointing(Callback):
    """Keep only the input of each decoder layer in training, and recompute its other activations in backward.

    It is turned on when training starts, or later if memory runs out in a single row, and off when training ends. The
    module adds this callback, with ``auto``, to a Trainer that has none.

    Args:
        enabled: ``auto`` turns it on if a single row would not fit without it or runs out of memory, and adds
            ``offload`` if that is not enough on a GPU.
        offload: Keep the inputs of the layers in pinned host memory instead of on the GPU, for long rows. The result is
            the same to the last bit. On a CPU it changes nothing.
    """

    def __init__(self, enabled: bool | Literal["auto"] = "auto", offload: bool = False) -> None:
        check_arguments("gradient_checkpointing", GradientCheckpointing.__init__, locals())
        self.enabled, self.offload = enabled, offload
        self._before: dict[Any, bool] = {}  # layers that are switched, and whether they were checkpointed

    def choices(self, *, on_cuda: bool) -> list[Checkpointing]:
        """Return the choices, in the order in which they are tried."""
        checkpointed = [Checkpointing(True, self.offload and on_cuda), Checkpointing(True, on_cuda)]
        choices = {True: checkpointed[:1], False: [Checkpointing()], "auto": [Checkpointing(), *checkpointed]}
        return list(dict.fromkeys(choices[self.enabled]))

    def switch(self, causal_lm: Any, choice: Checkpointing) -> None:
        """Checkpoint the layers if that is the choice; what a ``build_model`` has enabled stays on without."""
        self.switch_back()
        if choice.checkpointed:
            # transformers' switch is on modules of this class, in some types on more than the decoder layers
            layers = [layer for layer in causal_lm.modules() if isinstance(layer, GradientCheckpointingLayer)]
            self._before = {layer: layer.gradient_checkpointing for layer in layers}
            enable_activation_checkpointing(causal_lm, choice.offload)

    def switch_back(self) -> None:
        """Let the layers be as they were before."""
        for layer, was_checkpointed in self._before.items():
            layer.gradient_checkpointing = was_checkpointed
        self._before = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        self.switch(module.causal_lm, module.token_budget.fits[0].choice)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.switch_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.switch_back()


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
