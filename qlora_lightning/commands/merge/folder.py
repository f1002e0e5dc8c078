"""The merge from end to end: weights, config, tokenizer and card into a folder that is whole or not there."""

import argparse
import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qlora_lightning.base.cache import EntryCheck
from qlora_lightning.base.folder import load_tokenizer, read_config
from qlora_lightning.base.tensors import ShardWriter, format_bytes
from qlora_lightning.commands.merge import DTYPES, RECORD, check_folder
from qlora_lightning.commands.merge.check import Check, check_model, read_rows
from qlora_lightning.commands.merge.gguf_files import GGUFModelWriter, split_of_base, write_adapter
from qlora_lightning.commands.options import write_json
from qlora_lightning.data.chat.templates import choose_chat_template
from qlora_lightning.evaluation.judge import steps_bar
from qlora_lightning.model.opened_adapter import AdapterSource, find_adapter
from qlora_lightning.model.weights.base import OriginalWeights, TrainedWeights, Weights
from qlora_lightning.model.weights.merging import MergedWeights, MergePlan, plan_merge
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import flush, put_in_place, read_json_object

_GGUF = "gguf"  # a folder of its own: beside a tokenizer's files transformers misreads the tokenizer in a GGUF
_ONTO = {"dequantized": "onto the dequantized base that it was trained on", "original": "onto the original weights"}
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


def merge(options: argparse.Namespace) -> None:
    """Do what the command line asks for.

    Raises:
        UserError: the adapter, the base or an option cannot be used, or the merged model disagrees with them.
    """
    source = find_adapter(options.adapter, options.base)
    original = None if source.is_stored_quantized else OriginalWeights(source.base)
    dequantized = None
    if source.quantization is not None:
        dequantized = TrainedWeights(source.base, source.quantization, source.double_quant, source.compute_dtype)
    chosen = original if options.onto == "original" else dequantized
    if chosen is None and options.onto == "original":
        raise UserError(f"--onto original: {source.base.name} is stored quantized; it has no weights from before.")
    if chosen is None:
        raise UserError(
            f"{source.folder} does not say how its base was quantized (no qlora_lightning.json), so the dequantized "
            "base that it was trained on is unknown. Add --onto original."
        )
    EntryCheck(source.base.folder, source.base.name).wait()  # of an unpacked GGUF
    plan = plan_merge(source.base.folder, source.folder)
    title = f"{Path(source.identity.get('base', source.base.name)).name} {source.folder.absolute().parent.name}"
    if options.adapter_gguf is not None:
        unfinished = options.adapter_gguf.with_name(f"{options.adapter_gguf.name}.unfinished")
        try:
            write_adapter(unfinished, plan, title)
            put_in_place(unfinished, options.adapter_gguf)
        finally:
            unfinished.unlink(missing_ok=True)
        print(f"Adapter alone: {options.adapter_gguf}")
    if options.out is None:
        return

    began = time.monotonic()
    batches = read_rows(options, source.folder, plan.config.vocab_size) if options.rows else []
    figures: dict[str, Any] = {
        "adapter": str(source.folder),
        "base": source.identity.get("base", source.base.name),
        "fingerprint": source.identity.get("fingerprint"),
        "out": str(options.out),
        "onto": options.onto,
        "dtype": DTYPES[options.dtype],
    }
    with _whole_folder(options.out, options.force) as folder:
        _write_companions(source, folder, options)
        gguf_file = _write_weights(source, plan, chosen, folder, title, options)
        check = Check()
        if batches:
            check = check_model(options, source, plan, dequantized, original, folder, gguf_file, batches)
            check.print(Console(highlight=False))
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        figures["files"] = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
        figures["seconds"] = round(time.monotonic() - began, 1)
        figures["check"] = check.as_json() if batches else None
        write_json(folder / RECORD, figures)
        check.reject_faults()
    if options.json is not None:
        write_json(options.json, figures)
    for name, size in figures["files"].items():
        if name.endswith((".safetensors", ".gguf")):
            print(f"{options.out / name}  {format_bytes(size)}")


@contextlib.contextmanager
def _whole_folder(target: Path, force: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``target``, which takes its name at the end; if anything fails, it is removed.

    A link is followed: the folder that it leads to is replaced.
    """
    place = Path(os.path.realpath(target))
    unfinished, old = (place.with_name(f".{place.name}.{state}") for state in ("unfinished", "old"))
    shutil.rmtree(unfinished, ignore_errors=True)  # of a merge that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for file in [*unfinished.rglob("*"), unfinished]:
            flush(file)
        check_folder(target, force)  # again: a merge may take an hour
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(place, old)
        os.replace(unfinished, place)
        flush(place.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_weights(
    source: AdapterSource, plan: MergePlan, weights: Weights, folder: Path, title: str, options: argparse.Namespace
) -> Path | None:
    """Merge tensor by tensor, write each into the shards and the GGUF file, and return that file if there is one."""
    dtype: torch.dtype = getattr(torch, DTYPES[options.dtype])
    shards, gguf_file, writer = ShardWriter(folder), None, None
    if options.gguf is not None:
        gguf_file = folder / _GGUF / f"model-{options.gguf}.gguf"
        gguf_file.parent.mkdir()
        writer = GGUFModelWriter(gguf_file, plan, options.gguf, folder, title, split_of_base(source.base))
    merged = MergedWeights(plan, weights)
    with steps_bar("merging", len(plan.shapes)) as advance:
        for name in plan.shapes:
            tensor = merged(name)
            rounded = tensor.to(dtype)
            if not rounded.isfinite().all():
                raise UserError(f"--dtype {options.dtype}: {name} holds a weight that is too large. Use --dtype bf16.")
            shards.add(name, rounded)
            if writer is not None:
                writer.add(name, tensor)
            advance(1)
    shards.finish()
    if writer is not None:
        writer.finish()
    return gguf_file


def _write_companions(source: AdapterSource, folder: Path, options: argparse.Namespace) -> None:
    """Write all that belongs to a model beside its weights; tokenizer and stop tokens are the adapter's."""
    config = read_config(source.base.folder, source.base.name)
    config = {name: value for name, value in config.items() if name not in ("quantization_config", "torch_dtype")}
    config["dtype"] = DTYPES[options.dtype]
    generation = _find_file(source, "generation_config.json")
    if generation is not None:
        shutil.copyfile(generation, folder / "generation_config.json")
        settings = read_json_object(generation, "Copy it from where the base came from.")
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        config |= {name: settings[name] for name in tokens if settings.get(name) is not None}
    write_json(folder / "config.json", config)
    tokenizer_file = _find_file(source, "tokenizer.json", "tokenizer_config.json")
    if tokenizer_file is None:
        raise UserError(f"Neither {source.folder} nor {source.base.folder} holds a tokenizer. Copy one into the first.")
    tokenizer = load_tokenizer(str(tokenizer_file.parent))
    choose_chat_template(tokenizer, None)  # rejects one that is damaged
    tokenizer.save_pretrained(folder)
    base = source.identity.get("base", source.base.name)
    card = _CARD.format(base=base, onto=_ONTO[options.onto], dtype=config["dtype"], folder=options.out)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _find_file(source: AdapterSource, *names: str) -> Path | None:
    """Return a file of the adapter folder, or else of the base."""
    places = (place / name for place in (source.folder, source.base.folder) for name in names)
    return next((place for place in places if place.is_file()), None)
