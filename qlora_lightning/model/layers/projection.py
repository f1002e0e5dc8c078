"""A linear's product with its frozen weight and the adapter beside it, and its gradients, without autograd."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_lightning.model.kernels import products
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
    weight, thin = frozen.weight, None if lora_b is None else lora_b.to(x.dtype)
    low = None if thin is None else low
    residual = None if residual is None else residual.reshape(len(x), -1)
    if _sums_up_once([x], [weight], low) and (residual is None or _is_like(residual, x)):
        return products.multiply([x], [weight.stored], False, low, thin, frozen.scaling, frozen.bias, residual)
    output = None
    if low is not None and thin is not None:
        # First the thin product, which so has no numbers to read but its own.
        output = torch.addmm(x.new_empty(()), low, thin.t(), beta=0, alpha=frozen.scaling)
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
    thin = None if lora_a is None else lora_a.to(grads[0].dtype)
    if _sums_up_once(grads, weights, grad_low):
        return products.multiply(grads, [each.stored for each in weights], True, grad_low, thin)
    grad_x = None if grad_low is None or thin is None else grad_low @ thin
    for grad, weight in zip(grads, weights, strict=True):
        grad_x = weight.multiply_back(grad, onto=grad_x)
    assert grad_x is not None, "grads has at least one"
    return grad_x


def _is_like(residual: Tensor, x: Tensor) -> bool:
    return residual.dtype == x.dtype and residual.is_contiguous()


def _sums_up_once(lefts: Sequence[Tensor], weights: Sequence[FrozenWeight], low: Tensor | None) -> bool:
    """Whether the C++ loops have a product that is summed up in float32 as a whole."""
    has_pairs = low is None or (low.shape[1] % 2 == 0 and low.stride(1) == 1)
    return has_pairs and all(
        products.can_multiply(weight.stored, left) for weight, left in zip(weights, lefts, strict=True)
    )


def gradient_of_low(grad: Tensor, lora_b: Tensor, frozen: Frozen) -> Tensor:
    """Give the gradient of ``x Aᵀ``, ``(tokens, rank)``, from that of the output, ``(tokens, out)``."""
    return (grad @ lora_b.to(grad.dtype)).mul_(frozen.scaling)


def gradient_of_b(grad: Tensor, low: Tensor, lora_b: Tensor, frozen: Frozen) -> Tensor:
    """Give the gradient of B, ``(out, rank)``, from that of the output, ``(tokens, out)``."""
    # As low' grad, and then turned: with the wide side last the product is quicker.
    return (low.t() @ grad).mul_(frozen.scaling).t().to(lora_b.dtype)
