"""A LoRA linear over a frozen weight: its products with weight and adapter are one autograd function."""
# mypy: allow-untyped-calls

import copy
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Self, cast

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_lightning.model.layers.elementwise import has_kernel

_FEW_ROWS = 64  # up to this many, on a GPU, bitsandbytes decides whether to multiply by the packed or a dense weight
_INT8_LIMIT = 65_280  # the largest number that both bfloat16 and float16 can hold


class LoRALinear(NamedTuple):
    """A linear of a group.

    Attributes:
        base: The frozen linear. If the base is sharded, its weights are present only while its layer runs.
        scaling: Factor on the adapter's part.
        lora_B: ``(out, rank)``, in the dtype of the products; ``None`` without an adapter.
    """

    base: Any
    scaling: float
    lora_B: Tensor | None


class LinearGroup(NamedTuple):
    """Linears that share their input; their A matrices are multiplied as one.

    Attributes:
        linears: The linears, each with its B.
        ranks: The rank of each linear's adapter, 0 without one.
        lora_A: A of all linears, ``(sum of ranks, in)``, in the dtype of the products; ``None`` without adapters.
        adapters: The trained float32 A and B of each linear in turn, as inputs of the autograd functions.
    """

    linears: tuple[LoRALinear, ...]
    ranks: list[int]
    lora_A: Tensor | None
    adapters: tuple[Tensor | None, ...]


# ---- products -------------------------------------------------------------------------------------------------------


def apply_A(x: Tensor, group: LinearGroup) -> Tensor | None:
    """Compute all ``x Aᵀ`` of a group, ``(n_tokens, sum of ranks)``, from the input ``(n_tokens, in)``."""
    return None if group.lora_A is None else x @ group.lora_A.t()


def apply_linears(x: Tensor, xa: Tensor | None, group: LinearGroup) -> list[Tensor]:
    """Compute the outputs of a group's linears; see :func:`apply_linear`."""
    all_xa = [None] * len(group.linears) if xa is None else xa.split_with_sizes(group.ranks, 1)
    return [apply_linear(x, xa, linear) for xa, linear in zip(all_xa, group.linears, strict=True)]


def apply_linear(x: Tensor, xa: Tensor | None, linear: LoRALinear, residual: Tensor | None = None) -> Tensor:
    """Compute ``(residual +) x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ``, ``(n_tokens, out)``, all in x's dtype.

    x is ``(n_tokens, in)`` and ``xa`` is ``x Aᵀ``, ``(n_tokens, rank)``. The residual is not modified.
    """
    output, product = None, None
    if xa is not None and linear.lora_B is not None:
        # the adapter's product comes first: with beta = 0, it does not have to read a sum
        output = _product(xa, linear.lora_B.t(), linear.scaling)
    weight, bias = linear.base.weight, linear.base.bias
    if isinstance(linear.base, bnb.nn.Linear8bitLt):
        product, bias = int8_product(x, linear.base), None
    elif x.is_cuda and x.shape[0] <= _FEW_ROWS and isinstance(weight, bnb.nn.Params4bit):
        product = bnb.matmul_4bit(x, weight.data, weight.quant_state)
    if product is not None:
        output = product if output is None else output.add_(product)
    else:
        dense = _dense(linear.base, x.dtype)
        output = x @ dense.t() if output is None else output.addmm_(x, dense.t())
    if bias is not None:
        output.add_(bias.to(x.dtype))
    # the residual comes last: its values are larger, so sums with it are rounded more coarsely
    return output if residual is None else output.add_(residual)


def input_gradient(grads: Sequence[Tensor], grad_xa: Tensor | None, group: LinearGroup) -> Tensor:
    """Compute the gradient ``Σ grad W + grad_xa A`` of the linears' shared input, ``(n_tokens, in)``.

    ``grads`` are those of the outputs, ``(n_tokens, out)`` each. ``grad_xa`` is that of all ``x Aᵀ``, ``(n_tokens,
    sum of ranks)``.
    """
    grad_x = None if grad_xa is None or group.lora_A is None else grad_xa @ group.lora_A
    for grad, linear in zip(grads, group.linears, strict=True):
        weight = _dense(linear.base, grad.dtype)
        grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
        del weight  # before the next one is allocated
    assert grad_x is not None, "there is a linear"
    return grad_x


def gradients_of_B(
    grads: Sequence[Tensor], xa: Tensor | None, group: LinearGroup
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Compute the gradient of all ``x Aᵀ``, ``(n_tokens, sum of ranks)``, and of each B, from those of the outputs."""
    if xa is None:
        return None, [None] * len(grads)
    grad_xa, grads_B = torch.empty_like(xa), list[Tensor | None]()
    slices = zip(xa.split_with_sizes(group.ranks, 1), grad_xa.split_with_sizes(group.ranks, 1), strict=True)
    for grad, linear, (xa_slice, grad_slice) in zip(grads, group.linears, slices, strict=True):
        if linear.lora_B is None:
            grads_B.append(None)
            continue
        _product(grad, linear.lora_B, linear.scaling, out=grad_slice)
        grads_B.append(master_gradient(grad.t(), xa_slice, linear.scaling))
    return grad_xa, grads_B


def gradients_of_A(grad_xa: Tensor | None, x: Tensor, group: LinearGroup) -> list[Tensor | None]:
    """Compute the gradient of each A, ``(rank, in)``, from the gradient of all ``x Aᵀ``."""
    if grad_xa is None:
        return [None] * len(group.linears)
    grads = master_gradient(grad_xa.t(), x).split_with_sizes(group.ranks)
    return [grad if rank else None for grad, rank in zip(grads, group.ranks, strict=True)]


def _dense(linear: Any, dtype: torch.dtype) -> Tensor:
    """Return a frozen linear's weight ``(out, in)`` in a dtype."""
    if isinstance(linear, bnb.nn.Linear8bitLt):
        scales = linear.state.SCB.unsqueeze(1).mul(1 / 127)
        return cast(Tensor, linear.state.CB.to(dtype, copy=True).mul_(scales))
    weight = linear.weight
    dense = dequantize(weight.data, weight.quant_state) if isinstance(weight, bnb.nn.Params4bit) else weight.data
    return cast(Tensor, dense.to(dtype))


def int8_product(x: Tensor, linear: Any) -> Tensor:
    """Compute ``x Wᵀ + bias`` of an int8 linear with bitsandbytes (Dettmers et al. 2022, LLM.int8)."""
    if not linear.state.threshold:  # else inputs above the threshold are outliers, which are not cast to float16
        x = x.clamp(-_INT8_LIMIT, _INT8_LIMIT)
    return cast(Tensor, bnb.nn.Linear8bitLt.forward(linear, x))


@has_kernel
def dequantize(packed: Tensor, quant_state: Any) -> Tensor:
    """Return the dense weight of packed bytes, ``(out, in)``."""
    # as one row: on CPUs with AVX-512, bitsandbytes 0.50 uses wrong scales for some rows, for example of 96 weights
    as_row = copy.copy(quant_state)
    as_row.shape = torch.Size((1, quant_state.shape.numel()))
    return cast(Tensor, dequantize_4bit(packed, as_row)).view(quant_state.shape)


def _product(mat1: Tensor, mat2: Tensor, scaling: float, out: Tensor | None = None) -> Tensor:
    """Compute ``scaling · mat1 mat2`` in one operation."""
    return torch.addmm(_unread(mat1.dtype, mat1.device), mat1, mat2, beta=0, alpha=scaling, out=out)


def master_gradient(mat1: Tensor, mat2: Tensor, scaling: float = 1.0) -> Tensor:
    """Compute the gradient ``scaling · mat1 mat2`` of a float32 A or B; a GPU sums in float32 without rounding."""
    if mat1.is_cuda and mat1.dtype.itemsize == 2:
        unread = _unread(torch.float32, mat1.device)
        return torch.addmm(unread, mat1, mat2, beta=0, alpha=scaling, out_dtype=torch.float32)
    return _product(mat1, mat2, scaling).float()


@functools.cache
def _unread(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number that a product with beta = 0 requires as an argument but does not read."""
    return torch.empty((), dtype=dtype, device=device)


class LoRALinearFunction(torch.autograd.Function):
    """Compute ``y = (residual +) x Wᵀ + bias + scaling (x Aᵀ) Bᵀ``, saving only ``x`` and ``x Aᵀ`` for backward.

    A and B are float32 master weights, cast to x's dtype (Hu et al. 2021, LoRA; Dettmers et al. 2023, QLoRA). W and
    bias are frozen and get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: LinearGroup, residual: Tensor | None, *adapters: Tensor | None) -> Tensor:
        """Compute ``(n_tokens, out)`` from x, ``(n_tokens, in)``, for a group of one linear."""
        xa = apply_A(x, group)
        ctx.save_for_backward(None if xa is None else x, xa)
        ctx.group = group
        return apply_linear(x, xa, group.linears[0], residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, xa = ctx.saved_tensors
        grad_xa, (grad_B,) = gradients_of_B([grad_output], xa, ctx.group)
        (grad_A,) = gradients_of_A(grad_xa, x, ctx.group)
        grad_x = input_gradient([grad_output], grad_xa, ctx.group) if ctx.needs_input_grad[0] else None
        return grad_x, None, grad_output if ctx.needs_input_grad[2] else None, grad_A, grad_B


# ---- the modules ----------------------------------------------------------------------------------------------------


class Fused(nn.Module):
    """A library's layer with our fused forward in front of its own.

    Attributes:
        fallback_reason: Why the layer runs as the library wrote it; ``None`` if it runs fused. See
            :func:`~qlora_lightning.model.layers.select.choose_layers`.
    """

    fallback_reason: str | None = "it has not been chosen yet"

    @classmethod
    def from_layer(cls, layer: nn.Module) -> Self:
        """Build a fused layer that shares all submodules and parameters of a layer, under the same names.

        Its class is a subclass of the layer's class with the same name, because transformers and PEFT find their layers
        by class and name.
        """
        classes: tuple[Any, Any] = cls, type(layer)
        fused = object.__new__(_fused_class(*classes))
        vars(fused).update(vars(layer))
        return cast(Self, fused)

    def to_layer(self) -> nn.Module:
        """Build the library's layer again, sharing everything with this one: the inverse of :meth:`from_layer`."""
        _, layer_class = type(self).__bases__
        layer: nn.Module = object.__new__(layer_class)
        vars(layer).update({name: value for name, value in vars(self).items() if name != "fallback_reason"})
        return layer


@functools.cache
def _fused_class(fused: Any, layer_class: Any) -> Any:
    return type(layer_class.__name__, (fused, layer_class), {"__module__": fused.__module__})


class FusedLoRA(Fused):
    """PEFT's LoRA over a frozen linear, dense or in 4 or 8 bits; PEFT still saves, merges and switches adapters."""

    active_adapters: list[str]

    def computes_fused(self) -> bool:
        """Whether the fused forward gives the layer's current output; PEFT may switch adapters at any time."""
        is_plain_sum = self.disable_adapters or len(self.active_adapters) == 1
        return self.fallback_reason is None and not self.merged and bool(is_plain_sum)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(…, in)`` to ``(…, out)``; anything but plain LoRA runs PEFT's own forward."""
        if args or kwargs or self.disable_adapters or not self.computes_fused():
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        device = device_of_autocast(x)
        autocasts = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocasts else compute_dtype_of(self) or x.dtype
        with torch.autocast(device, enabled=False):
            rows = x.to(dtype).reshape(-1, x.shape[-1])
            copies: list[tuple[Tensor, Tensor]] = []
            group = linear_group([self], dtype, copies)
            copy_all(copies)
            output = LoRALinearFunction.apply(rows, group, None, *group.adapters)
        output = output.view(*x.shape[:-1], output.shape[-1])  # outside the function: a model may write into it
        return output if autocasts else output.to(x.dtype)


class _Int8Product(torch.autograd.Function):
    """Compute :func:`int8_product` for a frozen weight, and keep nothing for backward.

    bitsandbytes keeps the input, which only a trained weight needs, out of sight of activation checkpointing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Any) -> Tensor:
        ctx.linear, ctx.dtype = linear, x.dtype
        return int8_product(x, linear)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype) @ _dense(ctx.linear, ctx.dtype), None


class FusedInt8Linear(Fused):
    """A frozen int8 linear of bitsandbytes that keeps no input for backward."""

    fallback_reason = None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(…, in)`` to ``(…, out)``."""
        linear: Any = self
        trains = any(param is not None and param.requires_grad for param in (linear.weight, linear.bias))
        if self.fallback_reason is not None or trains:
            return cast(Tensor, super().forward(x))
        return cast(Tensor, _Int8Product.apply(x, self))


def linear_group(layers: Sequence[Any], dtype: torch.dtype, copies: list[tuple[Tensor, Tensor]]) -> LinearGroup:
    """Group linears that share their input, and allocate their adapters in a dtype.

    Adds a pair to ``copies`` for each A and B, for :func:`copy_all`: the tensor to cast into, and the A or B itself.
    """
    adapters = [active_lora(layer) for layer in layers]
    ranks = [0 if lora_A is None else lora_A.shape[0] for lora_A, _ in adapters]
    all_A = [lora_A for lora_A, _ in adapters if lora_A is not None]
    cast_A = None
    if all_A:
        cast_A = torch.empty(sum(ranks), all_A[0].shape[1], dtype=dtype, device=all_A[0].device)
        copies += zip(cast_A.split_with_sizes([rank for rank in ranks if rank]), all_A, strict=True)
    linears = []
    for layer, (_, lora_B) in zip(layers, adapters, strict=True):
        scaling, cast_B = 1.0, None
        if lora_B is not None:
            scaling, cast_B = layer.scaling[layer.active_adapters[0]], torch.empty_like(lora_B, dtype=dtype)
            copies.append((cast_B, lora_B))
        linears.append(LoRALinear(base_linear(layer), scaling, cast_B))
    return LinearGroup(tuple(linears), ranks, cast_A, tuple(itertools.chain.from_iterable(adapters)))


@torch.no_grad()
def copy_all(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair into the first; on a GPU, this is a few launches."""
    if copies:
        targets, sources = zip(*copies, strict=True)
        torch._foreach_copy_(targets, sources)


def active_lora(layer: nn.Module) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return A ``(rank, in)`` and B ``(out, rank)`` of a linear's active adapter, if it has one."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters:
        return None, None
    adapter, all_A = layer.active_adapters[0], layer.lora_A
    return (all_A[adapter].weight, layer.lora_B[adapter].weight) if adapter in all_A else (None, None)


def base_linear(layer: nn.Module) -> Any:
    """Return the frozen linear inside a LoRA linear; a linear without an adapter is returned itself."""
    return layer.base_layer if isinstance(layer, LoraLayer) else layer


def compute_dtype_of(layer: nn.Module) -> torch.dtype | None:
    """Return the dtype of a linear's products; ``None`` if it follows the input."""
    base = base_linear(layer)
    if isinstance(base, bnb.nn.Linear8bitLt):
        return None
    dtype: torch.dtype | None = base.compute_dtype if isinstance(base, bnb.nn.Linear4bit) else base.weight.dtype
    return dtype


def device_of_autocast(tensor: Tensor) -> str:
    """Return the type of a tensor's device; ``cpu`` for a meta tensor, since the meta device has no autocast."""
    return "cpu" if tensor.is_meta else tensor.device.type
