"""A callback that counts what a process sends; named in configs by this module's name alone."""

import json
import os
import resource
import socket
import struct
import time
from pathlib import Path

import torch
from lightning import Callback


class Traffic(Callback):
    """Write what rank 0 sends in its third batch: each collective with its bytes, and the bytes of all TCP sockets."""

    def __init__(self, file: str):
        self.file, self.profile, self.before = file, None, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            self.began = time.perf_counter()
        if trainer.global_rank == 0 and batch_idx == 2:
            self.seconds = time.perf_counter() - self.began
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
            self.profile.start()
            self.before = bytes_sent()
        elif self.profile is not None:
            sent = bytes_sent() - self.before
            self.profile.stop()
            self.profile.export_chrome_trace(self.file)
            events = json.loads(Path(self.file).read_text())["traceEvents"]
            found = [(event["name"], event["args"]) for event in events if event["name"].startswith("gloo:")]
            collectives = [(name.removeprefix("gloo:"), _bytes(args)) for name, args in found]
            Path(self.file).write_text(json.dumps(self.facts(collectives, sent)))
            self.profile = None

    def facts(self, collectives, sent):
        """What a step sends, how long the one before took, and the most memory until then."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"collectives": collectives, "sent": sent, "seconds": self.seconds, "peak_bytes": peak}


_SIZES = {"float": 4, "double": 8, "unsigned char": 1, "int": 4, "long int": 8, "c10::BFloat16": 2}


def _bytes(args) -> int:
    shapes = zip(args.get("Input type", ()), args.get("Input Dims", ()), strict=True)
    return sum(_SIZES[kind] * torch.Size(shape).numel() for kind, shape in shapes)


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
