"""Keeps the inputs of checkpointed layers apart: from a CPU's heap, where they would leave holes, or from a GPU."""
# mypy: allow-untyped-calls

import contextlib
import functools
import mmap
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import save_on_cpu


def keep_inputs_apart(layers: Iterable[nn.Module], offload: bool = False) -> None:
    """Let checkpointed layers keep each input in pages of its own, which the system has back as soon as it is used.

    An input stays until backward, between larger tensors that come and go with every layer. In glibc's heap it lands
    in the place of one of these, which then fits nowhere. A GPU has another allocator; Windows keeps inputs as they
    are.

    Args:
        layers: With transformers' checkpointing switched on; switching it on again undoes this.
        offload: Whether to keep those on a GPU in pinned memory of the host.
    """
    for layer in layers:
        module: Any = layer
        usual = module._gradient_checkpointing_func
        module._gradient_checkpointing_func = functools.partial(_checkpoint_apart, usual, offload)


def _checkpoint_apart(
    checkpoint: Callable[..., Any], offload: bool, function: Callable[..., Any], hidden: Tensor, *rest: Any
) -> Any:
    if hidden.device.type == "cpu" and hidden.numel() and hasattr(mmap, "MAP_ANONYMOUS"):
        hidden = _CopyApart.apply(hidden)
    with save_on_cpu(pin_memory=True) if offload and hidden.is_cuda else contextlib.nullcontext():
        return checkpoint(function, hidden, *rest)


class _CopyApart(torch.autograd.Function):
    """Copy a tensor into pages of its own; its gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        pages = mmap.mmap(-1, x.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=x.dtype).view(x.shape).copy_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
