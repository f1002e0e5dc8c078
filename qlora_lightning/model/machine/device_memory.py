"""Reads how much memory is in use, was in use, and is there: of the CUDA device, or of this process and machine."""

from pathlib import Path

import psutil
import torch

_GIB = 1024**3


def read_memory(device: torch.device) -> dict[str, float]:
    """Read memory in use and its peak, in GiB: of the CUDA device, or of this process."""
    if device.type == "cuda":
        return {
            "memory_allocated_gib": torch.cuda.memory_allocated(device) / _GIB,
            "memory_reserved_gib": torch.cuda.memory_reserved(device) / _GIB,
            "memory_peak_gib": torch.cuda.max_memory_allocated(device) / _GIB,
        }
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux: what psutil knows everywhere
        resident = psutil.Process().memory_info().rss / _GIB
        return {"private_memory_gib": resident, "peak_rss_gib": resident}
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    kib = {name: int(fields[name].split()[0]) for name in ("RssAnon", "VmHWM")}
    return {"private_memory_gib": kib["RssAnon"] * 1024 / _GIB, "peak_rss_gib": kib["VmHWM"] * 1024 / _GIB}


def device_memory_gib(device: torch.device) -> float:
    """Read how much memory the device, or this machine, has, in GiB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / _GIB
    return float(psutil.virtual_memory().total / _GIB)


def read_peak_gib(device: torch.device) -> float:
    """Read the most memory that was in use, in GiB: of the CUDA device, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    try:
        import resource
    except ImportError:  # Windows
        return float(psutil.Process().memory_info().rss / _GIB)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return kib * (1 if psutil.MACOS else 1024) / _GIB


def read_resident_bytes() -> int:
    """Read how much of this process lies in memory now, mapped files included."""
    return int(psutil.Process().memory_info().rss)
