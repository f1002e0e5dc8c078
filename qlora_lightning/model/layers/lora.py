"""A LoRA linear over a frozen weight: the products with weight and adapter as one autograd function."""
# mypy: allow-untyped-calls

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Self, cast

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_lightning.model.layers.attention import current_batch

_FEW_ROWS = 64  # for so few, on a GPU, bitsandbytes chooses whether it multiplies by the packed or a dense weight


class LinearParts(NamedTuple):
    """Operands of a linear, detached: the autograd functions return the gradients of A and B.

    Attributes:
        weight: W, ``(out, in)``: ``Params4bit`` or dense.
        bias: ``(out,)``, or ``None``.
        scaling: Factor on the adapter's part.
        lora_A: ``(rank, in)``, in the dtype of the products; ``None`` without an adapter.
        lora_B: ``(out, rank)``, in the same dtype, or ``None``.
    """

    weight: Any
    bias: Tensor | None = None
    scaling: float = 1.0
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None


# ---- products -------------------------------------------------------------------------------------------------------


def apply_A(x: Tensor, linears: Sequence[LinearParts]) -> list[Tensor | None]:
    """Compute ``x Aᵀ``, ``(n_tokens, rank)``, of linears that share the input ``(n_tokens, in)``, as one product."""
    stacked_A = _stack_A(linears)
    return _split_ranks(None if stacked_A is None else x @ stacked_A.t(), linears, dim=1)


def apply_linear(x: Tensor, xa: Tensor | None, linear: LinearParts, residual: Tensor | None = None) -> Tensor:
    """Compute ``(residual +) x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ``, ``(n_tokens, out)``; all in x's dtype.

    Args:
        x: ``(n_tokens, in)``.
        xa: ``x Aᵀ``, ``(n_tokens, rank)``; ``None`` without an adapter.
        linear: The linear's parts.
        residual: ``(n_tokens, out)``; not modified.
    """
    output = None
    if xa is not None and linear.lora_B is not None:
        # The adapter's product comes first: with beta = 0 it need not read a sum.
        output = _product(xa, linear.lora_B.t(), linear.scaling)
    if x.is_cuda and len(x) <= _FEW_ROWS and isinstance(linear.weight, bnb.nn.Params4bit):
        product: Tensor = bnb.matmul_4bit(x, linear.weight.data, linear.weight.quant_state)
        output = product if output is None else output.add_(product)
    else:
        weight = _dense(linear.weight, x.dtype)
        output = x @ weight.t() if output is None else output.addmm_(x, weight.t())
    if linear.bias is not None:
        output.add_(linear.bias)
    # the residual comes last: its values are larger, and sums with them are rounded more coarsely
    return output if residual is None else output.add_(residual)


def input_gradient(grads: Sequence[Tensor], grad_xa: Tensor | None, linears: Sequence[LinearParts]) -> Tensor:
    """Compute the gradient of the input that linears share, ``(n_tokens, in)``: ``Σ grad W + grad_xa A``.

    Args:
        grads: Gradients of the outputs, ``(n_tokens, out)`` each.
        grad_xa: Gradients of the products with A, ``(n_tokens, sum of ranks)``; ``None`` without an adapter.
        linears: The parts of each linear; at least one.
    """
    stacked_A = _stack_A(linears)
    grad_x = None if grad_xa is None or stacked_A is None else grad_xa @ stacked_A
    for grad, linear in zip(grads, linears, strict=True):
        weight = _dense(linear.weight, grad.dtype)
        grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
    assert grad_x is not None, "there is a linear"
    return grad_x


def gradients_of_B(
    grads: Sequence[Tensor], all_xa: Sequence[Tensor | None], linears: Sequence[LinearParts]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Compute the gradients of all ``x Aᵀ``, ``(n_tokens, sum of ranks)``, and of each B, from those of the outputs."""
    grads_xa, grads_B = [], list[Tensor | None]()
    for grad, xa, linear in zip(grads, all_xa, linears, strict=True):
        if xa is None or linear.lora_B is None:
            grads_B.append(None)
            continue
        grads_xa.append(_product(grad, linear.lora_B, linear.scaling))
        grads_B.append(_master_gradient(grad.t(), xa, linear.scaling))
    return (torch.cat(grads_xa, 1) if len(grads_xa) > 1 else next(iter(grads_xa), None)), grads_B


def gradients_of_A(grad_xa: Tensor | None, x: Tensor, linears: Sequence[LinearParts]) -> list[Tensor | None]:
    """Compute the gradient of each A, ``(rank, in)``, from those of ``x Aᵀ``."""
    return _split_ranks(None if grad_xa is None else _master_gradient(grad_xa.t(), x), linears, dim=0)


def _dense(weight: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, bnb.nn.Params4bit):
        weight = dequantize_4bit(weight.data, weight.quant_state)
    return cast(Tensor, weight.to(dtype))


def _stack_A(linears: Sequence[LinearParts]) -> Tensor | None:
    all_A = [linear.lora_A for linear in linears if linear.lora_A is not None]
    return torch.cat(all_A) if len(all_A) > 1 else next(iter(all_A), None)


def _split_ranks(stacked: Tensor | None, linears: Sequence[LinearParts], dim: int) -> list[Tensor | None]:
    """Return each linear's slice, ``None`` if it has no adapter."""
    if stacked is None:
        return [None] * len(linears)
    slices = stacked.split([0 if linear.lora_A is None else len(linear.lora_A) for linear in linears], dim)
    return [None if linear.lora_A is None else matrix for linear, matrix in zip(linears, slices, strict=True)]


def _product(mat1: Tensor, mat2: Tensor, scaling: float) -> Tensor:
    """Compute ``scaling · mat1 mat2`` in one operation."""
    return torch.addmm(mat1.new_empty(()), mat1, mat2, beta=0, alpha=scaling)


def _master_gradient(mat1: Tensor, mat2: Tensor, scaling: float = 1.0) -> Tensor:
    """Compute ``scaling · mat1 mat2``, the gradient of a float32 A or B; a GPU sums in float32 and does not round."""
    if sums_in_float32(mat1):
        unread = mat1.new_empty((), dtype=torch.float32)
        return torch.addmm(unread, mat1, mat2, beta=0, alpha=scaling, out_dtype=torch.float32)
    return _product(mat1, mat2, scaling).float()


def sums_in_float32(tensor: Tensor) -> bool:
    """Whether a product of 16-bit tensors can be returned in float32, in which it is summed: on a GPU."""
    return tensor.is_cuda and tensor.dtype.itemsize == 2


class LoRALinearFunction(torch.autograd.Function):
    """Compute ``y = (residual +) x Wᵀ + bias + scaling (x Aᵀ) Bᵀ``, saving only ``x`` and ``x Aᵀ`` for backward.

    A and B are float32 masters, used in x's dtype (Hu et al. 2021, LoRA; Dettmers et al. 2023, QLoRA). W and bias are
    frozen and get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, linear: LinearParts, residual: Tensor | None
    ) -> Tensor:
        """Compute ``(n_tokens, out)`` from x, ``(n_tokens, in)``."""
        (xa,) = apply_A(x, [linear])
        # A and B are saved so that autograd notices if they change before backward
        ctx.save_for_backward(None if xa is None else x, xa, lora_A, lora_B)
        ctx.linear = linear
        return apply_linear(x, xa, linear, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, _, _ = ctx.saved_tensors
        grad_xa, (grad_B,) = gradients_of_B([grad_output], [xa], [ctx.linear])
        (grad_A,) = gradients_of_A(grad_xa, x, [ctx.linear])
        grad_x = input_gradient([grad_output], grad_xa, [ctx.linear]) if ctx.needs_input_grad[0] else None
        return grad_x, grad_A, grad_B, None, grad_output if ctx.needs_input_grad[4] else None


# ---- the modules ----------------------------------------------------------------------------------------------------


class Fused(nn.Module):
    """A library's layer with our fused forward before its own.

    Attributes:
        plain_reason: Why it runs as the library wrote it; ``None`` if it runs fused. See
            :func:`~qlora_lightning.model.layers.fuse.choose_layers`.
    """

    plain_reason: str | None = "it was not chosen yet"

    @classmethod
    def from_layer(cls, layer: nn.Module) -> Self:
        """Build one that shares all submodules and parameters of a layer, under the same names.

        Its class is a subclass of the layer's: transformers and PEFT find their layers by class.
        """
        classes: tuple[Any, Any] = cls, type(layer)
        fused = object.__new__(_fused_class(*classes))
        vars(fused).update(vars(layer))
        return cast(Self, fused)

    def extra_repr(self) -> str:
        return f"plain_reason={self.plain_reason!r}"


@functools.cache
def _fused_class(fused: Any, layer_class: Any) -> Any:
    return type(f"Fused{layer_class.__name__}", (fused, layer_class), {"__module__": fused.__module__})


class FusedLoRA(Fused):
    """PEFT's LoRA over a frozen linear, dense or in 4 bits; saving, merging and switching adapters stay PEFT's."""

    active_adapters: list[str]

    def computes_fused(self) -> bool:
        """Whether the fused forward gives the layer's current output: PEFT may switch adapters at any time."""
        is_plain_sum = self.disable_adapters or len(self.active_adapters) == 1
        return self.plain_reason is None and not self.merged and bool(is_plain_sum)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(…, in)`` to ``(…, out)``; all but plain LoRA takes PEFT's own forward."""
        if args or kwargs or self.disable_adapters or not self.computes_fused():
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        device = device_of_autocast(x)
        autocasts = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocasts else compute_dtype_of(self) or x.dtype
        with torch.autocast(device, enabled=False):
            rows = x.to(dtype).reshape(-1, x.shape[-1])
            output = LoRALinearFunction.apply(rows, *linear_parts(self, dtype), None)
        output = output.view(*x.shape[:-1], output.shape[-1])  # outside the function: a model may write into it
        return output if autocasts else output.to(x.dtype)


def linear_parts(layer: nn.Module, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, LinearParts]:
    """Return A and B of a linear, which may train, and its parts in ``dtype``.

    The current flat batch may have A and B in that dtype. Without an active adapter they are ``None``.
    """
    base = base_linear(layer)
    bias = None if base.bias is None else base.bias.to(dtype)
    lora_A, lora_B = active_lora(layer)
    if lora_A is None or lora_B is None or not isinstance(layer, LoraLayer):
        return None, None, LinearParts(base.weight, bias)
    batch = current_batch.get()
    casts = {} if batch is None else batch.casts
    cast_A, cast_B = (casts[param] if param in casts else param.detach().to(dtype) for param in (lora_A, lora_B))
    return lora_A, lora_B, LinearParts(base.weight, bias, layer.scaling[layer.active_adapters[0]], cast_A, cast_B)


def active_lora(layer: nn.Module) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return A ``(rank, in)`` and B ``(out, rank)`` of a linear's active adapter, if it has one."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.active_adapters[0] not in layer.lora_A:
        return None, None
    adapter = layer.active_adapters[0]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def base_linear(layer: nn.Module) -> Any:
    """Return the frozen linear inside a LoRA linear; a linear without an adapter is returned itself."""
    return layer.base_layer if isinstance(layer, LoraLayer) else layer


def compute_dtype_of(layer: nn.Module) -> torch.dtype | None:
    """Return the dtype of a linear's products; ``None`` if it is that of the input."""
    base = base_linear(layer)
    dtype: torch.dtype | None = base.compute_dtype if isinstance(base, bnb.nn.Linear4bit) else base.weight.dtype
    return dtype


def device_of_autocast(tensor: Tensor) -> str:
    """Return the type of a tensor's device; ``cpu`` for a meta tensor, since the meta device has no autocast."""
    return "cpu" if tensor.is_meta else tensor.device.type
