"""Which dtype the products are computed in."""

from typing import Literal

import torch

from qlora_lightning.errors import UserError

ComputeDtype = Literal["auto", "bf16", "fp16", "fp32"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_compute_dtype(name: ComputeDtype, device: torch.device) -> torch.dtype:
    """Turn a name into a dtype; ``auto`` asks the hardware.

    ``auto`` is bf16 where the hardware has it, else fp16 on CUDA and fp32 on a CPU.

    Raises:
        UserError: bf16 is asked for on a CUDA device that would only emulate it.
    """
    if name == "auto":
        if _has_bfloat16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    if name == "bf16" and device.type == "cuda" and not _has_bfloat16(device):
        raise UserError("model.compute_dtype is bf16, which this GPU only emulates: set it to fp16, or to auto.")
    return _DTYPES[name]


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # AVX512-BF16 or AMX; without them torch converts back and forth, and fp32 is faster.
        return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    return True
