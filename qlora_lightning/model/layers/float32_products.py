"""Products of bfloat16 matrices whose results stay float32.

Scores of attention are numbers to take exponentials of: rounded to bfloat16, a score of 40 errs by an eighth, and its
probability with it. torch has no such product for a CPU, but oneDNN does: given float32 matrices and leave to round
them to bfloat16, it multiplies as quickly as those. What comes from bfloat16 loses nothing by that.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def multiply_to_float32(left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    """Give ``factor · left · right``, matrix by matrix, in float32 where the inputs have fewer bits.

    Args:
        left: ``(matrices, rows, inner)``.
        right: ``(matrices, inner, columns)``, of the same dtype.
        factor: On the result.

    Returns:
        ``(matrices, rows, columns)``; of float64 inputs in float64.
    """
    dtype = torch.promote_types(left.dtype, torch.float32)
    nothing = torch.empty((), dtype=dtype)
    with _rounding_to_bfloat16() if left.dtype == torch.bfloat16 else nullcontext():
        return torch.baddbmm(nothing, left.to(dtype), right.to(dtype), beta=0, alpha=factor)


_lock = threading.Lock()  # the setting is the whole process's: of two threads each would put back the other's


@contextmanager
def _rounding_to_bfloat16() -> Iterator[None]:
    """Let float32 products on the CPU round their inputs, as long as the context lasts."""
    backend: Any = torch.backends.mkldnn
    settings = backend.matmul
    with _lock:
        before = settings.fp32_precision
        if before == "bf16":  # as the user wants it everywhere
            yield
            return
        settings.fp32_precision = "bf16"
        try:
            yield
        finally:
            # what comes from the backend as a whole goes on coming from there
            settings.fp32_precision = "none" if before == backend.fp32_precision else before
