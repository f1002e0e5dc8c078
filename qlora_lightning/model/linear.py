"""A LoRA linear over a frozen weight as one autograd function: the weight is made dense once per direction."""

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor, nn

ADAPTER = "default"  # PEFT's name for the only adapter that we put on
DenseWeight = Callable[[torch.dtype], Tensor]


class LoRALinearFunction(torch.autograd.Function):
    """Compute ``y = x Wᵀ + bias + scaling (x Aᵀ) Bᵀ``, keeping only ``x`` and ``x Aᵀ`` for backward.

    A and B are float32 masters, used in x's dtype (Hu et al. 2021, LoRA; Dettmers et al. 2023, QLoRA). W and bias are
    frozen and get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, bias: Tensor | None, dense: DenseWeight
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        low = flat @ lora_a.to(x.dtype).t()  # (tokens, rank)
        output = F.linear(flat, dense(x.dtype), bias)
        output.addmm_(low, lora_b.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(flat, low, lora_a, lora_b)
        ctx.dense, ctx.scaling, ctx.shape = dense, scaling, x.shape
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None, None]:
        flat, low, lora_a, lora_b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        grad_low = (grad @ lora_b.to(grad.dtype)).mul_(ctx.scaling)  # (tokens, rank)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.dense(grad.dtype)
            grad_x = grad_x.addmm_(grad_low, lora_a.to(grad.dtype)).view(ctx.shape)
        grad_a = (grad_low.t() @ flat).to(lora_a.dtype)
        grad_b = (grad.t() @ low).mul_(ctx.scaling).to(lora_b.dtype)
        return grad_x, grad_a, grad_b, None, None, None


class FusedLinear4bit(PeftLinear4bit):  # type: ignore[misc]  # PEFT ships no types
    """PEFT's LoRA over a 4-bit linear with a fused forward; saving, merging and disabling stay PEFT's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(…, in)`` to ``(…, out)``; whatever is not plain LoRA goes PEFT's own way."""
        if args or kwargs or not _is_plain(self):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        base = self.base_layer
        return _apply(self, x, base.compute_dtype or x.dtype, base.bias, self._dense)

    def _dense(self, dtype: torch.dtype) -> Tensor:
        weight = self.base_layer.weight
        dense: Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return dense.to(dtype)


class FusedLinear(PeftLinear):  # type: ignore[misc]  # PEFT ships no types
    """The same over a linear that is not quantized."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(…, in)`` to ``(…, out)``; whatever is not plain LoRA goes PEFT's own way."""
        if args or kwargs or not _is_plain(self):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        return _apply(self, x, self.base_layer.weight.dtype, self.base_layer.bias, self._dense)

    def _dense(self, dtype: torch.dtype) -> Tensor:
        weight: Tensor = self.base_layer.weight
        return weight.to(dtype)


def _is_plain(layer: LoraLayer) -> bool:
    """One enabled adapter, unmerged, without dropout at work, a bias or a variant such as DoRA."""
    dropout = layer.lora_dropout[ADAPTER]
    return (
        not layer.disable_adapters
        and not layer.merged
        and layer.active_adapters == [ADAPTER]
        and ADAPTER not in layer.lora_variant
        and not layer.lora_bias[ADAPTER]
        and (isinstance(dropout, nn.Identity) or not layer.training)
    )


def _apply(layer: LoraLayer, x: Tensor, compute_dtype: torch.dtype, bias: Tensor | None, dense: DenseWeight) -> Tensor:
    if bias is not None:
        bias = bias.to(compute_dtype)
    lora_a, lora_b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    scaling = layer.scaling[ADAPTER]
    arguments = (x.to(compute_dtype), lora_a, lora_b, scaling, bias, dense)
    output: Tensor = LoRALinearFunction.apply(*arguments)  # type: ignore[no-untyped-call]  # torch does not type it
    return output.to(x.dtype)


def fuse_lora_linears(model: nn.Module) -> list[str]:
    """Let every LoRA linear of a PEFT model that can be fused use :class:`LoRALinearFunction`.

    PEFT has made the layers; only their class, and so their ``forward``, changes.

    Returns:
        The names of the LoRA layers that keep PEFT's forward: int8, dropout, DoRA and other variants.
    """
    fused = {PeftLinear4bit: FusedLinear4bit, PeftLinear: FusedLinear}
    left: list[str] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if type(layer) in fused and _can_be_plain(layer):
            layer.__class__ = fused[type(layer)]
        else:
            left.append(name)
    return left


def _can_be_plain(layer: LoraLayer) -> bool:
    return (
        type(layer.get_base_layer()) in (nn.Linear, bnb.nn.Linear4bit)
        and ADAPTER not in layer.lora_variant
        and not layer.lora_bias[ADAPTER]
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
    )
