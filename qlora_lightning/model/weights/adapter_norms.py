"""How far an adapter moves each weight, and how much of its rank it uses."""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from qlora_lightning.model.adapters.lora import ADAPTER
from qlora_lightning.model.weights.base_weights import Weights
from qlora_lightning.model.weights.merging import merge_module


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
    """Measure one LoRA layer.

    ``scaling · B A`` is never made: with ``B = Q_B R_B`` and ``Aᵀ = Q_A R_A`` it has the singular values of
    ``scaling · R_B R_Aᵀ``. Effective rank is the exponential of the entropy of the singular values' shares (Roy and
    Vetterli 2007, The effective rank).

    Args:
        layer: PEFT's layer.
        name: Of the module in the base.
        weights: Of the base.
    """
    a, b = _factors(layer)
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


def _factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Give A ``(rank, in)`` and B ``(out, rank)`` in float64: the shares of small singular values count."""
    if ADAPTER in layer.lora_A:
        return layer.lora_A[ADAPTER].weight.double(), layer.lora_B[ADAPTER].weight.double()
    return layer.lora_embedding_A[ADAPTER].double(), layer.lora_embedding_B[ADAPTER].double()
