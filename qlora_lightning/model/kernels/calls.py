"""How Python calls the compiled C++ with tensors."""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lightning.model.kernels.compiler import load_library

PROFILED = "loops::"  # what calls are called in a profile
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def is_there(name: str, dtype: torch.dtype) -> bool:
    """Whether a function has been compiled for a dtype."""
    return dtype in NAMES and hasattr(load_library(), f"{name}_{NAMES[dtype]}")


def has_numbers(*tensors: Tensor) -> bool:
    """Whether tensors lie in this machine's memory; those of torch's tracers do not."""
    plain = all(
        type(each) in (Tensor, nn.Parameter) and each.device.type == "cpu" and not each.is_neg() for each in tensors
    )
    return plain and not torch.compiler.is_compiling()


def call(name: str, dtype: torch.dtype, *arguments: Tensor | float | ctypes.Array[Any] | None) -> int:
    """Call a function: of a tensor its address is handed over, of ``None`` a null pointer.

    Returns:
        What it returns; of one that returns nothing any number.
    """
    function = getattr(load_library(), f"{name}_{NAMES[dtype]}")
    if not torch.autograd.profiler._is_profiler_enabled:
        return int(function(*map(_to_c, arguments)))
    with torch.profiler.record_function(f"{PROFILED}{name}"):
        return int(function(*map(_to_c, arguments)))


def call_with_scratch(name: str, dtype: torch.dtype, *arguments: Tensor | float | ctypes.Array[Any] | None) -> None:
    """Call a function whose threads take memory of their own, and which tells whether they got it.

    Raises:
        MemoryError: They did not.
    """
    if not call(name, dtype, *arguments):
        raise MemoryError(f"There is no memory for what the C++ loop {name} keeps for each thread.")


def _to_c(argument: Any) -> Any:
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_void_p(argument.data_ptr()) if isinstance(argument, Tensor) else argument
