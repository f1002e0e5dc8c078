"""A base of Llama-3.1-8B's shape with random weights: how it is made, and what quantizing it takes."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lightning.model.load.base_model import load_base
from tests.benchmarks import child
from tests.benchmarks.one_batch import MemoryWatch
from tests.random_base import save_tokenizer

ALL_LAYERS = 32


def make_config(layers: int) -> LlamaConfig:
    """Return the config of the base, cut to some layers."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        rope_theta=500_000.0,
        dtype="bfloat16",
        bos_token_id=0,  # those of the tokenizer of tests/random_base.py
        eos_token_id=1,
        pad_token_id=1,
    )


def make_base(folder: Path, layers: int) -> None:
    """Write tokenizer, shards of one layer each, and the config last, unless it is there.

    Never more than one layer is in memory.
    """
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    quickstart = child.ROOT / "configs" / "quickstart" / "train.jsonl"
    save_tokenizer(folder, quickstart.read_text(encoding="utf-8").splitlines())
    device = "cuda" if torch.cuda.is_available() else "cpu"  # which takes a minute
    generator = torch.Generator(device).manual_seed(0)
    files: dict[str, str] = {}

    def draw(shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:  # a norm's
            return torch.ones(shape, dtype=torch.bfloat16)
        weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return weight.normal_(std=0.02, generator=generator).cpu()

    config = make_config(layers)
    for number, shard in enumerate(_shapes(config)):
        file = f"model-{number:05d}.safetensors"
        save_file({name: draw(shape) for name, shape in shard.items()}, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(folder)


def _shapes(config: LlamaConfig) -> list[dict[str, tuple[int, ...]]]:
    """Return the shapes of the tensors of each shard, by name."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    parts: list[tuple[str, nn.Module]] = [
        ("model.embed_tokens", model.model.embed_tokens),
        *((f"model.layers.{number}", layer) for number, layer in enumerate(model.model.layers)),
        ("model.norm", model.model.norm),
        ("lm_head", model.lm_head),
    ]
    return [{f"{name}.{key}": tuple(value.shape) for key, value in part.named_parameters()} for name, part in parts]


def measure(folder: str, layers: int) -> dict[str, Any]:
    """Make the base unless it is there, quantize it, and load it again from the cache.

    Returns:
        Bytes of the quantized model; seconds and private bytes of both loads.
    """
    make_base(Path(folder), layers)
    figures: dict[str, Any] = {}
    for name in ("first", "second"):
        watch, began = MemoryWatch(), time.perf_counter()
        loaded = load_base(folder)
        figures[f"{name}_seconds"] = time.perf_counter() - began
        figures[f"{name}_private_bytes"] = max(private for private, _ in watch.stop())
        figures["quantized_bytes"] = loaded.model.get_memory_footprint()
        for parameter in loaded.model.parameters():  # the next process shall find the files in memory, as after a run
            parameter.detach().view(torch.uint8).flatten()[::4096].sum()  # a byte of each page
        del loaded
    return figures


if __name__ == "__main__":
    child.serve(measure)
