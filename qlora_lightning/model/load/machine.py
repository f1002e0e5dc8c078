"""The machine: its dtypes, its memory and its allocator."""

import contextlib
import sys
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from qlora_lightning.sources.tensors import GIB
from qlora_lightning.support.errors import UserError

CGROUPS = Path("/sys/fs/cgroup")
ComputeDtype = Literal["auto", "bf16", "fp16", "fp32"]

# Families whose states are known to exceed 65,504 in fp16.
_OVERFLOW_IN_FP16 = ("gemma", "qwen", "vaultgemma")  # prefixes of their types
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_compute_dtype(name: ComputeDtype, device: torch.device, model_type: str | None = None) -> torch.dtype:
    """Return the dtype for a name; ``auto`` is bf16 if the hardware has it, else fp16 on CUDA and fp32 on a CPU.

    For a type that is known to overflow in fp16, ``auto`` is fp32 on CUDA too.

    Raises:
        UserError: If bf16 is requested on a CUDA device that would only emulate it.
    """
    if name == "auto":
        if _has_bfloat16(device):
            return torch.bfloat16
        takes_fp16 = device.type == "cuda" and not str(model_type).startswith(_OVERFLOW_IN_FP16)
        return torch.float16 if takes_fp16 else torch.float32
    if name == "bf16" and device.type == "cuda" and not _has_bfloat16(device):
        raise UserError(
            "model.compute_dtype is bf16, which this GPU only emulates: set it to fp16 or auto.",
            "model.compute_dtype",
        )
    return _DTYPES[name]


def explain_dtype(device: torch.device, dtype: str) -> str | None:
    """Describe the compute dtype on hardware without bf16; ``None`` if it has bf16."""
    if _has_bfloat16(device):
        return None
    if device.type == "cpu" and dtype != "float32":  # on an EPYC 7003, it took 170 times as long as fp32 (measured)
        return f"This CPU only emulates {dtype}, up to a hundred times slower: set model.compute_dtype to auto."
    return f"This {device.type.upper()} has no bf16: products are computed in {dtype}."


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # without bf16 instructions, torch converts back and forth, so fp32 is faster
        return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    return True


def advise_allocator(device: torch.device) -> str | None:
    """Suggest an allocator setting for torch, needed before CUDA starts; ``None`` if already set, as by our command."""
    cuda: Any = torch.cuda  # memory_snapshot has no types
    if device.type != "cuda" or sys.platform != "linux" or cuda.get_allocator_backend() != "native":
        return None
    if any(segment["is_expandable"] for segment in cuda.memory_snapshot()):
        return None
    return "Rows of varying lengths fragment this GPU's memory: set PYTORCH_ALLOC_CONF=expandable_segments:True."


def device_memory_gib(device: torch.device) -> float:
    """Read the total memory of a CUDA device, or of this machine, in GiB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return float(psutil.virtual_memory().total / GIB)


def free_bytes(device: torch.device) -> int:
    """Read how many bytes this process can still use, on a CUDA device or on this machine within its limit."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # also free
        return torch.cuda.mem_get_info(device)[0] + cached
    free = psutil.virtual_memory().available
    if sys.platform.startswith("linux"):
        process = psutil.Process()
        limit, _ = process.rlimit(psutil.RLIMIT_AS)
        free = free if limit == psutil.RLIM_INFINITY else min(free, limit - process.memory_info().vms)
        free = min([free, *_free_bytes_of_cgroups()])
    return int(free)


def _free_bytes_of_cgroups() -> list[int]:
    """Return the free bytes in each cgroup (version 2) that limits this process, such as a container or a SLURM job."""
    free = []
    with contextlib.suppress(OSError):  # there are no cgroups
        own_group = CGROUPS / Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
        for group in (own_group, *own_group.parents):
            limit_file = group / "memory.max"  # the root has none
            limit = limit_file.read_text().strip() if limit_file.exists() else "max"
            if limit != "max":
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])  # less cached files
                free.append(int(limit) - used)
    return free
