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
    plain = all(type(each) in (Tensor, nn.Parameter) and each.device.type == "cpu" for each in tensors)
    return plain and not torch.compiler.is_compiling()


def call(name: str, dtype: torch.dtype, *arguments: Tensor | float | ctypes.Array[Any] | None) -> None:
    """Call a function: of a tensor its address is handed over, of ``None`` a null pointer."""
    function = getattr(load_library(), f"{name}_{NAMES[dtype]}")
    if not torch.autograd.profiler._is_profiler_enabled:
        function(*map(_to_c, arguments))
        return
    with torch.profiler.record_function(f"{PROFILED}{name}"):
        function(*map(_to_c, arguments))


def _to_c(argument: Any) -> Any:
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_void_p(argument.data_ptr()) if isinstance(argument, Tensor) else argument
