"""Imports torch, Lightning and transformers: quicker, and with threads that wait briefly."""

import contextlib
import gc
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

_LOOKS = 3  # at what runs, some milliseconds apart


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import without Python's garbage collector, compiling and fetching no code, with threads that wait briefly.

    bitsandbytes marks four functions for torch's compiler, which is imported with them: 0.5 seconds and 40 MB
    (measured). A GPU and a CPU with AVX-512 have kernels in their place; elsewhere they run as they are written.

    GNU's threads spin for some milliseconds at each barrier by default, on a core that their partner may be waiting
    for: beside other programs at work a step then takes ten times as long as it must (see ``tests.benchmarks``). They
    spin for a tenth of a millisecond here, and if other programs compute on all cores already, for a hundredth, which
    on an idle machine costs 5 % (both measured). What the user's environment says rules, and is as before afterwards.
    """
    settings = {"TORCHDYNAMO_DISABLE": "1"}
    # torch that is loaded has read them
    if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        settings["GOMP_SPINCOUNT"] = "1000" if _is_machine_busy() else "10000"
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        with without_garbage_collection(), _without_fetched_kernels():  # by whoever is the first to import bitsandbytes
            yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _is_machine_busy() -> bool:
    """Whether as many other threads run as this process has cores; Linux alone tells."""
    loads = Path("/proc/loadavg")
    if not loads.exists():
        return False
    running = []
    for look in range(_LOOKS):
        time.sleep(0.002 * bool(look))
        running.append(int(loads.read_text().split()[3].partition("/")[0]) - 1)  # but this one
    return min(running) >= len(os.sched_getaffinity(0))


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pause the collector while many objects are made that stay.

    It would look through all of them again and again: of 4.2 seconds of imports it took 1.2 (measured on a CPU of
    2026). Afterwards it is as it was, and takes the new objects for old ones: its next quick look, at the young, would
    else be one at all of them (0.2 seconds).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.freeze()
            gc.unfreeze()  # into the oldest generation
            gc.enable()


@contextlib.contextmanager
def _without_fetched_kernels() -> Iterator[None]:
    """Keep bitsandbytes, while it is imported, from fetching code off the hub and running it.

    On a CPU with AVX512-BF16 it would, by Hugging Face's package ``kernels``, and complains if that is not installed.
    Only its product of a single token would use it, which none of our layers takes.
    """
    modules = cast(dict[str, Any], sys.modules)
    before = {name: module for name, module in modules.items() if name == "kernels"}
    complaints = logging.getLogger("bitsandbytes.backends.cpu.ops")
    was_disabled = complaints.disabled
    modules["kernels"], complaints.disabled = None, True  # None: Python refuses to import it
    try:
        yield
    finally:
        del modules["kernels"]
        modules.update(before)
        complaints.disabled = was_disabled
