"""Imports torch, Lightning and transformers quicker: without Python's garbage collector and torch's compiler."""

import contextlib
import gc
import os
from collections.abc import Iterator

_SWITCH = "TORCHDYNAMO_DISABLE"


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Pause Python's garbage collector, and have nothing compiled, while modules are imported.

    bitsandbytes marks four functions for torch's compiler, which is imported with them: 0.5 seconds and 40 MB
    (measured). A GPU and a CPU with AVX-512 have kernels in their place; elsewhere they run as they are written.
    """
    before = os.environ.get(_SWITCH)
    os.environ.setdefault(_SWITCH, "1")
    try:
        with without_garbage_collection():
            yield
    finally:
        if before is None:
            del os.environ[_SWITCH]


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pause the collector while many objects are made that stay.

    It would look through all of them again and again: of 4.2 seconds of imports it took 1.2 (measured on a CPU of
    2026). Afterwards it is as it was.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
