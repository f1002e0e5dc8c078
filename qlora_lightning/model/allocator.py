"""Lets glibc's allocator give freed memory back while many large tensors come and go."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

_M_MMAP_THRESHOLD = -3  # malloc.h
_WHILE_QUANTIZING = 1 << 20  # bytes: nearly every tensor gets pages of its own
_USUAL = 32 << 20  # bytes: where glibc's own threshold ends up in a process that frees large blocks


@contextlib.contextmanager
def giving_memory_back() -> Iterator[None]:
    """Give each block of 1 MiB or more back to the system as soon as it is freed; does nothing without glibc.

    Quantizing makes short-lived copies in 16 and 32 bits between small tensors that stay: in one heap these hold it
    open. For a LLaMA of 8B's shape that cost 2 GiB at the peak, and kept 1.5 GiB for good (measured).
    """
    glibc = _find_glibc()
    if glibc is None:
        yield
        return
    glibc.mallopt(_M_MMAP_THRESHOLD, _WHILE_QUANTIZING)
    try:
        yield
    finally:
        glibc.mallopt(_M_MMAP_THRESHOLD, _USUAL)
        glibc.malloc_trim(0)


def _find_glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
