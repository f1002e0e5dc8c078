"""The figures of one run of one side."""

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Figures:
    """What one run of one side measured.

    Attributes:
        tokens: real tokens of the epoch; padding is not counted.
        seconds: of the training loop, without imports, loading and tokenizing.
        peak_bytes: resident memory of the whole process until training ends, imports and loading included; on CUDA
            the memory allocated on the card.
        start_seconds: from the start of the process until the first step begins.
        losses: of each optimizer step, nats per labelled token.
        versions: of the packages that did the work.
        steady_seconds: of another epoch, when the system has already handed over the memory that steps use, ours only.
        ceiling: the step's matrix products alone (``measure_ceiling``), ours only.
        validation: ``tokens``, ``seconds`` and ``ceiling`` of a validation pass, ours only.
        import_seconds: from the start of the process until all is imported, ours only.
    """

    tokens: int
    seconds: float
    peak_bytes: int
    start_seconds: float
    losses: list[float]
    versions: dict[str, str]
    steady_seconds: float | None = None
    ceiling: dict[str, Any] | None = None
    validation: dict[str, Any] | None = None
    import_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens over seconds."""
        return self.tokens / self.seconds


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Name the installed version of each package."""
    return {package: version(package) for package in packages}


def read_peak_bytes(on_gpu: bool) -> int:
    """Return the most memory that this process has held: on the card, or resident.

    ``getrusage`` carries over from the parent what it held when it started us; Linux's VmHWM begins anew.
    """
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return (peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024
