"""A LoRA linear over a frozen weight: products with the weight and with the adapter, as one autograd function."""

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

from qlora_lightning.model.kernels import products, thin

FEW_ROWS = 16  # on a GPU bitsandbytes reads the packed weight itself, if that is quicker for so few on this card
TILE_BYTES = 8 << 20  # dense: what a product has just made is still in the CPU's cache, and the memory is used again


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Run an autograd function."""
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


class FrozenWeight:
    """A weight W ``(out, in)`` that does not train.

    On a CPU the dense form of one in 4 bits is never there as a whole if it is larger than :data:`TILE_BYTES`: of
    Llama-3.1-8B's widest linears it has 117 MB. The products are the same to the last bit, as each of their numbers
    comes from one tile.
    """

    def __init__(self, stored: Any) -> None:
        """Wrap a parameter of a linear, ``Params4bit`` or plain."""
        self.stored = stored

    def multiply(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Compute ``(onto +) x Wᵀ``, ``(tokens, out)``.

        Args:
            x: ``(tokens, in)``.
            onto: ``(tokens, out)``, in x's dtype; the sum takes its place.
        """
        if x.is_cuda and len(x) <= FEW_ROWS and isinstance(self.stored, bnb.nn.Params4bit):
            product = bnb.matmul_4bit(x, self.stored.data, self.stored.quant_state)
            return product if onto is None else onto.add_(product)
        return self._multiply(x, 0, onto)

    def multiply_back(self, grad: Tensor, onto: Tensor | None = None) -> Tensor:
        """Compute ``(onto +) g W``, ``(tokens, in)``: the gradient of x from that of the output.

        Args:
            grad: ``(tokens, out)``.
            onto: ``(tokens, in)``, in the gradient's dtype; the sum takes its place.
        """
        return self._multiply(grad, 1, onto)

    def _multiply(self, left: Tensor, dim: int, onto: Tensor | None) -> Tensor:
        """Multiply by W so that the result is as wide as W's dimension ``dim``: by Wᵀ (0) or by W (1)."""
        if not self._has_tiles(left.dtype):
            right = _turn(self._make_dense(left.dtype), dim)
            return left @ right if onto is None else onto.addmm_(left, right)
        output = left.new_empty(len(left), self.stored.quant_state.shape[dim]) if onto is None else onto
        for columns, tile in self._tiles(dim, left.dtype):
            right, part = _turn(tile, dim), output[:, columns]
            if onto is None:
                torch.mm(left, right, out=part)
            else:
                part.addmm_(left, right)
        return output

    def _make_dense(self, dtype: torch.dtype) -> Tensor:
        weight = self.stored
        if isinstance(weight, bnb.nn.Params4bit):
            weight = dequantize_4bit(weight.data, weight.quant_state)
        made: Tensor = weight.to(dtype)
        return made

    def _has_tiles(self, dtype: torch.dtype) -> bool:
        weight = self.stored
        if not isinstance(weight, bnb.nn.Params4bit):
            return False
        state = weight.quant_state
        is_large = state.shape.numel() * dtype.itemsize > TILE_BYTES  # first: to ask a Params4bit for more takes longer
        return bool(
            is_large
            and state.shape[1] % state.blocksize == 0
            and weight.device.type == "cpu"
            and weight.dtype == torch.uint8
        )

    def _tiles(self, dim: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Give the weight dense in strips of rows (``dim`` 0) or columns (1), and where each lies."""
        state = self.stored.quant_state
        packed = self.stored.data.view(state.shape[0], -1)  # two numbers a byte
        scales = _scales(state).view(state.shape[0], -1)  # one for each block of numbers
        count = math.ceil(state.shape.numel() * dtype.itemsize / TILE_BYTES)
        width = math.ceil(state.shape[dim] / count / state.blocksize) * state.blocksize
        for start in range(0, state.shape[dim], width):
            length = min(width, state.shape[dim] - start)
            per_byte, per_scale = (1, 1) if dim == 0 else (2, state.blocksize)
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


def _turn(dense: Tensor, dim: int) -> Tensor:
    return dense.t() if dim == 0 else dense


def _scales(state: QuantState) -> Tensor:
    """Give the blocks' scales, which double quantization keeps in 8 bits."""
    scales: Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    return scales


class Casts:
    """A's and B's in the dtype of the products: cast when they are asked for, or all of them at once before a pass.

    They train in float32. On a GPU each cast is a launch, and a layer has fourteen of them.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def make(self, groups: Iterable[Sequence[Tensor]], dtype: torch.dtype) -> None:
        """Cast them, in one operation.

        Args:
            groups: Tensors that are asked for together, to be stacked.
            dtype: Of the copies.
        """
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
    """Say where a tensor's numbers are; what autograd saves is another object with the same."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Put matrices of one width under each other."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


_WHEN_ASKED = Casts()


class Frozen(NamedTuple):
    """What of a linear does not train.

    Attributes:
        weight: ``(out, in)``.
        bias: ``(out,)``, or none.
        scaling: Factor on the adapter's part.
        casts: Of A and B.
    """

    weight: FrozenWeight
    bias: Tensor | None
    scaling: float
    casts: Casts = _WHEN_ASKED


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
    weight, b = frozen.weight, None if lora_b is None else frozen.casts(x.dtype, lora_b)
    low = None if b is None else low
    residual = None if residual is None else residual.reshape(len(x), -1)
    if _sums_up_once([x], [weight], low, turned=False) and (residual is None or _is_like(residual, x)):
        return products.multiply([x], [weight.stored], False, low, b, frozen.scaling, frozen.bias, residual)
    output = None
    if low is not None and b is not None:
        # First the thin product, which so has no numbers to read but its own.
        output = _scaled_product(low, b.t(), frozen.scaling)
    output = weight.multiply(x, output)
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
    weights = [each.weight for each in frozen]
    a = frozen[0].casts(grads[0].dtype, *all_a) if all_a else None
    if _sums_up_once(grads, weights, grad_low, turned=True):
        return products.multiply(grads, [each.stored for each in weights], True, grad_low, a)
    grad_x = None if grad_low is None or a is None else grad_low @ a
    for grad, weight in zip(grads, weights, strict=True):
        grad_x = weight.multiply_back(grad, onto=grad_x)
    assert grad_x is not None, "grads has at least one"
    return grad_x


def _is_like(residual: Tensor, x: Tensor) -> bool:
    return residual.dtype == x.dtype and residual.is_contiguous()


def _sums_up_once(
    lefts: Sequence[Tensor], weights: Sequence[FrozenWeight], low: Tensor | None, *, turned: bool
) -> bool:
    """Whether the C++ loops have a product that is summed up in float32 as a whole."""
    has_pairs = low is None or (low.shape[1] % 2 == 0 and low.stride(1) == 1)
    return has_pairs and all(
        products.can_multiply(weight.stored, left, turned=turned) for weight, left in zip(weights, lefts, strict=True)
    )


def narrow(x: Tensor, all_a: Sequence[Tensor], casts: Casts = _WHEN_ASKED) -> Tensor:
    """Give ``x Aᵀ``, ``(tokens, sum of ranks)``, of ``(tokens, in)`` and A, ``(rank, in)`` each."""
    if _are_thin(x, all_a[0]) and all_a[0].shape[1] == x.shape[1]:
        return thin.narrow(x, stack(all_a))
    return x @ casts(x.dtype, *all_a).t()


def gradient_of_a(grad_low: Tensor, x: Tensor) -> Tensor:
    """Give the gradient of A, ``(rank, in)``, from that of ``x Aᵀ``; in x's dtype or in float32."""
    return thin.partner(x, grad_low) if _are_thin(x) else _master_gradient(grad_low.t(), x)


def gradients_of_b(
    grad: Tensor, low: Tensor, lora_b: Tensor, frozen: Frozen, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Give the gradients of ``low = x Aᵀ``, ``(tokens, rank)``, and of B, ``(out, rank)``: those that are needed.

    Args:
        grad: Of the output, ``(tokens, out)``.
        low: ``(tokens, rank)``.
        lora_b: ``(out, rank)``.
        frozen: Of the linear.
        needed: Which of the two.
    """
    of_low = of_b = None
    if all(needed) and _are_thin(grad, lora_b):
        of_low, turned = thin.narrow_and_partner(grad, lora_b.t(), low, frozen.scaling)
        return of_low, turned.t()
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


def _are_thin(wide: Tensor, matrix: Tensor | None = None) -> bool:
    """Whether the C++ loops have the thin products."""
    return thin.can_narrow(wide) and (matrix is None or matrix.dtype is torch.float32)


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
        grad_residual = grad if ctx.needs_input_grad[4] else None
        grad = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        grad_low = grad_x = grad_a = grad_b = None
        if lora_a is not None:
            needed = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[2]
            grad_low, grad_b = gradients_of_b(grad, low, lora_b, ctx.frozen, needed)
        if grad_low is not None and ctx.needs_input_grad[1]:
            grad_a = gradient_of_a(grad_low, flat).to(lora_a.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = project_back([grad], [ctx.frozen], grad_low, [] if lora_a is None else [lora_a])
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
        grad_x = project_back([flat], [ctx.frozen], None, []) if ctx.needs_input_grad[0] else None
        grad_low, grad_b = gradients_of_b(flat, ctx.low, ctx.lora_b, ctx.frozen, ctx.needs_input_grad[1:3])
        return grad_x, grad_low, grad_b, None, grad if ctx.needs_input_grad[4] else None


class FusedLinear4bit(PeftLinear4bit):  # type: ignore[misc]  # PEFT ships no types
    """PEFT's LoRA over a 4-bit linear with a fused forward; saving, merging and disabling stay PEFT's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(…, in)`` to ``(…, out)``; whatever is not plain LoRA goes PEFT's own way."""
        fuses = not (args or kwargs) and _has_one_adapter(self) and runs_fused(self)
        output: Tensor = _apply(self, x) if fuses else super().forward(x, *args, **kwargs)
        return output


class FusedLinear(PeftLinear):  # type: ignore[misc]  # PEFT ships no types
    """The same over a linear that is not quantized."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(…, in)`` to ``(…, out)``; whatever is not plain LoRA goes PEFT's own way."""
        fuses = not (args or kwargs) and _has_one_adapter(self) and runs_fused(self)
        output: Tensor = _apply(self, x) if fuses else super().forward(x, *args, **kwargs)
        return output


def _has_one_adapter(layer: LoraLayer) -> bool:
    """Whether one adapter acts beside the weight; PEFT switches, merges and disables adapters at any time."""
    return not (layer.disable_adapters or layer.merged) and len(layer.active_adapters) == 1


def runs_fused(layer: nn.Module) -> bool:
    """Whether a layer was chosen to run fused in its mode; see :mod:`qlora_lightning.model.layers.fusing`."""
    chosen: dict[bool, bool] = layer.__dict__.get("_runs_fused", {})
    return chosen.get(layer.training, False)


def _apply(layer: LoraLayer, x: Tensor) -> Tensor:
    device = device_of_autocast(x)
    autocasts = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocasts else compute_dtype_of(layer) or x.dtype
    arguments = (x.to(dtype), *adapters_of(layer), frozen_part(layer, dtype), None)
    with torch.autocast(device, enabled=False):
        output: Tensor = apply(LoRALinearFunction, *arguments)
    return output if autocasts else output.to(x.dtype)


def device_of_autocast(tensor: Tensor) -> str:
    """Return the type of a tensor's device; of one without numbers the CPU, since the meta device has no autocast."""
    return "cpu" if tensor.is_meta else tensor.device.type


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


def frozen_part(layer: nn.Module, dtype: torch.dtype, casts: Casts | None = None) -> Frozen:
    """Give what of a plain linear does not train; the bias in ``dtype``."""
    base = _base_of(layer)
    bias = None if base.bias is None else base.bias.to(dtype)
    scaling = layer.scaling.get(layer.active_adapters[0], 1.0) if isinstance(layer, LoraLayer) else 1.0
    return Frozen(FrozenWeight(base.weight), bias, scaling, casts or _WHEN_ASKED)


def _base_of(layer: nn.Module) -> Any:
    return layer.base_layer if isinstance(layer, LoraLayer) else layer
