"""Where the memory of a step goes, in bytes."""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.device import read_memory
from qlora_lightning.model.summary import bytes_by_dtype

_GIB = 1024**3
_EVERY = 0.02  # seconds


@dataclass
class Memory:
    """Bytes of each kind.

    Attributes:
        base: By dtype.
        adapters: Of what trains.
        gradients: Before an optimizer step.
        optimizer: Of its state.
        kept: What forward keeps for backward, by part; of one micro-batch.
        logits: The most that are there at a time.
        peaks: The process's or the device's, by name, and before them what was there when the step began.
    """

    base: dict[str, int] = field(default_factory=dict)
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    logits: int = 0
    peaks: dict[str, int] = field(default_factory=dict)


def read_base(model: nn.Module) -> dict[str, int]:
    """Sum the frozen parameters by dtype."""
    sizes = bytes_by_dtype(model)
    for parameter in trainable_tensors(model).values():
        sizes[str(parameter.dtype).removeprefix("torch.")] -= parameter.nbytes
    return {dtype: size for dtype, size in sizes.items() if size}


def count_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Sum the bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def tensors_of_optimizer(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Give the tensors of an optimizer's state."""
    return (value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))


class PeakWatch:
    """Watches the memory of a step, for its peak.

    The device remembers its own; the process's private memory has to be looked at again and again.

    Args:
        device: What trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done = threading.Event()
        self._before: dict[str, float] = {}
        self._most: dict[str, float] = {}
        self._thread: Any = None

    def start(self) -> None:
        """Begin."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._before = {name: gib for name, gib in read_memory(self._device).items() if "peak" not in name}
        self._thread = threading.Thread(target=self._watch, daemon=True, name="peak-watch")
        self._thread.start()

    def stop(self) -> dict[str, int]:
        """End, and give the peaks in bytes, by name; nothing where it was not begun."""
        if self._thread is None:
            return {}
        self._done.set()
        self._thread.join()
        self._look()
        before = {f"{_word(name)} before the step": gib for name, gib in self._before.items()}
        peaks = {f"peak {name}": gib for name, gib in self._most.items()}
        return {name: int(gib * _GIB) for name, gib in (before | peaks).items()}

    def _watch(self) -> None:
        while not self._done.wait(_EVERY):
            self._look()

    def _look(self) -> None:
        for name, gib in read_memory(self._device).items():
            words = _word(name.removeprefix("peak_"))
            self._most[words] = max(self._most.get(words, 0.0), gib)


def _word(name: str) -> str:
    return name.removesuffix("_gib").replace("_", " ")
