"""Keep only each layer's input, and compute the rest of its activations again in backward."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.layers.attention import has_dropout
from qlora_lightning.model.layers.checkpointing import keep_inputs_apart
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.versions import enable_activation_checkpointing

_SETTINGS = ("gradient_checkpointing", "_gradient_checkpointing_func")  # that transformers sets in a module


class GradientCheckpointing(Callback):
    """Switch activation checkpointing on, non-reentrant, and see that it is active.

    transformers checkpoints only in training mode and says nothing when it does not. So at the first step, and at the
    first after each validation, it is counted whether backward really ran each layer a second time. After the fit the
    model is as it was before.

    Args:
        enabled: ``False`` leaves the model alone.
        every_n_layers: Checkpoint every n-th decoder layer: 1 saves most memory, more costs less time.

    Raises:
        UserError: ``every_n_layers`` is less than 1.
        RuntimeError: Checkpointing is not active although it is switched on.
    """

    def __init__(self, enabled: bool = True, every_n_layers: int = 1) -> None:
        if every_n_layers < 1:
            raise UserError(f"gradient_checkpointing.every_n_layers is {every_n_layers}: expected 1 or more.")
        self.enabled = enabled
        self.every_n_layers = every_n_layers
        self._layers: list[str] = []
        self._runs: dict[str, int] = {}
        self._usual: dict[str, Any] = {}  # how the watched layers are checkpointed
        self._before: list[tuple[nn.Module, dict[str, Any]]] = []  # what the fit found
        self._with_input_gradients: Any = None  # a model whose embedding's output took a gradient before the fit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled:
            model: Any = pl_module.causal_lm
            self._before = [(part, _settings_of(part)) for part in model.modules() if hasattr(part, _SETTINGS[0])]
            self._with_input_gradients = model if getattr(model, "_require_grads_hooks", None) else None
            model.disable_input_require_grads()
            enable_activation_checkpointing(model, self.every_n_layers, draws=has_dropout(model))
            # It lets the embedding's output take a gradient, which reentrant checkpointing alone would need, and which
            # would go on down through all layers below the adapters.
            model.disable_input_require_grads()
            self._layers = [name for name, layer in pl_module.named_modules() if _is_checkpointed(layer)]
            if not self._layers:
                raise RuntimeError(
                    "gradient_checkpointing is enabled, but no layer with an adapter can be checkpointed."
                )
            if getattr(pl_module, "fast", True):
                keep_inputs_apart(pl_module.get_submodule(name) for name in self._layers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watch(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._watch(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._runs = dict.fromkeys(self._runs, 0)  # what ran before the step, a dry batch, says nothing of it

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._put_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._put_back()  # no teardown follows

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._usual:
            return
        once = [name for name, runs in self._runs.items() if runs < 2]
        self._forget(pl_module)
        if once:
            raise RuntimeError(
                f"gradient_checkpointing is enabled, but {len(once)} layers, as {once[0]}, were not run again in "
                "backward: their activations were all kept. Is the model in training mode?"
            )

    def _watch(self, pl_module: LightningModule) -> None:
        """Count how often each checkpointed layer with something to train runs in the next step.

        By the function that transformers checkpoints with, and not by hooks: a layer whose parts have hooks is not
        fused, and its sums are rounded otherwise.
        """
        self._forget(pl_module)
        for name in self._layers:
            layer: Any = pl_module.get_submodule(name)
            self._runs[name], self._usual[name] = 0, layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = self._counting(name)

    def _counting(self, name: str) -> Any:
        usual = self._usual[name]

        def checkpoint(function: Any, *inputs: Any) -> Any:
            def counted(*inputs: Any) -> Any:
                self._runs[name] += 1
                return function(*inputs)

            return usual(counted, *inputs)

        return checkpoint

    def _put_back(self) -> None:
        for module, settings in self._before:
            for name in _SETTINGS:
                vars(module).pop(name, None)
            vars(module).update(settings)
        if self._with_input_gradients is not None:
            self._with_input_gradients.enable_input_require_grads()
        self._before, self._layers, self._usual, self._runs = [], [], {}, {}
        self._with_input_gradients = None

    def _forget(self, pl_module: LightningModule) -> None:
        for name, usual in self._usual.items():
            layer: Any = pl_module.get_submodule(name)
            layer._gradient_checkpointing_func = usual
        self._usual, self._runs = {}, {}


def _settings_of(module: nn.Module) -> dict[str, Any]:
    return {name: vars(module)[name] for name in _SETTINGS if name in vars(module)}


def _is_checkpointed(layer: nn.Module) -> bool:
    """Switched on, and with something to train: what lies below all adapters is never run again."""
    return (
        isinstance(layer, GradientCheckpointingLayer)
        and layer.gradient_checkpointing
        and bool(trainable_tensors(layer))
    )
