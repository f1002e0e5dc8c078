"""What is trained: the quantized base with its adapters, its loss and its optimizer."""

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, MutableMapping
from typing import Any

from qlora_lightning.support.console import quiet_loggers


def import_bitsandbytes() -> None:
    """Import bitsandbytes without code from the hub and without torch's compiler.

    On a CPU with AVX512-BF16 it would run code that Hugging Face's package ``kernels`` fetches, or ask to install it.
    It also marks four functions for torch's compiler, whose import takes 1.2 seconds and 40 MB (measured).
    """
    with (
        _setting(sys.modules, "kernels", None),  # None: Python refuses to import it
        _setting(os.environ, "TORCHDYNAMO_DISABLE", "1"),
        quiet_loggers(logging.ERROR, "bitsandbytes.backends.cpu.ops"),
    ):
        importlib.import_module("bitsandbytes")


@contextlib.contextmanager
def _setting(mapping: MutableMapping[str, Any], key: str, value: Any) -> Iterator[None]:
    old_item = {key: mapping[key]} if key in mapping else {}
    mapping[key] = value
    try:
        yield
    finally:
        del mapping[key]
        mapping.update(old_item)


import_bitsandbytes()  # before any module of this package does so, whatever a program imports first
