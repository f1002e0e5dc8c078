"""Adapters merged into weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_lightning.base.adapter_folder import read_adapter_config
from qlora_lightning.model.adapters.lora import ADAPTER, OURS, check_lora_options
from qlora_lightning.model.load.build import meta_base, put_adapters
from qlora_lightning.model.weights.base import EMBEDDING, HEAD, Weights, holding_weights, name_in_base
from qlora_lightning.support.errors import UserError

# Fields of an adapter's config that say nothing of the function it computes.
_INDIFFERENT = {"task_type", "peft_type", "inference_mode", "auto_mapping", "peft_version", "init_lora_weights"}


@dataclass(frozen=True)
class MergePlan:
    """A hollow base with a real adapter on it, and the shapes of the merged model's tensors, tied ones once."""

    model: peft.PeftModel
    shapes: dict[str, tuple[int, ...]]

    @property
    def config(self) -> Any:
        """The base's config, without quantization."""
        return self.model.get_base_model().config


def plan_merge(base_folder: Path, adapter: Path) -> MergePlan:
    """Put an adapter on its base, which is hollow; reject one of a kind whose merge is not verified."""
    base = meta_base(base_folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
    _check_options(adapter, base)
    model = put_adapters(base, adapter).requires_grad_(False).eval()
    return MergePlan(model, shapes)


class MergedWeights:
    """Weights of the base with an adapter worked in, by name.

    PEFT's own layers merge, on weights in fp32; a tensor that the adapter leaves alone comes as ``weights`` gives it.
    """

    def __init__(self, plan: MergePlan, weights: Weights) -> None:
        self._names, self._weights = plan.shapes.keys(), weights
        self._changed = changed_modules(plan.model.get_base_model())

    def __call__(self, name: str) -> Tensor:
        """Return a tensor of the merged model; raise UserError if it is not finite."""
        if name == HEAD and name not in self._names:
            name = EMBEDDING  # tied
        owner, _, kind = name.rpartition(".")
        module = self._changed.get(owner)
        return self._weights(name) if module is None else merge_module(module, owner, kind, self._weights)


def merge_module(module: nn.Module, name: str, kind: str, weights: Weights) -> Tensor:
    """Return the ``weight`` or ``bias`` of a layer of PEFT, whose name in the base is ``name``, merged, in fp32."""
    if isinstance(module, ModulesToSaveWrapper):
        tensor: Tensor = getattr(module.modules_to_save[ADAPTER], kind)
        return tensor.detach().float()
    layer: Any = module
    with torch.no_grad(), holding_weights(layer, name, weights, torch.float32):
        try:
            layer.merge(safe_merge=True, adapter_names=[ADAPTER])
        except ValueError as error:
            raise UserError(
                f"The adapter cannot be merged into {name}: {error}. It has diverged, or its file is damaged."
            ) from error
        merged: Tensor = getattr(layer.get_base_layer(), kind).detach()
    layer.merged_adapters.clear()
    return merged


def adapted_layers(plan: MergePlan) -> dict[str, LoraLayer]:
    """Return the LoRA layers of a plan by their names in the base."""
    modules = changed_modules(plan.model.get_base_model())
    return {name: module for name, module in modules.items() if isinstance(module, LoraLayer)}


def changed_modules(base: nn.Module) -> dict[str, nn.Module]:
    """Return PEFT's layers by the names of what they change: LoRA, modules trained whole, tokens."""
    kinds = (LoraLayer, ModulesToSaveWrapper, TrainableTokensLayer)
    found = ((name_in_base(name), module) for name, module in base.named_modules() if isinstance(module, kinds))
    return {name: module for name, module in found if not getattr(module, "tied_adapter", None)}


def _check_options(adapter: Path, base: PreTrainedModel) -> None:
    """Refuse by name what was not verified, by the same rules as where an adapter is made."""
    stored = read_adapter_config(adapter)
    usual = peft.LoraConfig().to_dict()
    options = {
        name: value
        for name, value in stored.items()
        if name not in _INDIFFERENT and name not in OURS and value not in (usual.get(name), None, False, [], {})
    }
    if isinstance(stored.get("init_lora_weights"), str):
        options["init_lora_weights"] = stored["init_lora_weights"]
    try:
        check_lora_options(options, base, bool(base.config.tie_word_embeddings))
    except UserError as error:
        raise UserError(f"The adapter folder {adapter} cannot be merged: {error}") from error
