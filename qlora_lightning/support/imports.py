"""Imports torch, Lightning and transformers quicker, and bitsandbytes without what it would fetch."""

import contextlib
import gc
import importlib
import logging
import os
import sys
from collections.abc import Iterator, MutableMapping
from typing import Any

from qlora_lightning.support.console import quiet_loggers


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pause the collector while many objects are made that stay.

    It would look through all of them again and again: of 4.2 seconds of imports it took 1.2 (measured on a CPU of
    2026).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def import_bitsandbytes() -> None:
    """Import bitsandbytes, and neither code off the hub nor torch's compiler with it.

    On a CPU with AVX512-BF16 it would fetch code by Hugging Face's package ``kernels`` and run it, or ask the user to
    install that. It also marks four functions for torch's compiler, whose import takes 1.2 seconds and 40 MB
    (measured); without it they run as they are written.
    """
    with (
        _set_for_now(sys.modules, "kernels", None),  # None: Python refuses to import it
        _set_for_now(os.environ, "TORCHDYNAMO_DISABLE", "1"),
        quiet_loggers(logging.ERROR, "bitsandbytes.backends.cpu.ops"),
    ):
        importlib.import_module("bitsandbytes")


@contextlib.contextmanager
def _set_for_now(mapping: MutableMapping[str, Any], key: str, value: Any) -> Iterator[None]:
    own = {key: mapping[key]} if key in mapping else {}
    mapping[key] = value
    try:
        yield
    finally:
        del mapping[key]
        mapping.update(own)
