"""What the figures were measured on: CPU or card, versions, date."""

import os
import platform
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch


def describe_machine(ours: Mapping[str, str], peers: Mapping[str, str], accelerator: str) -> dict[str, Any]:
    """Name the hardware and the versions; where the peer's differ from ours, both."""
    versions = dict(ours)
    for package, number in peers.items():
        if versions.setdefault(package, number) != number:
            versions[f"the peer's {package}"] = number
    return {
        "device": torch.cuda.get_device_name() if accelerator == "gpu" else None,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "versions": versions,
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    }


def describe_in_words(machine: Mapping[str, Any], load_average: float) -> str:
    """Say the same in a line; the load tells whether neighbours were at work."""
    versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
    hardware = f"{machine['cpu']}, {machine['cores']} cores, load {load_average} at the start"
    card = "" if machine["device"] is None else f"{machine['device']}; "
    return f"{card}{hardware}; {versions}; {machine['date']}"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
