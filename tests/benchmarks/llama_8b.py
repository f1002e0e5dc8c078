"""Makes a base of Llama-3.1-8B's shape with random weights, and measures what quantizing and training it takes.

Usage: python -m tests.benchmarks.llama_8b FOLDER [--layers 32] [--tokens 512]
Writes the base into FOLDER (16.1 GB with all layers) unless it is there, quantizes it into the cache, and trains steps
of two rows with gradient checkpointing in a process of its own, from the cached base. Prints a line of JSON: seconds,
the most private memory (RssAnon) at any time, the bytes of the quantized model, and under ``step`` those of the step.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from qlora_lightning.model.base_model import load_base
from qlora_lightning.model.summary import bytes_by_dtype
from qlora_lightning.support.errors import UserError
from tests.benchmarks.children import run_child
from tests.benchmarks.peak_memory import PeakMemory
from tests.benchmarks.settings import ALL_LAYERS
from tests.benchmarks.shape_8b import check_folder, make_config

_TOKENS, _CEILINGS = 512, 3
_STEPS = 2  # the optimizer has its state from the second step on


def make_base(folder: Path, layers: int) -> None:
    """Write config and shards, one decoder layer each: never more than one layer in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(layers)
    names: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(_shards(config)):
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def _shards(config: LlamaConfig) -> Iterator[dict[str, Tensor]]:
    width, inner = config.hidden_size, config.intermediate_size
    kv_width = width // config.num_attention_heads * config.num_key_value_heads
    device = "cuda" if torch.cuda.is_available() else "cpu"  # which takes a minute
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        made = torch.empty(*shape, dtype=torch.bfloat16, device=device)
        return made.normal_(std=0.02, generator=generator).cpu()

    yield {"model.embed_tokens.weight": random(config.vocab_size, width)}
    for layer in range(config.num_hidden_layers):
        start = f"model.layers.{layer}."
        yield {
            f"{start}self_attn.q_proj.weight": random(width, width),
            f"{start}self_attn.k_proj.weight": random(kv_width, width),
            f"{start}self_attn.v_proj.weight": random(kv_width, width),
            f"{start}self_attn.o_proj.weight": random(width, width),
            f"{start}mlp.gate_proj.weight": random(inner, width),
            f"{start}mlp.up_proj.weight": random(inner, width),
            f"{start}mlp.down_proj.weight": random(width, inner),
            f"{start}input_layernorm.weight": torch.ones(width, dtype=torch.bfloat16),
            f"{start}post_attention_layernorm.weight": torch.ones(width, dtype=torch.bfloat16),
        }
    yield {"model.norm.weight": torch.ones(width, dtype=torch.bfloat16)}
    yield {"lm_head.weight": random(config.vocab_size, width)}


def measure(folder: Path) -> dict[str, float]:
    """Quantize the base and load it again from the cache."""
    began = time.perf_counter()
    with PeakMemory() as first:
        loaded = load_base(str(folder), compute_dtype=torch.bfloat16)
    first_seconds = time.perf_counter() - began
    size = sum(bytes_by_dtype(loaded.model).values()) / 1024**3
    del loaded
    began = time.perf_counter()
    with PeakMemory() as second:
        loaded = load_base(str(folder), compute_dtype=torch.bfloat16)
    second_seconds = time.perf_counter() - began
    for parameter in loaded.model.parameters():  # the step's process shall find the files in memory, as after a run
        parameter.detach().view(torch.uint8).sum()
    return {
        "quantized_gib": size,
        "first_seconds": first_seconds,
        "first_private_peak_gib": first.private / 1024**3,
        "second_seconds": second_seconds,
        "second_private_peak_gib": second.private / 1024**3,
    }


def measure_step(folder: Path, threads: int, dtype: str, tokens: int, ceilings: int) -> dict[str, Any]:
    """Train some steps from the cached base; see ``one_batch``."""
    sizes = [f"--tokens={tokens}", f"--row-tokens={tokens // 2}", f"--steps={_STEPS}", f"--ceilings={ceilings}"]
    options = [str(folder), *sizes, f"--dtype={dtype}", "--gradient-checkpointing"]
    return run_child(sys.executable, "one_batch", options, threads)


def main() -> int:
    """Measure, print and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=ALL_LAYERS)
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of products")
    parser.add_argument("--tokens", type=int, default=_TOKENS, help="of a step, in two rows")
    parser.add_argument("--ceilings", type=int, default=_CEILINGS, help="how often the step's products alone are timed")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the step's process")
    arguments = parser.parse_args()
    try:
        check_folder(arguments.folder, arguments.layers)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if not (arguments.folder / "config.json").exists():
        make_base(arguments.folder, arguments.layers)
    folder = arguments.folder.absolute()
    figures: dict[str, Any] = {name: round(value, 3) for name, value in measure(folder).items()}
    step = measure_step(folder, arguments.threads, arguments.dtype, arguments.tokens, arguments.ceilings)
    print(json.dumps(figures | {"layers": arguments.layers, "step": step}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
