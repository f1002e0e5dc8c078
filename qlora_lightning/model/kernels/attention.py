"""What ``attention.cpp`` computes, for tensors."""

import torch
from torch import Tensor

from qlora_lightning.model.kernels.library import call_with_scratch, has_numbers, is_there
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
    of_samples = samples.cu_seqlens.long(), samples.own, samples.whole.places, len(samples.own)
    shape = query.shape[1], *key.shape[1:]
    call_with_scratch("attend", query.dtype, query, key, value, *of_samples, *shape, float(scale), mixed, normalizers)
    return mixed, normalizers


def attend_backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, normalizers: Tensor, samples: Samples, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of queries, keys and values from that of the mixed values, ``(tokens, heads, head_dim)``."""
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    places, shares = samples.whole, not samples.whole.once
    parts = key.new_empty(2 * shares, len(places.places), *key.shape[1:], dtype=torch.float32)
    states = query, key, value, grad, normalizers
    bounds = samples.cu_seqlens.long()
    of_samples = bounds, samples.own, places.places, places.order, places.begins, len(samples.own)
    shape = len(query), query.shape[1], *key.shape[1:]
    call_with_scratch("attend_backward", query.dtype, *states, *of_samples, *shape, float(scale), parts, *grads)
    return grads
