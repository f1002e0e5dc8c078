"""The merge from end to end: weights, config and tokenizer into a folder that is whole or not there."""

import argparse
import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from qlora_lightning.base.cache import check_entry
from qlora_lightning.base.folder import TensorFiles, load_tokenizer, read_config
from qlora_lightning.base.tensors import format_bytes
from qlora_lightning.commands.merge import DTYPES, K_QUANTS, RECORD
from qlora_lightning.commands.merge.agreement import check_written, sample_validation_rows
from qlora_lightning.commands.merge.gguf_files import GGUFModelWriter, architecture_of
from qlora_lightning.commands.options import write_output
from qlora_lightning.data.chat.tokenizer import find_stop_ids
from qlora_lightning.model.load.build import AdapterSource, find_adapter
from qlora_lightning.model.merge import MergedWeights, MergePlan, TrainedWeights, Weights, plan_merge
from qlora_lightning.support.console import progress_counter, say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import flush, read_json_object, set_usual_mode

_SHARD_BYTES = 2_000_000_000


def merge(options: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    source = find_adapter(options.adapter, options.base)
    if options.onto == "original" and source.is_stored_quantized:
        raise UserError(f"--onto original: {source.base.name} is stored quantized; it has no weights from before.")
    if options.onto == "dequantized" and source.quantization is None:
        raise UserError(
            f"{source.folder} does not say how its base was quantized (no qlora_lightning.json), so the dequantized "
            "base that it was trained on is unknown. Add --onto original."
        )
    weights: Weights = TensorFiles(source.base.folder, source.base.name).read
    if options.onto == "dequantized" and source.quantization is not None:
        weights = TrainedWeights(source.base, source.quantization, source.double_quant, source.compute_dtype)
    check_entry(source.base.folder)  # of an unpacked GGUF
    plan = plan_merge(source.base.folder, source.folder)
    if options.gguf is not None:
        architecture_of(plan.config)  # before the work
    began = time.monotonic()
    batches = sample_validation_rows(options, source.folder, plan.config.vocab_size) if options.rows else []
    figures: dict[str, Any] = {
        "adapter": str(source.folder),
        "base": source.identity.get("base", source.base.name),
        "fingerprint": source.identity.get("fingerprint"),
        "out": str(options.out),
        "onto": options.onto,
        "dtype": DTYPES[options.dtype],
    }
    with _whole_folder(options.out) as folder:
        _write_companions(source, folder, options)
        gguf_file = _write_weights(source, plan, weights, folder, options)
        if gguf_file is not None:
            write_modelfile(gguf_file, load_tokenizer(str(folder)))
            how = _how_to_run(gguf_file.relative_to(folder), options.gguf)
            card = f"# {options.out.name}\n\n{figures['base']} with an adapter merged into it.\n\n{how}\n"
            (folder / "README.md").write_text(card, encoding="utf-8")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        figures["files"] = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
        figures["check"] = check_written(options, source, folder, gguf_file, batches) if batches else None
        figures["seconds"] = round(time.monotonic() - began, 1)
        write_output(folder / RECORD, figures)
    if options.json is not None:
        write_output(options.json, figures)
    for name, size in figures["files"].items():
        if name.endswith((".safetensors", ".gguf")):
            say(f"{options.out / name}  {format_bytes(size)}")
    if gguf_file is not None:
        say(_how_to_run(options.out / "gguf" / gguf_file.name, options.gguf))
        if ((source.identity.get("data") or {}).get("settings") or {}).get("system"):
            say("It was trained with a system prompt, which the Modelfile does not hold: add it there as SYSTEM.")


def write_modelfile(file: Path, tokenizer: Any) -> None:
    """Write a ``Modelfile`` for Ollama beside a GGUF file; the chat template it finds in the file, if it knows it."""
    stops = (tokenizer.decode([number]) for number in sorted(find_stop_ids(tokenizer)))
    lines = (f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop and stop.isprintable())
    (file.parent / "Modelfile").write_text("\n".join([f"FROM ./{file.name}", *lines]) + "\n", encoding="utf-8")


def _how_to_run(file: Path, kind: str) -> str:
    """Return the commands that run a GGUF file, for the terminal and as Markdown."""
    lines = [
        f"Run it with llama.cpp:\n\n    llama-cli -m {file}\n",
        f"or with Ollama:\n\n    ollama create my-model -f {file.parent / 'Modelfile'}\n    ollama run my-model\n",
        "Ollama has templates of its own, and chooses the one that resembles the file's chat template. If "
        "`ollama show --template my-model` shows only {{ .Prompt }}, it has found none: use llama.cpp.",
    ]
    wanted = file.with_name(f"model-{kind}.gguf")
    if file != wanted:
        command = f"llama-quantize {file} {wanted} {kind.upper()}"
        lines.insert(0, f"llama-quantize of llama.cpp is not on the PATH. It quantizes:\n\n    {command}\n")
    return "\n".join(lines)


@contextlib.contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target``, whose place it takes at the end; if anything fails, it is removed.

    A link is followed: the folder that it leads to is replaced.
    """
    folder = Path(os.path.realpath(target))
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a merge that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for file in [*unfinished.rglob("*"), unfinished]:
            flush(file)
        if (folder / RECORD).is_file():  # by --force
            shutil.rmtree(folder)
        os.replace(unfinished, folder)  # fails if another process has filled a folder of that name
        flush(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_weights(
    source: AdapterSource, plan: MergePlan, weights: Weights, folder: Path, options: argparse.Namespace
) -> Path | None:
    """Merge tensor by tensor, write each into the shards and the GGUF file, and return that file if there is one."""
    dtype: torch.dtype = getattr(torch, DTYPES[options.dtype])
    merged = MergedWeights(plan, weights)
    shapes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in plan.shapes.items()}
    # a larger tensor would change the order
    shard_bytes = max(_SHARD_BYTES, *(each.nbytes for each in shapes.values()))
    shards = split_torch_state_dict_into_shards(shapes, max_shard_size=shard_bytes)
    writer = None
    if options.gguf is not None:
        # in a folder of its own: beside a tokenizer's files transformers misreads the tokenizer in a GGUF
        kind = "f16" if options.gguf in K_QUANTS else options.gguf
        file = folder / "gguf" / f"model-{kind}.gguf"
        file.parent.mkdir()
        writer = GGUFModelWriter(file, plan, kind, folder, source.base)
    with progress_counter("merging", len(plan.shapes)) as advance:
        for shard, names in shards.filename_to_tensors.items():
            tensors = {}
            for name in names:
                tensor = merged(name)
                tensors[name] = tensor.to(dtype).contiguous()
                if writer is not None:
                    writer.add(name, tensor)
                advance(1)
            save_file(tensors, folder / shard, {"format": "pt"})
            set_usual_mode(folder / shard)  # a server may be another user
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_output(folder / "model.safetensors.index.json", index)
    if writer is None:
        return None
    file = writer.finish()
    return _quantize(file, options.gguf) if options.gguf in K_QUANTS and shutil.which("llama-quantize") else file


def _quantize(file: Path, kind: str) -> Path:
    """Quantize a GGUF file of 16 bits, and return the file that takes its place."""
    target = file.with_name(f"model-{kind}.gguf")
    command = ["llama-quantize", str(file), str(target), kind.upper()]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise UserError(f"--gguf {kind}: llama-quantize failed:\n{done.stderr or done.stdout}")
    file.unlink()
    return target


def _write_companions(source: AdapterSource, folder: Path, options: argparse.Namespace) -> None:
    """Write all that belongs to a model beside its weights; tokenizer and stop tokens are the adapter's."""
    config = read_config(source.base.folder, source.base.name)
    left_out = ("quantization_config", "torch_dtype", "auto_map")  # the last names code that comes with the base
    config = {name: value for name, value in config.items() if name not in left_out}
    config["dtype"] = DTYPES[options.dtype]
    for origin in (source.base.folder, source.folder):
        generation = origin / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, folder / generation.name)
            settings = read_json_object(generation, "Copy it from where the base came from.")
            tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
            config |= {name: settings[name] for name in tokens if settings.get(name) is not None}
    write_output(folder / "config.json", config)
    load_tokenizer(str(source.tokenizer_folder)).save_pretrained(folder)
