"""A LoRA linear over a frozen weight: products with the weight and with the adapter, as one autograd function."""
# mypy: allow-untyped-calls

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_FEW_ROWS = 16  # on a GPU bitsandbytes reads the packed weight itself, if that is quicker for so few on this card
TILE_BYTES = 8 << 20  # dense: what a product has just made is still in the CPU's cache, and the memory is used again
TILE_TOKENS = 8192  # that a gradient of A or B, and the MLP of a checkpointed layer, take at a time


# ---- the frozen weight ----------------------------------------------------------------------------------------------


def multiply_by_weight(weight: Any, left: Tensor, *, backward: bool = False, onto: Tensor | None = None) -> Tensor:
    """Compute ``(onto +) left Wᵀ``, or backward ``(onto +) left W``, of a frozen weight W ``(out, in)``.

    On a CPU a weight in 4 bits that is larger than :data:`TILE_BYTES` is made dense in tiles: of Llama-3.1-8B's widest
    linears the whole has 117 MB. The products are the same to the last bit, as each number comes from one tile.

    Args:
        weight: ``Params4bit``, or dense.
        left: ``(tokens, in)``, backward ``(tokens, out)``.
        backward: Whether to multiply by W, as the gradient of the input takes, rather than by its transpose.
        onto: As the result, in its dtype; the sum takes its place.
    """
    if not isinstance(weight, bnb.nn.Params4bit):
        return _multiply(left, weight.to(left.dtype), backward, onto)
    if left.is_cuda and not backward and len(left) <= _FEW_ROWS:
        product: Tensor = bnb.matmul_4bit(left, weight.data, weight.quant_state)
        return product if onto is None else onto.add_(product)
    if not _has_tiles(weight, left.dtype):
        return _multiply(left, dequantize_4bit(weight.data, weight.quant_state).to(left.dtype), backward, onto)
    output = left.new_empty(len(left), weight.quant_state.shape[int(backward)]) if onto is None else onto
    for columns, tile in _tiles(weight, int(backward), left.dtype):
        right, part = tile if backward else tile.t(), output[:, columns]
        if onto is None:
            torch.mm(left, right, out=part)
        else:
            part.addmm_(left, right)
    return output


def _multiply(left: Tensor, weight: Tensor, backward: bool, onto: Tensor | None) -> Tensor:
    right = weight if backward else weight.t()
    return left @ right if onto is None else onto.addmm_(left, right)


def _has_tiles(weight: Any, dtype: torch.dtype) -> bool:
    state = weight.quant_state
    is_large = state.shape.numel() * dtype.itemsize > TILE_BYTES  # first: to ask a Params4bit for more takes longer
    has_whole_blocks = is_large and state.shape[1] % state.blocksize == 0
    return bool(has_whole_blocks and weight.device.type == "cpu" and weight.dtype == torch.uint8)


def _tiles(weight: Any, dim: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the weight dense in strips of rows (``dim`` 0) or columns (1), and where each is."""
    state = weight.quant_state
    # double quantization keeps the blocks' scales in 8 bits
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    scales = scales.view(state.shape[0], -1)
    packed = weight.data.view(state.shape[0], -1)  # two numbers a byte
    count = math.ceil(state.shape.numel() * dtype.itemsize / TILE_BYTES)
    width = math.ceil(state.shape[dim] / count / state.blocksize) * state.blocksize
    per_byte, per_scale = (1, 1) if dim == 0 else (2, state.blocksize)
    for start in range(0, state.shape[dim], width):
        length = min(width, state.shape[dim] - start)
        strip = packed.narrow(dim, start // per_byte, length // per_byte).contiguous()
        of_strip = QuantState(
            scales.narrow(dim, start // per_scale, length // per_scale).contiguous(),
            torch.Size((length, state.shape[1]) if dim == 0 else (state.shape[0], length)),
            state.code,
            state.blocksize,
            state.quant_type,
            state.dtype,
        )
        yield slice(start, start + length), dequantize_4bit(strip.view(-1, 1), of_strip).to(dtype)


# ---- the adapter ----------------------------------------------------------------------------------------------------


class FrozenLinear(NamedTuple):
    """What of a linear does not train, and its adapter in the dtype of the products if it was cast before.

    Attributes:
        weight: ``(out, in)``, ``Params4bit`` or dense.
        bias: ``(out,)``, or none.
        scaling: Factor on the adapter's part.
        cast_a: A, together with those of the linears that share its input.
        cast_b: B.
    """

    weight: Any
    bias: Tensor | None
    scaling: float
    cast_a: Tensor | None = None
    cast_b: Tensor | None = None


def lora_down(x: Tensor, all_a: Sequence[Tensor], linears: Sequence[FrozenLinear]) -> Tensor:
    """Compute ``x Aᵀ``, ``(tokens, sum of ranks)``, of ``(tokens, in)`` and A, ``(rank, in)`` each."""
    return x @ _stack(all_a, linears, x.dtype).t()


def _stack(all_a: Sequence[Tensor], linears: Sequence[FrozenLinear], dtype: torch.dtype) -> Tensor:
    for linear in linears:
        if linear.cast_a is not None:
            return linear.cast_a
    stacked = all_a[0] if len(all_a) == 1 else torch.cat(list(all_a))
    return stacked.to(dtype)


def project(
    x: Tensor, xa: Tensor | None, lora_b: Tensor | None, linear: FrozenLinear, residual: Tensor | None = None
) -> Tensor:
    """Compute ``(residual +) x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ``; all in x's dtype.

    Args:
        x: ``(tokens, in)``.
        xa: ``x Aᵀ``, ``(tokens, rank)``.
        lora_b: ``(out, rank)``; ``None`` without an adapter.
        linear: Its frozen part.
        residual: ``(…, out)``, as many rows; left as it is.
    """
    b = None if lora_b is None else _cast_b(lora_b, linear, x.dtype)
    xa = None if b is None else xa
    residual = None if residual is None else residual.reshape(len(x), -1)
    output = None
    if xa is not None and b is not None:
        # First the adapter's product: beta is 0, so that no sum has to be read.
        output = _scaled_product(xa, b.t(), linear.scaling)
    output = multiply_by_weight(linear.weight, x, onto=output)
    if linear.bias is not None:
        output.add_(linear.bias)
    # last the residual: its numbers are larger, and each sum with them is rounded as they are
    return output if residual is None else output.add_(residual)


def _cast_b(lora_b: Tensor, linear: FrozenLinear, dtype: torch.dtype) -> Tensor:
    return lora_b.to(dtype) if linear.cast_b is None else linear.cast_b


def gradient_of_input(
    grads: Sequence[Tensor], linears: Sequence[FrozenLinear], grad_xa: Tensor | None, all_a: Sequence[Tensor]
) -> Tensor:
    """Compute the gradient of the input that linears share, ``(tokens, in)``: ``Σ g W + g' A``.

    Args:
        grads: Of the outputs, ``(tokens, out)`` each; at least one.
        linears: Their frozen parts.
        grad_xa: Of the products with A, ``(tokens, sum of ranks)``.
        all_a: Of the adapters, ``(rank, in)`` each.
    """
    a = _stack(all_a, linears, grads[0].dtype) if all_a else None
    grad_x = None if grad_xa is None or a is None else grad_xa @ a
    for grad, each in zip(grads, linears, strict=True):
        grad_x = multiply_by_weight(each.weight, grad, backward=True, onto=grad_x)
    assert grad_x is not None, "grads has at least one"
    return grad_x


def gradient_of_a(grad_xa: Tensor, x: Tensor) -> Tensor:
    """Compute the gradient of A, ``(rank, in)``, from that of ``x Aᵀ``; in x's dtype or in float32."""
    return _master_gradient(grad_xa.t(), x)


def gradients_of_b(
    grad: Tensor, xa: Tensor, lora_b: Tensor, linear: FrozenLinear, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of ``x Aᵀ``, ``(tokens, rank)``, and of B, ``(out, rank)``: those that are needed."""
    grad_xa = grad_b = None
    if needed[0]:
        grad_xa = _scaled_product(grad, _cast_b(lora_b, linear, grad.dtype), linear.scaling)
    if needed[1] and sums_in_float32(grad):
        grad_b = _master_gradient(grad.t(), xa, linear.scaling)
    elif needed[1]:
        # As (x Aᵀ)ᵀ grad, and then transposed: with the wide side last the product is quicker.
        grad_b = _master_gradient(xa.t(), grad, linear.scaling).t().to(lora_b.dtype)
    return grad_xa, grad_b


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)


def _master_gradient(a: Tensor, b: Tensor, scaling: float = 1.0) -> Tensor:
    """Compute ``scaling · a b``; on a GPU in float32, in which it is summed up there.

    More than :data:`TILE_TOKENS` are added up in float32 tile by tile, as where only a tile of the factors exists.
    """
    if len(b) > TILE_TOKENS:
        tiles = zip(a.split(TILE_TOKENS, 1), b.split(TILE_TOKENS), strict=True)
        first, *others = (_master_gradient(*tile, scaling) for tile in tiles)
        return functools.reduce(Tensor.add_, others, first.float())
    if sums_in_float32(a):
        nothing = a.new_empty((), dtype=torch.float32)
        return torch.addmm(nothing, a, b, beta=0, alpha=scaling, out_dtype=torch.float32)
    return a @ b if scaling == 1.0 else _scaled_product(a, b, scaling)


def sums_in_float32(tensor: Tensor) -> bool:
    """Whether a product of 16-bit numbers can be had in the float32 in which it is summed up: on a GPU."""
    return tensor.is_cuda and tensor.dtype.itemsize == 2


# ---- both -----------------------------------------------------------------------------------------------------------


class LoRALinearFunction(torch.autograd.Function):
    """Compute ``y = (residual +) x Wᵀ + bias + scaling (x Aᵀ) Bᵀ``, keeping only ``x`` and ``x Aᵀ`` for backward.

    A and B are float32 masters, used in x's dtype (Hu et al. 2021, LoRA; Dettmers et al. 2023, QLoRA). W and bias are
    frozen and get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, linear: FrozenLinear, residual: Tensor | None
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        xa = None if lora_a is None else lora_down(flat, [lora_a], [linear])  # (tokens, rank)
        output = project(flat, xa, lora_b, linear, residual)
        ctx.save_for_backward(None if lora_a is None else flat, xa, lora_a, lora_b)
        ctx.linear, ctx.shape = linear, x.shape
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, xa, lora_a, lora_b = ctx.saved_tensors
        needs_x, needs_a, needs_b, _, needs_residual = ctx.needs_input_grad
        of_output = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        grad_xa = grad_x = grad_a = grad_b = None
        if lora_a is not None:
            grad_xa, grad_b = gradients_of_b(of_output, xa, lora_b, ctx.linear, (needs_x or needs_a, needs_b))
        if needs_a and grad_xa is not None:
            grad_a = gradient_of_a(grad_xa, flat).to(lora_a.dtype)
        if needs_x:
            all_a = [] if lora_a is None else [lora_a]
            grad_x = gradient_of_input([of_output], [ctx.linear], grad_xa, all_a).view(ctx.shape)
        return grad_x, grad_a, grad_b, None, grad if needs_residual else None


class _Fused(nn.Module):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(…, in)`` to ``(…, out)``; whatever is not plain LoRA goes PEFT's own way."""
        if args or kwargs or self.disable_adapters or not (runs_fused(self) and is_plain_lora(self)):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        device = device_of_autocast(x)
        autocasts = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocasts else compute_dtype_of(self) or x.dtype
        with torch.autocast(device, enabled=False):
            output = LoRALinearFunction.apply(x.to(dtype), *adapters_of(self), frozen_linear(self, dtype), None)
        return output if autocasts else output.to(x.dtype)


class FusedLinear4bit(_Fused, PeftLinear4bit):  # type: ignore[misc]  # PEFT ships no types
    """PEFT's LoRA over a 4-bit linear with a fused forward; saving, merging and disabling stay PEFT's."""


class FusedLinear(_Fused, PeftLinear):  # type: ignore[misc]  # PEFT ships no types
    """The same over a linear that is not quantized."""


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks or a forward of its own."""
    own = module.__dict__  # torch has no public way to ask
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own


def is_plain_lora(layer: Any) -> bool:
    """Whether a linear is frozen, with at most one active, unmerged, unwatched adapter: no dropout, bias or variant."""
    if type(layer) not in (FusedLinear4bit, FusedLinear):
        return _is_frozen(layer)
    if "forward" in vars(layer) or len(layer.active_adapters) != 1 or layer.merged or not _is_frozen(layer.base_layer):
        return False
    parts = layer.__dict__["_modules"].values()
    if any(has_hooks(part) or any(map(has_hooks, part.__dict__["_modules"].values())) for part in parts):
        return False
    (adapter,) = layer.active_adapters
    if adapter not in layer.lora_A:  # it leaves this linear as it is
        return True
    matrices, dropout = (layer.lora_A[adapter], layer.lora_B[adapter]), layer.lora_dropout[adapter]
    return (
        all(type(each) is nn.Linear and each.bias is None for each in matrices)
        and adapter not in layer.lora_variant
        and (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training))
    )


def _is_frozen(linear: Any) -> bool:
    if type(linear) not in (nn.Linear, bnb.nn.Linear4bit) or "forward" in vars(linear):
        return False
    return not (linear.weight.requires_grad or (linear.bias is not None and linear.bias.requires_grad))


def runs_fused(layer: nn.Module) -> bool:
    """Whether a layer was chosen to run fused in its mode; see :mod:`qlora_lightning.model.layers.fuse`."""
    chosen: dict[bool, bool] = layer.__dict__.get("_runs_fused", {})
    return chosen.get(layer.training, False) and not torch.compiler.is_compiling()


def device_of_autocast(tensor: Tensor) -> str:
    """Return the type of a tensor's device; of one without numbers the CPU, since the meta device has no autocast."""
    return "cpu" if tensor.is_meta else tensor.device.type


def compute_dtype_of(layer: nn.Module) -> torch.dtype | None:
    """Return the dtype of a linear's products; ``None`` if it is that of the input."""
    base = _base_of(layer)
    return base.compute_dtype if isinstance(base, bnb.nn.Linear4bit) else base.weight.dtype  # type: ignore[no-any-return]


def adapters_of(layer: nn.Module) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return A ``(rank, in)`` and B ``(out, rank)`` of a plain linear, if it has an adapter that is not disabled."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.active_adapters[0] not in layer.lora_A:
        return None, None
    (adapter,) = layer.active_adapters
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def frozen_linear(layer: nn.Module, dtype: torch.dtype, casts: Mapping[Tensor, Tensor] | None = None) -> FrozenLinear:
    """Return what of a plain linear does not train, the bias in ``dtype``, and what ``casts`` has of its adapter."""
    base = _base_of(layer)
    bias = None if base.bias is None else base.bias.to(dtype)
    scaling = layer.scaling.get(layer.active_adapters[0], 1.0) if isinstance(layer, LoraLayer) else 1.0
    cast_a, cast_b = (None if each is None or casts is None else casts.get(each) for each in adapters_of(layer))
    return FrozenLinear(base.weight, bias, scaling, cast_a, cast_b)


def _base_of(layer: nn.Module) -> Any:
    return layer.base_layer if isinstance(layer, LoraLayer) else layer
