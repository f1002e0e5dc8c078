"""Adapters merged into weights, and how large their updates are."""

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
from qlora_lightning.model.build import meta_base, put_adapters
from qlora_lightning.model.weights.base import EMBEDDING, HEAD, Weights, filled, name_in_base
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
    with torch.no_grad(), filled(layer, name, weights, torch.float32):
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


@dataclass(frozen=True)
class Movement:
    """What an adapter does to one weight.

    Attributes:
        module: Its name in the base.
        rank: Of the adapter there.
        update_norm: Frobenius norm of the update, scaling included.
        base_norm: Frobenius norm of the weight before.
        effective_rank: How many directions the update has in effect, between 1 and ``rank``; 0 where it is zero.
    """

    module: str
    rank: int
    update_norm: float
    base_norm: float
    effective_rank: float

    @property
    def ratio(self) -> float:
        """The update's norm as a share of the weight's."""
        return self.update_norm / self.base_norm if self.base_norm else float("inf")


@torch.no_grad()
def measure_movement(layer: LoraLayer, name: str, weights: Weights) -> Movement:
    """Measure a LoRA layer, whose name in the base is ``name``.

    ``scaling · B A`` is never made: with ``B = Q_B R_B`` and ``Aᵀ = Q_A R_A`` it has the singular values of
    ``scaling · R_B R_Aᵀ``. Effective rank is the exponential of the entropy of the singular values' shares (Roy and
    Vetterli 2007, The effective rank).
    """
    if ADAPTER in layer.lora_A:
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    else:
        a, b = layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
    a, b = a.double(), b.double()  # (rank, in), (out, rank): the shares of small singular values count
    small = torch.linalg.qr(b).R @ torch.linalg.qr(a.t()).R.t()  # (rank, rank)
    values = torch.linalg.svdvals(layer.scaling[ADAPTER] * small)
    before = weights(f"{name}.weight").float()
    update = float(values.norm())
    if ADAPTER in layer.lora_variant:  # DoRA scales the rows, too: the update is the difference that it makes
        update = float((merge_module(layer, name, "weight", weights) - before).norm())
    shares = values / values.sum()
    entropy = -(shares * shares.clamp_min(torch.finfo(shares.dtype).tiny).log()).sum()
    effective = float(entropy.exp()) if values.sum() > 0 else 0.0
    return Movement(name, len(a), update, float(before.norm()), effective)
