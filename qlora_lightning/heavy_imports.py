"""Imports torch, Lightning and transformers quicker: a third of their time goes to Python's garbage collector."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pause the collector while modules are imported.

    They make a million objects that stay, and nearly no garbage; but the collector looks through all of them again and
    again: 1.2 of 4.2 seconds (measured on a CPU of 2026). Afterwards it is as it was.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
