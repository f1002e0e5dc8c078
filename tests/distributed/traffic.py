"""A callback that counts what a process sends; named in configs by this module's name alone."""

import json
import os
import resource
import socket
import struct
import time
from pathlib import Path

from lightning import Callback


class Traffic(Callback):
    """Write the bytes that rank 0 sends in its third batch, the seconds of the one before, and the peak memory."""

    def __init__(self, file: str):
        self.file = Path(file)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            self.began = time.perf_counter()
        elif batch_idx == 2:
            self.seconds, self.before = time.perf_counter() - self.began, bytes_sent()
        elif batch_idx == 3 and trainer.global_rank == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            facts = {"sent": bytes_sent() - self.before, "seconds": self.seconds, "peak_bytes": peak}
            self.file.write_text(json.dumps(facts))


def bytes_sent() -> int:
    """Return how many bytes the open TCP sockets of this process have sent and seen acknowledged, by Linux's count."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as each:
                if each.type == socket.SOCK_STREAM and each.family in (socket.AF_INET, socket.AF_INET6):
                    information = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
                    total += struct.unpack_from("Q", information, 120)[0]  # tcpi_bytes_acked
        except OSError:  # no socket
            continue
    return total
