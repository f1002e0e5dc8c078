"""The merge from end to end: weights, config and tokenizer in a folder that is complete or absent."""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import GenerationConfig

from qlora_lightning.commands.merge import DTYPES, K_QUANTS, KEPT, RECORD
from qlora_lightning.commands.merge.agreement import check_written, sample_validation_rows
from qlora_lightning.commands.merge.gguf_files import architecture_of, check_gguf, write_gguf
from qlora_lightning.commands.opened_adapter import AdapterSource, find_adapter
from qlora_lightning.data.chat.tokenizer import find_stop_ids
from qlora_lightning.model.merge import MergedWeights, MergePlan, TrainedWeights, Weights, plan_merge
from qlora_lightning.sources.folders import FIXED_KEYS, TensorFiles, load_tokenizer, read_config
from qlora_lightning.sources.tensors import format_bytes
from qlora_lightning.support.console import progress_counter, say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import naming_file, read_json_object, set_usual_mode, write_whole

_SHARD_BYTES = 2_000_000_000


def merge(
    adapter: str | Path,
    out: Path,
    *,
    base: str | None = None,
    dtype: str = "bf16",
    gguf: str | None = None,
    rows: int = 8,
    fit_options: Sequence[str] = (),
) -> None:
    """Merge an adapter into its base, check the result, and write it into a folder, in place of an earlier merge.

    Args:
        adapter: The adapter folder, or the run folder around it.
        out: The folder to write.
        base: The base, if it is no longer found under the name it was trained under.
        dtype: Type of the weights that are written, one of ``DTYPES``.
        gguf: Kind of a GGUF file to write too: ``f16``, ``q8_0`` or one of ``K_QUANTS``.
        rows: Validation rows to check on; 0: no check.
        fit_options: Options of ``fit`` that choose them; without any they are those of the run.
    """
    source = find_adapter(adapter, base)
    plan = plan_merge(source.base.folder, source.folder)
    weights: Weights = TensorFiles(source.base.folder, source.base.name).read
    if source.quantization is None:
        say(f"{source.folder} does not say how its base was quantized: it is merged onto the weights as they are.")
    else:
        quantization = (source.quantization, source.double_quant, source.compute_dtype)
        weights = TrainedWeights(source.base, *quantization, plan.transposed)
    if gguf is not None:
        architecture_of(plan.config)  # raises before the work
    batches = []
    if rows:
        arguments = [*fit_options, *([] if base is None else ["--model.base", base])]
        batches = sample_validation_rows(source.folder, rows, arguments, plan.config.vocab_size)
    figures: dict[str, Any] = {
        "adapter": str(source.folder),
        "base": source.identity.get("base", source.base.name),
        "fingerprint": source.identity.get("fingerprint"),
        "dtype": DTYPES[dtype],
    }
    with naming_file(out), _atomic_folder(out) as folder:
        _write_companions(source, folder, DTYPES[dtype])
        if gguf:
            check_gguf(folder, plan, source.base)
        _write_weights(plan, weights, folder, getattr(torch, DTYPES[dtype]))
        gguf_file = _write_gguf(source, plan, folder, gguf) if gguf else None
        files = sorted(file for file in folder.rglob("*") if file.suffix in (".safetensors", ".gguf"))
        figures["files"] = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
        figures["check"] = check_written(source, folder, gguf_file, batches) if batches else None
        write_whole(folder / RECORD, figures)
    for name, size in figures["files"].items():
        say(f"{out / name}  {format_bytes(size)}")
    if gguf is not None and gguf_file is not None:
        _explain_gguf(out / "gguf" / gguf_file.name, gguf)


def _explain_gguf(file: Path, kind: str) -> None:
    """Print the commands that run a GGUF file."""
    quantized = file.with_name(f"model-{kind}.gguf")
    if file != quantized:
        say("llama-quantize of llama.cpp is not on the PATH. It quantizes:")
        say(f"    llama-quantize {file} {quantized} {kind.upper()}")
    say(f"Of an adapter for GSM8K on SmolLM2-135M, {kind} kept {KEPT[kind]} of the gain in loss.")
    say("Run it with llama.cpp, or with Ollama, to whose Modelfile a system prompt of the training is to be added:")
    say(f"    llama-cli -m {file}")
    say(f"    ollama create my-model -f {file.parent / 'Modelfile'}")


@contextlib.contextmanager
def _atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces ``target`` at the end; if anything fails, it is removed."""
    folder = Path(os.path.realpath(target))
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a merge that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if (folder / RECORD).is_file():  # by --force
            shutil.rmtree(folder)
        os.replace(unfinished, folder)  # fails if another process has filled a folder of that name
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_weights(plan: MergePlan, weights: Weights, folder: Path, dtype: torch.dtype) -> None:
    """Merge tensor by tensor, and write the shards."""
    merged, merged_name = MergedWeights(plan, weights), dict[str, str]()  # by the name that is written
    shapes, tensors = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, shape in plan.shapes.items():
        parts = plan.publish(name, torch.empty(shape, dtype=dtype, device="meta"))
        shapes |= parts
        merged_name |= dict.fromkeys(parts, name)
    shards = split_torch_state_dict_into_shards(shapes, max_shard_size=_SHARD_BYTES)
    with progress_counter("merging", len(shapes)) as advance:
        for shard, names in shards.filename_to_tensors.items():
            for name in names:
                if name not in tensors:
                    tensors |= plan.publish(merged_name[name], merged(merged_name[name]).to(dtype))
                advance(1)
            written = {name: tensors.pop(name).contiguous() for name in names}
            save_file(written, folder / shard, {"format": "pt"})
            set_usual_mode(folder / shard)  # a server may run as another user
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_whole(folder / "model.safetensors.index.json", index)


def _write_gguf(source: AdapterSource, plan: MergePlan, folder: Path, kind: str) -> Path:
    """Write a merged model as a GGUF file of a kind, or f16 without a program that makes it, and its Modelfile."""
    file = write_gguf(folder, plan, "f16" if kind in K_QUANTS else kind, source.base)
    if kind in K_QUANTS and shutil.which("llama-quantize"):
        file = _quantize(file, kind)
    tokenizer = load_tokenizer(str(folder))
    stops = (tokenizer.decode([token_id]) for token_id in sorted(find_stop_ids(tokenizer)))
    # in JSON's quotes a token cannot end its line
    lines = [f"FROM ./{file.name}", *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops)]
    # Ollama takes the chat template from the file, if it knows that
    (file.parent / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _quantize(file: Path, kind: str) -> Path:
    """Quantize a GGUF file of 16 bits, and return the file that replaces it."""
    target = file.with_name(f"model-{kind}.gguf")
    command = ["llama-quantize", str(file), str(target), kind.upper()]
    process = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if process.returncode:
        raise UserError(f"--gguf {kind}: llama-quantize failed:\n{process.stderr or process.stdout}")
    file.unlink()
    return target


def _write_companions(source: AdapterSource, folder: Path, dtype: str) -> None:
    """Write config and tokenizer, the files beside the weights; tokenizer and stop tokens are the adapter's."""
    config = read_config(source.base.folder, source.base.name)
    dropped = {"quantization_config", "torch_dtype", "auto_map", *FIXED_KEYS}  # some name code, or kernels of a hub
    dropped |= {f"{prefix}{part}_implementation" for prefix in ("", "_") for part in ("attn", "experts")}
    config = {name: value for name, value in config.items() if name not in dropped}
    config["dtype"] = dtype
    for origin in (source.base.folder, source.folder):
        file = origin / "generation_config.json"
        if file.is_file():
            settings = read_json_object(file, "Copy it from where the base came from.")
            # a link from elsewhere may lead to any file of the user
            settings = {name: value for name, value in settings.items() if name in vars(GenerationConfig())}
            write_whole(folder / file.name, settings)
            tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
            config |= {name: settings[name] for name in tokens if settings.get(name) is not None}
    write_whole(folder / "config.json", config)
    _check_links(source.tokenizer_folder)
    load_tokenizer(str(source.tokenizer_folder)).save_pretrained(folder)


def _check_links(folder: Path) -> None:
    """Reject files of a tokenizer that are links out of its folder: what they lead to would be copied."""
    root = folder.resolve()
    root = root.parents[1] if root.parent.name == "snapshots" else root  # the hub's cache links to its blobs
    for file in [*folder.glob("*token*"), *folder.rglob("*.jinja")]:
        if not file.resolve().is_relative_to(root):
            raise UserError(f"{file} is a link to {file.resolve()}, which merge would copy: put the file itself there.")
