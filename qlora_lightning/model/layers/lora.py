"""A LoRA linear over a frozen weight: products with the weight and with the adapter, as one autograd function."""
# mypy: allow-untyped-calls

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_lightning.model.kernels import products

_FEW_ROWS = 16  # on a GPU bitsandbytes reads the packed weight itself, if that is quicker for so few on this card
TILE_BYTES = 8 << 20  # dense: what a product has just made is still in the CPU's cache, and the memory is used again


# ---- the frozen weight ----------------------------------------------------------------------------------------------


def multiply_by_weight(weight: Any, left: Tensor, *, turned: bool = False, onto: Tensor | None = None) -> Tensor:
    """Compute ``(onto +) left Wᵀ``, or turned ``(onto +) left W``, of a weight W ``(out, in)`` that does not train.

    On a CPU the dense form of one in 4 bits is never there as a whole if it is larger than :data:`TILE_BYTES`: of
    Llama-3.1-8B's widest linears it has 117 MB. The products are the same to the last bit, as each of their numbers
    comes from one tile.

    Args:
        weight: ``Params4bit``, or dense.
        left: ``(tokens, in)``, turned ``(tokens, out)``.
        turned: Whether to multiply by W rather than by its transpose, as the gradient of the input takes.
        onto: As the result, in its dtype; the sum takes its place.
    """
    if left.is_cuda and not turned and len(left) <= _FEW_ROWS and _is_quantized(weight):
        product: Tensor = bnb.matmul_4bit(left, weight.data, weight.quant_state)
        return product if onto is None else onto.add_(product)
    if not _has_tiles(weight, left.dtype):
        dense = dequantize_4bit(weight.data, weight.quant_state) if _is_quantized(weight) else weight
        right = dense.to(left.dtype) if turned else dense.to(left.dtype).t()
        return left @ right if onto is None else onto.addmm_(left, right)
    output = left.new_empty(len(left), weight.quant_state.shape[int(turned)]) if onto is None else onto
    for columns, tile in _tiles(weight, int(turned), left.dtype):
        right, part = tile if turned else tile.t(), output[:, columns]
        if onto is None:
            torch.mm(left, right, out=part)
        else:
            part.addmm_(left, right)
    return output


def _is_quantized(weight: Any) -> bool:
    return isinstance(weight, bnb.nn.Params4bit)


def _has_tiles(weight: Any, dtype: torch.dtype) -> bool:
    if not _is_quantized(weight):
        return False
    state = weight.quant_state
    is_large = state.shape.numel() * dtype.itemsize > TILE_BYTES  # first: to ask a Params4bit for more takes longer
    has_whole_blocks = is_large and state.shape[1] % state.blocksize == 0
    return bool(has_whole_blocks and weight.device.type == "cpu" and weight.dtype == torch.uint8)


def _tiles(weight: Any, dim: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Give the weight dense in strips of rows (``dim`` 0) or columns (1), and where each is."""
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


class Casts:
    """A's and B's in the dtype of the products: all of them cast at once before a pass, others when asked for.

    They train in float32. On a GPU each cast is a launch, and a layer has fourteen of them.
    """

    def __init__(self, groups: Iterable[Sequence[Tensor]] = (), dtype: torch.dtype = torch.float32) -> None:
        """Cast groups of tensors that are asked for together, to be stacked, in one operation."""
        self._made: dict[tuple[Any, ...], Tensor] = {}
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for group in groups:
            stacked = group[0].new_empty(sum(map(len, group)), group[0].shape[1], dtype=dtype)
            targets += torch.split(stacked, [len(each) for each in group])
            sources += (each.detach() for each in group)
            self._made[dtype, *map(_place_of, group)] = stacked
        if targets:
            torch._foreach_copy_(targets, sources)

    def __call__(self, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        """Give some tensors, stacked, in a dtype."""
        made = self._made.get((dtype, *map(_place_of, tensors))) if self._made else None
        return stack(tensors).to(dtype) if made is None else made


def _place_of(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor's numbers are; what autograd saves is another object with the same."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Put matrices of one width under each other."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


_WHEN_ASKED = Casts()


class Frozen(NamedTuple):
    """What of a linear does not train.

    Attributes:
        weight: ``(out, in)``, ``Params4bit`` or dense.
        bias: ``(out,)``, or none.
        scaling: Factor on the adapter's part.
        casts: Of A and B, which train.
    """

    weight: Any
    bias: Tensor | None
    scaling: float
    casts: Casts = _WHEN_ASKED


def narrow(x: Tensor, all_a: Sequence[Tensor], casts: Casts = _WHEN_ASKED) -> Tensor:
    """Give ``x Aᵀ``, ``(tokens, sum of ranks)``, of ``(tokens, in)`` and A, ``(rank, in)`` each."""
    return x @ casts(x.dtype, *all_a).t()


def project(
    x: Tensor, low: Tensor | None, lora_b: Tensor | None, frozen: Frozen, residual: Tensor | None = None
) -> Tensor:
    """Compute ``(residual +) x Wᵀ + bias + scaling · low Bᵀ``; all in x's dtype.

    Args:
        x: ``(tokens, in)``.
        low: ``x Aᵀ``, ``(tokens, rank)``.
        lora_b: ``(out, rank)``; ``None`` without an adapter.
        frozen: Of the linear.
        residual: ``(…, out)``, as many rows; left as it is.
    """
    b = None if lora_b is None else frozen.casts(x.dtype, lora_b)
    low = None if b is None else low
    residual = None if residual is None else residual.reshape(len(x), -1)
    fits = residual is None or (residual.dtype == x.dtype and residual.is_contiguous())
    if fits and _sums_up_once([x], [frozen], low, turned=False):
        return products.multiply([x], [frozen.weight], False, low, b, frozen.scaling, frozen.bias, residual)
    output = None
    if low is not None and b is not None:
        # First the thin product, which so has no numbers to read but its own.
        output = _scaled_product(low, b.t(), frozen.scaling)
    output = multiply_by_weight(frozen.weight, x, onto=output)
    if frozen.bias is not None:
        output.add_(frozen.bias)
    # Last the residual: its numbers are larger, and each sum with them is rounded as they are.
    return output if residual is None else output.add_(residual)


def project_back(
    grads: Sequence[Tensor], frozen: Sequence[Frozen], grad_low: Tensor | None, all_a: Sequence[Tensor]
) -> Tensor:
    """Give the gradient of the input that linears share, ``(tokens, in)``: ``Σ g W + g' A``.

    Args:
        grads: Of the outputs, ``(tokens, out)`` each; at least one.
        frozen: Of the linears.
        grad_low: Of the products with A, ``(tokens, sum of ranks)``.
        all_a: Of the adapters, ``(rank, in)`` each.
    """
    a = frozen[0].casts(grads[0].dtype, *all_a) if all_a else None
    if _sums_up_once(grads, frozen, grad_low, turned=True):
        return products.multiply(grads, [each.weight for each in frozen], True, grad_low, a)
    grad_x = None if grad_low is None or a is None else grad_low @ a
    for grad, each in zip(grads, frozen, strict=True):
        grad_x = multiply_by_weight(each.weight, grad, turned=True, onto=grad_x)
    assert grad_x is not None, "grads has at least one"
    return grad_x


def _sums_up_once(lefts: Sequence[Tensor], frozen: Sequence[Frozen], low: Tensor | None, *, turned: bool) -> bool:
    """Whether the C++ loops have a product that is summed up in float32 as a whole."""
    has_pairs = low is None or (low.shape[1] % 2 == 0 and low.stride(1) == 1)
    return has_pairs and all(
        products.can_multiply(each.weight, left, turned=turned) for each, left in zip(frozen, lefts, strict=True)
    )


def gradient_of_a(grad_low: Tensor, x: Tensor) -> Tensor:
    """Give the gradient of A, ``(rank, in)``, from that of ``x Aᵀ``; in x's dtype or in float32."""
    return _master_gradient(grad_low.t(), x)


def gradients_of_b(
    grad: Tensor, low: Tensor, lora_b: Tensor, frozen: Frozen, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Give the gradients of ``low = x Aᵀ``, ``(tokens, rank)``, and of B, ``(out, rank)``: those that are needed."""
    of_low = of_b = None
    if needed[0]:
        of_low = _scaled_product(grad, frozen.casts(grad.dtype, lora_b), frozen.scaling)
    if needed[1] and sums_in_float32(grad):
        of_b = _master_gradient(grad.t(), low, frozen.scaling)
    elif needed[1]:
        # As low' grad, and then turned: with the wide side last the product is quicker.
        of_b = _master_gradient(low.t(), grad, frozen.scaling).t().to(lora_b.dtype)
    return of_low, of_b


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)


def _master_gradient(a: Tensor, b: Tensor, scaling: float = 1.0) -> Tensor:
    """Give ``scaling · a b``; on a GPU in float32, in which it is summed up there."""
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
        ctx: Any, x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, frozen: Frozen, residual: Tensor | None
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        low = None if lora_a is None else narrow(flat, [lora_a], frozen.casts)  # (tokens, rank)
        output = project(flat, low, lora_b, frozen, residual)
        ctx.save_for_backward(None if lora_a is None else flat, low, lora_a, lora_b)
        ctx.frozen, ctx.shape = frozen, x.shape
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, lora_a, lora_b = ctx.saved_tensors
        needs_x, needs_a, needs_b, _, needs_residual = ctx.needs_input_grad
        of_output = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        grad_low = grad_x = grad_a = grad_b = None
        if lora_a is not None:
            grad_low, grad_b = gradients_of_b(of_output, low, lora_b, ctx.frozen, (needs_x or needs_a, needs_b))
        if needs_a and grad_low is not None:
            grad_a = gradient_of_a(grad_low, flat).to(lora_a.dtype)
        if needs_x:
            all_a = [] if lora_a is None else [lora_a]
            grad_x = project_back([of_output], [ctx.frozen], grad_low, all_a).view(ctx.shape)
        return grad_x, grad_a, grad_b, None, grad if needs_residual else None


class _Fused(nn.Module):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(…, in)`` to ``(…, out)``; whatever is not plain LoRA goes PEFT's own way."""
        if args or kwargs or not (runs_fused(self) and _has_one_adapter(self)):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        device = device_of_autocast(x)
        autocasts = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocasts else compute_dtype_of(self) or x.dtype
        with torch.autocast(device, enabled=False):
            frozen = frozen_part(self, dtype)
            output = LoRALinearFunction.apply(x.to(dtype), *adapters_of(self), frozen, None)
        return output if autocasts else output.to(x.dtype)


class FusedLinear4bit(_Fused, PeftLinear4bit):  # type: ignore[misc]  # PEFT ships no types
    """PEFT's LoRA over a 4-bit linear with a fused forward; saving, merging and disabling stay PEFT's."""


class FusedLinear(_Fused, PeftLinear):  # type: ignore[misc]  # PEFT ships no types
    """The same over a linear that is not quantized."""


def _has_one_adapter(layer: Any) -> bool:
    """Whether one adapter acts beside the weight; PEFT switches, merges and disables adapters at any time."""
    return not (layer.disable_adapters or layer.merged) and len(layer.active_adapters) == 1


def runs_fused(layer: nn.Module) -> bool:
    """Whether a layer was chosen to run fused in its mode; see :mod:`qlora_lightning.model.layers.fusing`."""
    chosen: dict[bool, bool] = layer.__dict__.get("_runs_fused", {})
    return chosen.get(layer.training, False) and not torch.compiler.is_compiling()


def device_of_autocast(tensor: Tensor) -> str:
    """Return the type of a tensor's device; of one without numbers the CPU, since the meta device has no autocast."""
    return "cpu" if tensor.is_meta else tensor.device.type


def compute_dtype_of(layer: nn.Module) -> torch.dtype | None:
    """Give the dtype of a linear's products; ``None`` if it is that of the input."""
    base = _base_of(layer)
    dtype: torch.dtype | None = base.compute_dtype if isinstance(base, bnb.nn.Linear4bit) else base.weight.dtype
    return dtype


def adapters_of(layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Give A ``(rank, in)`` and B ``(out, rank)`` of a plain linear, if it has an adapter that is not disabled."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.active_adapters[0] not in layer.lora_A:
        return None, None
    (adapter,) = layer.active_adapters
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def frozen_part(layer: nn.Module, dtype: torch.dtype, casts: Casts | None = None) -> Frozen:
    """Give what of a plain linear does not train; the bias in ``dtype``."""
    base = _base_of(layer)
    bias = None if base.bias is None else base.bias.to(dtype)
    scaling = layer.scaling.get(layer.active_adapters[0], 1.0) if isinstance(layer, LoraLayer) else 1.0
    return Frozen(base.weight, bias, scaling, casts or _WHEN_ASKED)


def _base_of(layer: nn.Module) -> Any:
    return layer.base_layer if isinstance(layer, LoraLayer) else layer
