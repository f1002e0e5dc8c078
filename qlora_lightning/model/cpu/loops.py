"""What ``loops.cpp`` computes, called with tensors."""

import torch
from torch import Tensor

from qlora_lightning.model.cpu.library import NAMES, call, has_numbers, load_library


def can_run(*tensors: Tensor) -> bool:
    """Whether the loops are there and take these: on the CPU, of one dtype, 32 or 16 bits wide, without gaps."""
    dtype = tensors[0].dtype
    fit = all(each.dtype == dtype and each.is_contiguous() for each in tensors)
    return dtype in NAMES and has_numbers(*tensors) and fit and load_library() is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute ``weight · x / rms(x)`` of each row, ``(rows, width)``, and ``1 / rms(x)``, ``(rows, 1)`` in float32."""
    normed, inverse = torch.empty_like(x), x.new_empty(len(x), 1, dtype=torch.float32)
    call("rms_norm", x.dtype, x, weight, float(eps), normed, inverse, *x.shape)
    return normed, inverse


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Compute the gradient of x from that of the normed rows, whose place it takes."""
    call("rms_norm_backward", x.dtype, x, weight, inverse, grad, *x.shape)
    return grad


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute ``silu(gate) · up``."""
    hidden = torch.empty_like(gate)
    call("swiglu", gate.dtype, gate, up, hidden, gate.numel())
    return hidden


def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``silu(gate) · up`` and the gradients of gate and up; the first of these takes the place of ``grad``."""
    hidden, grad_up = torch.empty_like(gate), torch.empty_like(up)
    call("swiglu_backward", gate.dtype, gate, up, grad, grad_up, hidden, gate.numel())
    return hidden, grad, grad_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> Tensor:
    """Rotate pairs of ``(tokens, heads, width)`` by angles ``(tokens, width)``; ``backward`` the gradient of that."""
    rotated = torch.empty_like(x)
    call("rotate", x.dtype, x, cos, sin, -1.0 if backward else 1.0, rotated, *x.shape)
    return rotated


def cross_entropy(logits: Tensor, targets: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Compute each row's negative log-likelihood in float32, and whether its target is the first of the largest.

    Args:
        logits: ``(rows, vocabulary)``; with the gradient ``softmax - onehot`` takes their place.
        targets: ``(rows,)``, each in the vocabulary.
        with_gradient: Whether it is wanted.
    """
    targets = targets.to(torch.int64).contiguous()
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise IndexError(
            f"A target is not in the vocabulary of {logits.shape[1]:,} tokens."
        )  # the loop would read there
    nll = logits.new_empty(len(logits), dtype=torch.float32)
    correct = logits.new_empty(len(logits), dtype=torch.bool)
    call("cross_entropy", logits.dtype, logits, targets, with_gradient, nll, correct, *logits.shape)
    return nll, correct
