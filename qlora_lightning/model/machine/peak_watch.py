"""The most memory that was in use over a stretch of time."""

import threading

import torch

from qlora_lightning.model.machine.device_memory import read_resident_bytes

_EVERY = 0.02  # seconds; a look takes some 20 microseconds


class PeakWatch:
    """Watch the memory of this process from a thread, or remember what CUDA says of its own.

    The kernel's own peak counts from the start of the process, in which a base may have been quantized.

    Args:
        device: What trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._most = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True, name="peak-watch")
            self._thread.start()

    def look(self) -> None:
        """Take what is in use now into account; on CUDA the peak since somebody reset it."""
        on_cuda = self._device.type == "cuda"
        now = torch.cuda.max_memory_allocated(self._device) if on_cuda else read_resident_bytes()
        self._most = max(self._most, now)

    def stop(self) -> int:
        """End, and give the most bytes."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.look()
        return self._most

    def _watch(self) -> None:
        while not self._done.wait(_EVERY):
            self.look()
