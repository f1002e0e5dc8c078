"""How far an adapter moves each weight of the base, and how much of its rank the update uses."""

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn

from qlora_lightning.model.adapters.inject import ADAPTER
from qlora_lightning.model.anatomy import layer_of


class UpdateNorm(NamedTuple):
    """Size of the update ΔW = scaling · B A of one weight W; DoRA's magnitudes are not counted.

    Attributes:
        ratio: ``‖ΔW‖ / ‖W‖`` in Frobenius norms.
        rank: Rank of the adapter on W.
        effective_rank: Directions that the update uses, from 1 to ``rank``; 0 if it is zero.
    """

    ratio: float
    rank: int
    effective_rank: float


@torch.no_grad()
def measure_updates(model: nn.Module) -> dict[str, dict[int | None, UpdateNorm]]:
    """Measure the update of each LoRA linear, by kind of module (``q_proj``, …) and then by decoder layer.

    A module outside of the decoder layers (``lm_head``) has ``None`` as its layer.
    """
    table: dict[str, dict[int | None, UpdateNorm]] = defaultdict(dict)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:  # not of an embedding
            table[name.rpartition(".")[2]][layer_of(name)] = _measure(layer)
    return dict(table)


def _measure(layer: Any) -> UpdateNorm:
    """Measure one layer without forming ΔW.

    With B = Q_B R_B and Aᵀ = Q_A R_A, the singular values of B A are those of the small R_B R_Aᵀ. The effective rank is
    the exponential of the entropy of their shares (Roy and Vetterli 2007, The effective rank).
    """
    lora_A, lora_B = (linears[ADAPTER].weight.double().cpu() for linears in (layer.lora_A, layer.lora_B))
    core = torch.linalg.qr(lora_B).R @ torch.linalg.qr(lora_A.T).R.T
    singular_values = layer.scaling[ADAPTER] * torch.linalg.svdvals(core)
    base = layer.get_base_layer()
    is_quantized = type(base.weight) is not nn.Parameter
    weight = dequantize_bnb_weight(base.weight, getattr(base, "state", None)) if is_quantized else base.weight
    shares = singular_values / singular_values.sum()
    entropy = -torch.xlogy(shares, shares).sum()
    effective_rank = float(entropy.exp()) if singular_values.any() else 0.0
    return UpdateNorm(float(singular_values.norm()) / float(weight.float().norm()), len(lora_A), effective_rank)
