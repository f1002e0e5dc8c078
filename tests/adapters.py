"""Adapter folders that no training made: random, large enough to matter, on the tiny base."""

import json

import torch
import yaml
from transformers import AutoTokenizer

from qlora_lightning import load_base
from qlora_lightning.model.adapters.folder import save_adapter_folder
from qlora_lightning.model.adapters.identity import describe_adapter
from qlora_lightning.model.adapters.inject import ADAPTER, add_adapters, trainable_tensors


def make_adapter(folder, base, quantization="nf4", compute_dtype=torch.float32, std=0.05, seed=0, **options):
    """Write an adapter folder; give the model that it was written from."""
    torch.manual_seed(seed)  # of A
    options = {"rank": 4, **options}
    loaded = load_base(str(base), quantization=quantization, compute_dtype=compute_dtype)
    model = add_adapters(loaded.model, **options)
    model.peft_config[ADAPTER].base_model_name_or_path = str(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in trainable_tensors(model).items():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=std) if "lora_A" not in name else None
    identity = {**loaded.identity, "adapter": describe_adapter(model)}
    tokenizer = AutoTokenizer.from_pretrained(base)
    save_adapter_folder(folder, model, tokenizer, identity)
    return model.eval()


def make_run(folder, base, **options):
    """Write a run folder as far as the commands that use an adapter read it; validation rows lie in it."""
    folder.mkdir(parents=True)
    model = make_adapter(folder / "adapter", base, **options)
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(str(i) for i in range(1, n + 1))} for n in range(1, 9)]
    (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"base": str(base)},
        "data": {"val": str(folder / "val.jsonl")},
        "trainer": {"default_root_dir": str(folder)},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return model
