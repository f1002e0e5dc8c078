"""The most memory that a process held for itself and for mapped files over a stretch of work, watched by a thread."""

import threading
from pathlib import Path

import psutil
import torch

_INTERVAL = 0.02  # seconds; more often, and the threads of a product wait for each other


class PeakMemory:
    """Watches memory while it is entered; the kernel keeps a peak of resident memory only.

    Attributes:
        private: the most bytes of this process's own (RssAnon); on CUDA of those allocated on the card.
        mapped: the most bytes of files that lie in memory for this process (RssFile): the cached base, libraries.
        together: the most of both at one time.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.private = self.mapped = self.together = 0
        self._device = device or torch.device("cpu")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._look()

    def _look(self) -> None:
        private, mapped = read_bytes(self._device)
        self.private, self.mapped = max(self.private, private), max(self.mapped, mapped)
        self.together = max(self.together, private + mapped)


def read_bytes(device: torch.device) -> tuple[int, int]:
    """Read the bytes that are private and those of mapped files, now; of a card those allocated, and 0."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), 0
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux: what psutil knows everywhere
        return psutil.Process().memory_info().rss, 0
    fields = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
    private, mapped = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return private, mapped
