"""Adapter folders that no training made: random, large enough to matter, on the tiny base."""

import contextlib
import re

import torch
import yaml
from transformers import AutoTokenizer

from qlora_lightning import QLoRAModule
from tests.rows import write_rows
from tests.steps import trainable_tensors


def make_adapter(folder, base, std=0.05, seed=0, **options):
    """Write an adapter folder; give the model that it was written from."""
    torch.manual_seed(seed)  # of A
    module = QLoRAModule(str(base), **{"rank": 4, "compute_dtype": "fp32"} | options)
    module.configure_model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in trainable_tensors(module.model).items():
            if "lora_A" not in name:
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=std)
    module.save_adapter(folder, AutoTokenizer.from_pretrained(base))
    return module.model.eval()


def make_run(folder, base, **options):
    """Write a run folder as far as the commands that use an adapter read it; validation rows lie in it."""
    folder.mkdir(parents=True)
    model = make_adapter(folder / "adapter", base, **options)
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(str(i) for i in range(1, n + 1))} for n in range(1, 9)]
    write_rows(folder / "val.jsonl", rows)
    config = {"model": {"base": str(base)}, "data": {"val": str(folder / "val.jsonl")}}
    config["trainer"] = {"default_root_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return model


def load_by_card(folder):
    """The model and the tokenizer that the lines of the card load."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert "qlora_lightning" not in code
    names = {}
    with contextlib.chdir(folder):  # which the card calls a dot
        exec(code, names)
    return names["model"], names["tokenizer"]
