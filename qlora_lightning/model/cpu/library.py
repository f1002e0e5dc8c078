"""Compile the C++ kernels for this CPU once, cache them, and call them with tensors."""

import ctypes
import functools
import hashlib
import logging
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_lightning.sources.cache import Json, cached_folder
from qlora_lightning.support.errors import UserError

_SOURCE = Path(__file__).with_name("attention.cpp")
_OPTIONS = [
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"),
    *("-fPIC", "-fopenmp", *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else [])),
]
_LIBRARY = "kernels.so"
_log = logging.getLogger(__name__)
_Pointer: Any = ctypes.CFUNCTYPE(ctypes.c_bool)


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or ``None`` if there are none; on Linux, the reason is then logged.

    Compiling takes a few seconds, once per CPU.
    """
    if not sys.platform.startswith("linux"):
        return None
    source = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()
    key: dict[str, Json] = {"source": source, "options": " ".join(_OPTIONS), "cpu": _cpu()}
    try:
        folder = cached_folder("kernels", key, _compile, "C++ kernels for this CPU")
        return ctypes.CDLL(str(folder / _LIBRARY))
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip()
    except (UserError, OSError) as error:
        reason = str(error)
    _log.warning("Steps on the CPU are slower without the C++ kernels: %s", reason)
    return None


def _compile(folder: Path) -> None:
    # g++, because torch uses GNU's OpenMP threads, and another compiler would add its own
    command = ["g++", *_OPTIONS, "-shared", str(_SOURCE), "-o", str(folder / _LIBRARY)]
    subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")


def _cpu() -> str:
    """Return a hash of this CPU's model and instructions, because several machines may share a cache."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    features = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return hashlib.sha256("\n".join(sorted(features)).encode()).hexdigest()


def find_function(name: str, dtype: torch.dtype) -> Any:
    """Return a function for tensors of a dtype, or ``None`` if there is none; bfloat16 requires AVX512-BF16."""
    library = load_library()
    try:
        return None if library is None else _Pointer.in_dll(library, f"{name}_{str(dtype).removeprefix('torch.')}")
    except ValueError:  # not compiled
        return None


def call(name: str, dtype: torch.dtype, *arguments: Tensor | float) -> None:
    """Call a function, passing tensors by address; raise MemoryError if there is no memory for its threads."""
    with torch.profiler.record_function(f"cpu::{name}"):
        if not find_function(name, dtype)(*map(_to_c, arguments)):
            raise MemoryError(f"not enough memory for the threads of cpu::{name}")


def _to_c(argument: Tensor | float) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)
