"""What ``attention.cpp`` computes, for tensors."""

import torch
from torch import Tensor

from qlora_lightning.model.kernels.library import call, has_numbers, is_there
from qlora_lightning.model.layout import Samples

_LANES, _MOST_WIDE = 16, 256  # numbers of a head: a multiple of the first, up to the second


def can_attend(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is attention in a dtype for such values, ``(…, head_dim)``."""
    width = value.shape[-1]
    return has_numbers(value) and width % _LANES == 0 and width <= _MOST_WIDE and attends_in(dtype)


def attends_in(dtype: torch.dtype) -> bool:
    """Whether this CPU has attention in a dtype; in bfloat16 it takes AVX512-BF16."""
    return is_there("attend", dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, samples: Samples, scale: float) -> tuple[Tensor, Tensor]:
    """Attend within samples.

    Args:
        query: ``(tokens, heads, head_dim)``, as all states without gaps.
        key: ``(tokens, kv_heads, head_dim)``.
        value: Likewise.
        samples: Of the stream.
        scale: Factor on the scores.

    Returns:
        The mixed values, as the queries are, and what makes weights of a row's scores, ``(tokens, heads, 2)`` in
        float32: the largest, and 1 / Σ e^(score - largest).
    """
    mixed, normalizers = torch.empty_like(query), query.new_empty(*query.shape[:2], 2, dtype=torch.float32)
    of_samples = samples.cu_seqlens.long(), samples.query_start, samples.expanded.gather_index, len(samples.query_start)
    shape = query.shape[1], *key.shape[1:]
    call("attend", query.dtype, query, key, value, *of_samples, *shape, float(scale), mixed, normalizers)
    return mixed, normalizers


def attend_backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, normalizers: Tensor, samples: Samples, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of queries, keys and values from that of the mixed values, ``(tokens, heads, width)``."""
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    expanded = samples.expanded
    tokens = len(expanded.gather_index) if expanded.shares else 0
    parts = key.new_empty(2 * tokens, *key.shape[1:], dtype=torch.float32)
    states = query, key, value, grad, normalizers
    of_samples = samples.cu_seqlens.long(), samples.query_start, expanded.gather_index
    counts = len(samples.query_start), len(query), query.shape[1], *key.shape[1:]
    copies = expanded.copies, expanded.copy_offsets
    arguments = *states, *of_samples, *copies, *counts, float(scale), parts, *grads
    call("attend_backward", query.dtype, *arguments)
    return grads
