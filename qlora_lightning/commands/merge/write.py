"""Writes a merged model into a folder: weights in shards, config, tokenizer, chat template, generation config."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_lightning.base.folder import load_tokenizer, read_config
from qlora_lightning.base.tensors import ShardWriter
from qlora_lightning.data.chat.templates import choose_chat_template
from qlora_lightning.model.opened_adapter import AdapterSource
from qlora_lightning.model.weights.base import Weights
from qlora_lightning.model.weights.merging import MergePlan
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import read_json_object

_CARD = """---
base_model: {base}
library_name: transformers
tags: [qlora]
---

# {base} with an adapter merged in

Merged by qlora_lightning {onto}, {dtype}; `merge.json` holds the check against base and adapter. Load it with plain
transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""


class TensorSink(Protocol):
    """Takes tensors by name, one after the other."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Take the next one."""

    def finish(self) -> Any:
        """Write what is left."""


class RoundingShards:
    """Shards of tensors rounded to a dtype.

    Args:
        folder: Where to.
        dtype: Of what is stored.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._writer, self._dtype = ShardWriter(folder), dtype

    def add(self, name: str, tensor: Tensor) -> None:
        """Round and take a tensor.

        Raises:
            UserError: A weight is too large for the dtype.
        """
        rounded = tensor.to(self._dtype)
        if self._dtype == torch.float16 and not torch.isfinite(rounded).all():
            raise UserError(f"--dtype fp16: {name} holds a weight beyond what fp16 can say. Take --dtype bf16.")
        self._writer.add(name, rounded)

    def finish(self) -> None:
        """Write what is left."""
        self._writer.finish()


def write_tensors(plan: MergePlan, merged: Weights, sinks: Sequence[TensorSink], advance: Callable[[], object]) -> None:
    """Make every tensor of the merged model once, and hand it to all sinks.

    Args:
        plan: Names them.
        merged: Gives them.
        sinks: Where they go.
        advance: Called after every tensor.
    """
    for name in plan.shapes:
        tensor = merged(name)
        for sink in sinks:
            sink.add(name, tensor)
        advance()
    for sink in sinks:
        sink.finish()


def write_companions(source: AdapterSource, folder: Path, dtype: torch.dtype, out: Path, onto: str) -> None:
    """Write all that belongs to a model beside its weights; tokenizer and stop tokens are the adapter's.

    Args:
        source: The adapter.
        folder: Where to.
        dtype: Of the weights.
        out: The folder's name in the end, for its card.
        onto: Which weights the adapter was merged onto, in words.
    """
    generation = _first(source, "generation_config.json")
    if generation is not None:
        shutil.copyfile(generation, folder / "generation_config.json")
    config = read_config(source.base.folder, source.base.name)
    config = {name: value for name, value in config.items() if name not in ("quantization_config", "torch_dtype")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    remedy = "It names the stop tokens: mend or delete it."
    settings = {} if generation is None else read_json_object(generation, remedy)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if settings.get(name) is not None:
            config[name] = settings[name]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    holder = _first(source, "tokenizer.json", "tokenizer_config.json")
    if holder is None:
        raise UserError(f"Neither {source.folder} nor {source.base.folder} holds a tokenizer. Copy one into the first.")
    tokenizer = load_tokenizer(str(holder.parent))
    choose_chat_template(tokenizer, None)  # refuses one that is damaged
    tokenizer.save_pretrained(folder)
    card = _CARD.format(
        base=source.identity.get("base", source.base.name), onto=onto, dtype=config["dtype"], folder=out
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _first(source: AdapterSource, *names: str) -> Path | None:
    """Find a file of the adapter folder, or else of the base."""
    places = (place / name for place in (source.folder, source.base.folder) for name in names)
    return next((place for place in places if place.is_file()), None)
