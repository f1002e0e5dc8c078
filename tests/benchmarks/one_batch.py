"""Steps on one batch of random tokens, and a base of Llama-3.1-8B's shape: what no file of rows has. On a CPU."""

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import psutil
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lightning import GradientCheckpointing, load_base
from tests.benchmarks import child
from tests.benchmarks.ours import Meter, make_module, make_trainer
from tests.random_base import save_tokenizer
from tests.steps import make_batch

_INTERVAL = 0.02  # seconds; more often, and the threads of a product wait for each other


class MemoryWatch:
    """Read the memory of this process again and again from a thread: the kernel keeps a peak of all of it only."""

    def __init__(self, interval: float = _INTERVAL) -> None:
        self.readings: list[tuple[int, int]] = []  # bytes that are private, and of mapped files: cached base, libraries
        self._interval = interval  # seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Read for the last time; return the most private bytes."""
        self._stopped.set()
        self._thread.join()
        return max(private for private, _ in self.readings)

    def _watch(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._stopped.wait(self._interval)
            info = psutil.Process().memory_info()
            mapped = getattr(info, "shared", 0)  # of Linux alone
            self.readings.append((info.rss - mapped, mapped))


def measure(base: str, lengths: Sequence[int], dtype: Any) -> dict[str, Any]:
    """Train two steps of rows of these lengths with gradient checkpointing, and watch their memory.

    The second half of each row is labeled. The second step has the optimizer's state; the seconds are the quicker's.
    """
    lightning.seed_everything(child.SEED)
    batch = make_batch(lengths, vocabulary=1000)
    for start, length in zip(batch["cu_seqlens"].tolist(), lengths, strict=False):
        batch["labels"][0, start : start + length // 2] = -100
    batch |= {"row_ids": torch.arange(len(lengths)), "source": torch.zeros(len(lengths), dtype=torch.int64)}
    meter, watch = Meter(), MemoryWatch()
    trainer = make_trainer("cpu", GradientCheckpointing(True), meter, max_epochs=1)
    batches: Any = [batch] * 2
    trainer.fit(make_module(base, dtype), DataLoader(batches, batch_size=None))
    figures = {"seconds": min(meter.step_seconds), "start_seconds": meter.start_seconds, "tokens": sum(lengths)}
    return figures | {"private_bytes": watch.stop(), "together_bytes": max(map(sum, watch.readings))}


def make_base(folder: Path, layers: int) -> None:
    """Write a base of Llama-3.1-8B's shape with random weights, unless it is there, a tensor at a time."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    quickstart = child.ROOT / "configs" / "quickstart" / "train.jsonl"
    save_tokenizer(folder, quickstart.read_text(encoding="utf-8").splitlines())
    shape = child.ROOT / "configs" / "shapes" / "llama-3.1-8b" / "config.json"
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # of that tokenizer
    settings = json.loads(shape.read_text(encoding="utf-8")) | special | {"num_hidden_layers": layers}
    config = LlamaConfig(**settings)
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).state_dict()
    files = {name: f"{name}.safetensors" for name in tensors}
    for name, tensor in tensors.items():
        weight = torch.ones(tensor.shape, dtype=torch.bfloat16)
        if weight.dim() == 2:  # a norm's stay ones; few numbers, again and again, are drawn sooner
            weight.copy_(torch.empty(256, weight.shape[1]).normal_(std=0.02).repeat(len(weight) // 256, 1))
        save_file({name: weight}, folder / files[name], metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(folder)  # last: then the base is there


def quantize(folder: str, layers: int) -> dict[str, Any]:
    """Make the base unless it is there, quantize it, and load it again from the cache; measure both loads."""
    torch.manual_seed(child.SEED)
    make_base(Path(folder), layers)
    figures: dict[str, Any] = {}
    for name in ("first", "second"):
        watch, began = MemoryWatch(), time.perf_counter()
        loaded = load_base(folder)
        figures[f"{name}_seconds"] = time.perf_counter() - began
        figures[f"{name}_private_bytes"] = watch.stop()
        figures["quantized_bytes"] = loaded.model.get_memory_footprint()
        for parameter in loaded.model.parameters():  # the next process shall find the files in memory, as after a run
            parameter.detach().view(torch.uint8).flatten()[::4096].sum()  # a byte of each page
        del loaded
    return figures
