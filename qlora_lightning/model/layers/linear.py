"""A LoRA linear over a frozen weight as one autograd function: the weight is made dense once per direction."""

from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_lightning.model.layers.autograd import apply
from qlora_lightning.model.layers.frozen_weight import FrozenWeight
from qlora_lightning.model.layers.hooks import is_watched
from qlora_lightning.model.layers.originals import Originals
from qlora_lightning.model.layers.projection import (
    Frozen,
    gradient_of_a,
    gradients_of_b,
    narrow,
    project,
    project_back,
)

ORIGINAL_LINEARS = Originals(
    *((kind, "forward") for kind in (nn.Linear, bnb.nn.Linear4bit, nn.Identity, nn.Dropout, PeftLinear, PeftLinear4bit))
)


class LoRALinearFunction(torch.autograd.Function):
    """Compute ``y = (residual +) x Wᵀ + bias + scaling (x Aᵀ) Bᵀ``, keeping only ``x`` and ``x Aᵀ`` for backward.

    A and B are float32 masters, used in x's dtype (Hu et al. 2021, LoRA; Dettmers et al. 2023, QLoRA). W and bias are
    frozen and get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, frozen: Frozen, residual: Tensor | None
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        low = None if lora_a is None else narrow(flat, lora_a)  # (tokens, rank)
        output = project(flat, low, lora_b, frozen, residual)
        ctx.save_for_backward(None if lora_a is None else flat, low, lora_a, lora_b)
        ctx.frozen, ctx.shape = frozen, x.shape
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, lora_a, lora_b = ctx.saved_tensors
        grad_residual = grad if ctx.needs_input_grad[4] else None
        grad = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        grad_low = grad_x = grad_a = grad_b = None
        if lora_a is not None:
            needed = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[2]
            grad_low, grad_b = gradients_of_b(grad, low, lora_b, ctx.frozen, needed)
        if grad_low is not None and ctx.needs_input_grad[1]:
            grad_a = gradient_of_a(grad_low, flat).to(lora_a.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = project_back([grad], [ctx.frozen], grad_low, lora_a)
        return None if grad_x is None else grad_x.view(ctx.shape), grad_a, grad_b, None, grad_residual


class LoRAProjection(torch.autograd.Function):
    """Compute ``residual + x Wᵀ + bias + scaling · low Bᵀ`` of ``low = x Aᵀ`` that is made with x.

    The last of a decoder layer. It saves nothing through autograd, so that a checkpointed layer that is run again stops
    before its product; ``low``, narrow, is kept by hand. What made x keeps what A's gradient takes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low: Tensor | None, lora_b: Tensor | None, frozen: Frozen, residual: Tensor
    ) -> Tensor:
        """Map x, ``(tokens, in)``, and low, ``(tokens, rank)``, to the shape of the residual, ``(…, out)``."""
        ctx.low, ctx.lora_b, ctx.frozen = None if low is None else low.detach(), lora_b, frozen
        ctx.version = None if lora_b is None else lora_b._version
        return project(x, low, lora_b, frozen, residual).view(residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.lora_b is not None and ctx.lora_b._version != ctx.version:  # as autograd sees to what it saves
            raise RuntimeError("An adapter's B was modified in place between forward and backward.")
        flat = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        grad_x = project_back([flat], [ctx.frozen], None, None) if ctx.needs_input_grad[0] else None
        grad_low, grad_b = gradients_of_b(flat, ctx.low, ctx.lora_b, ctx.frozen, ctx.needs_input_grad[1:3])
        return grad_x, grad_low, grad_b, None, grad if ctx.needs_input_grad[4] else None


class FusedLinear4bit(PeftLinear4bit):  # type: ignore[misc]  # PEFT ships no types
    """PEFT's LoRA over a 4-bit linear with a fused forward; saving, merging and disabling stay PEFT's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(…, in)`` to ``(…, out)``; whatever is not plain LoRA goes PEFT's own way."""
        if args or kwargs or not _can_fuse(self):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        return _apply(self, x)


class FusedLinear(PeftLinear):  # type: ignore[misc]  # PEFT ships no types
    """The same over a linear that is not quantized."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(…, in)`` to ``(…, out)``; whatever is not plain LoRA goes PEFT's own way."""
        if args or kwargs or not _can_fuse(self):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        return _apply(self, x)


def _can_fuse(layer: LoraLayer) -> bool:
    usual = is_plain(layer) and ORIGINAL_LINEARS.are_there() and not any(map(is_watched, layer.children()))
    return usual and not layer.disable_adapters


def _apply(layer: LoraLayer, x: Tensor) -> Tensor:
    device = x.device.type
    autocasts = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocasts else compute_dtype_of(layer) or x.dtype
    arguments = (x.to(dtype), *adapters_of(layer), frozen_part(layer, dtype), None)
    with torch.autocast(device, enabled=False):
        output: Tensor = apply(LoRALinearFunction, *arguments)
    return output if autocasts else output.to(x.dtype)


def is_plain(layer: Any) -> bool:
    """Whether a linear is frozen and has at most one active, unmerged adapter without dropout, bias or variant."""
    if type(layer) not in (FusedLinear4bit, FusedLinear):
        return _is_frozen(layer)
    if "forward" in vars(layer) or len(layer.active_adapters) != 1 or layer.merged or not _is_frozen(layer.base_layer):
        return False
    (adapter,) = layer.active_adapters
    if adapter not in layer.lora_A:  # it leaves this linear as it is
        return True
    matrices = layer.lora_A[adapter], layer.lora_B[adapter]
    if any(type(each) is not nn.Linear or each.bias is not None for each in matrices):
        return False
    dropout = layer.lora_dropout[adapter]
    return (
        adapter not in layer.lora_variant
        and not layer.lora_bias[adapter]
        and (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training))
    )


def _is_frozen(linear: Any) -> bool:
    if type(linear) not in (nn.Linear, bnb.nn.Linear4bit) or "forward" in vars(linear):
        return False
    if type(linear) is bnb.nn.Linear4bit and not isinstance(linear.weight, bnb.nn.Params4bit):
        return False  # of a model that was pickled: bitsandbytes' own forward makes it whole again
    return not (linear.weight.requires_grad or (linear.bias is not None and linear.bias.requires_grad))


def compute_dtype_of(layer: nn.Module) -> torch.dtype | None:
    """Give the dtype of a linear's products; ``None`` where it is that of the input."""
    base = _base_of(layer)
    dtype: torch.dtype | None = base.compute_dtype if isinstance(base, bnb.nn.Linear4bit) else base.weight.dtype
    return dtype


def adapters_of(layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Give A ``(rank, in)`` and B ``(out, rank)`` of a plain linear, if it has an adapter that is not disabled."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.active_adapters[0] not in layer.lora_A:
        return None, None
    (adapter,) = layer.active_adapters
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def frozen_part(layer: nn.Module, dtype: torch.dtype) -> Frozen:
    """Give what of a plain linear does not train; the bias in ``dtype``."""
    base = _base_of(layer)
    bias = None if base.bias is None else base.bias.to(dtype)
    scaling = layer.scaling.get(layer.active_adapters[0], 1.0) if isinstance(layer, LoraLayer) else 1.0
    return Frozen(FrozenWeight(base.weight), bias, scaling)


def _base_of(layer: nn.Module) -> Any:
    return layer.base_layer if isinstance(layer, LoraLayer) else layer


def fuse_lora_linears(model: nn.Module) -> list[str]:
    """Let every LoRA linear of a PEFT model that can be fused use :class:`LoRALinearFunction`.

    PEFT has made the layers; only their class, and so their ``forward``, changes.

    Returns:
        The names of the LoRA layers that keep PEFT's forward: int8, dropout, DoRA and other variants.
    """
    fused = {PeftLinear4bit: FusedLinear4bit, PeftLinear: FusedLinear}
    fused |= {kind: kind for kind in fused.values()}  # of an adapter before
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
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and all(type(dropout) is nn.Identity for dropout in layer.lora_dropout.values())
    )
