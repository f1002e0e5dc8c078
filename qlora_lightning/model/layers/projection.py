"""A linear's product with its frozen weight and the adapter beside it, and its gradients, without autograd."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_lightning.model.kernels import products, thin
from qlora_lightning.model.layers.frozen_weight import FrozenWeight


class Frozen(NamedTuple):
    """What of a linear does not train.

    Attributes:
        weight: ``(out, in)``.
        bias: ``(out,)``, or none.
        scaling: Factor on the adapter's part.
    """

    weight: FrozenWeight
    bias: Tensor | None
    scaling: float


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
    weight, b = frozen.weight, None if lora_b is None else lora_b.to(x.dtype)
    low = None if b is None else low
    residual = None if residual is None else residual.reshape(len(x), -1)
    if _sums_up_once([x], [weight], low, turned=False) and (residual is None or _is_like(residual, x)):
        return products.multiply([x], [weight.stored], False, low, b, frozen.scaling, frozen.bias, residual)
    output = None
    if low is not None and b is not None:
        # First the thin product, which so has no numbers to read but its own.
        output = torch.addmm(x.new_empty(()), low, b.t(), beta=0, alpha=frozen.scaling)
    output = weight.multiply(x, output)
    if frozen.bias is not None:
        output.add_(frozen.bias)
    # Last the residual: its numbers are larger, and each sum with them is rounded as they are.
    return output if residual is None else output.add_(residual)


def project_back(
    grads: Sequence[Tensor], frozen: Sequence[Frozen], grad_low: Tensor | None, lora_a: Tensor | None
) -> Tensor:
    """Give the gradient of the input that linears share, ``(tokens, in)``: ``Σ g W + g' A``.

    Args:
        grads: Of the outputs, ``(tokens, out)`` each; at least one.
        frozen: Of the linears.
        grad_low: Of the products with A, ``(tokens, sum of ranks)``.
        lora_a: The A under each other, ``(sum of ranks, in)``; ``None`` without adapters.
    """
    weights = [each.weight for each in frozen]
    a = None if lora_a is None else lora_a.to(grads[0].dtype)
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


def narrow(x: Tensor, lora_a: Tensor) -> Tensor:
    """Give ``x Aᵀ``, ``(tokens, rank)``, of ``(tokens, in)`` and ``(rank, in)``."""
    if _are_thin(x, lora_a) and lora_a.shape[1] == x.shape[1]:
        return thin.narrow(x, lora_a)
    return x @ lora_a.to(x.dtype).t()


def gradient_of_a(grad_low: Tensor, x: Tensor) -> Tensor:
    """Give the gradient of A, ``(rank, in)``, from that of ``x Aᵀ``; in x's dtype or in float32."""
    return thin.partner(x, grad_low) if _are_thin(x) else grad_low.t() @ x


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
        of_low = (grad @ lora_b.to(grad.dtype)).mul_(frozen.scaling)
    if needed[1]:
        # As low' grad, and then turned: with the wide side last the product is quicker.
        of_b = (low.t() @ grad).mul_(frozen.scaling).t().to(lora_b.dtype)
    return of_low, of_b


def _are_thin(wide: Tensor, matrix: Tensor | None = None) -> bool:
    """Whether the C++ loops have the thin products."""
    return thin.can_narrow(wide) and (matrix is None or matrix.dtype is torch.float32)
