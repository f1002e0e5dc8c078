"""What hides later keys from a row."""

import functools

import torch
from torch import Tensor


@functools.cache
def causal_bias(dtype: torch.dtype, rows: int, keys: int, shared: int) -> Tensor:
    """Give 0 where a key is no later than the row, else minus infinity: ``(rows · shared, keys)``.

    Args:
        dtype: Of the scores that it is added to.
        rows: Tokens; the first is that of the first key.
        keys: Tokens.
        shared: Query heads of a key head: each row stands there as often.
    """
    later = torch.ones(rows, keys, dtype=torch.bool).triu(1)
    return torch.zeros(later.shape, dtype=dtype).masked_fill_(later, -torch.inf).repeat_interleave(shared, 0)
