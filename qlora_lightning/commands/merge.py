"""``qlora-lightning merge``: merge an adapter into its base, checked against both."""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt

from qlora_lightning.commands.options import OptionParser, expand_path
from qlora_lightning.sources.folders import stored_format
from qlora_lightning.sources.tensors import format_bytes
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import EXTRA, MERGE_RECORD, replacing_folder, write_whole

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_DESCRIPTION = """Merge an adapter into its base, for transformers, vLLM and others, and optionally into a GGUF file.

The adapter is merged layer by layer, in fp32, into the dequantized base that it was trained on, never into 4 bits. The
result is compared with base and adapter on validation rows, and kept only if they agree. merge.json has the figures."""
_EPILOG = """examples:
  qlora-lightning merge --adapter runs/quickstart/adapter --out runs/quickstart/merged
  qlora-lightning merge --adapter runs/quickstart/adapter --out runs/quickstart/gguf --gguf q8_0 --rows 16
  qlora-lightning merge --adapter runs/quickstart/adapter --out runs/quickstart/lora --adapter-gguf f16

The validation rows come from the run's config.yaml beside the adapter folder. To use others, pass --config FILE, or
options of fit such as --data.val FILE. q4_k_m, q5_k_m and q6_k need llama.cpp's program llama-quantize. If it is not on
the PATH, f16 is written, and the command that quantizes it is printed."""


def main(argv: Sequence[str]) -> int:
    """Merge an adapter; return the exit code."""
    parser = OptionParser("merge", _DESCRIPTION, _EPILOG, fit=True)
    add = parser.add_argument
    add("--adapter", required=True, metavar="DIR", help="the adapter folder, or the run folder around it")
    add("--out", required=True, type=expand_path, metavar="DIR", help="the folder to write")
    add("--base", metavar="NAME", help="where to find the base, if it has moved since training")
    add("--dtype", choices=tuple(_DTYPES), default="bf16", help="dtype of the merged weights (default: bf16)")
    gguf_help = "also write a GGUF file for llama.cpp, and a Modelfile for Ollama"
    add("--gguf", choices=("q4_k_m", "q5_k_m", "q6_k", "q8_0", "f16"), help=gguf_help)
    alone_help = "do not merge: write only the adapter, as a GGUF file for llama.cpp's --lora"
    add("--adapter-gguf", choices=("f16", "f32"), help=alone_help)
    rows_help = "number of validation rows to check the merge on (default: 8; 0 skips the check)"
    add("--rows", type=NonNegativeInt, default=8, metavar="N", help=rows_help)
    add("--force", action="store_true", help="replace a folder that an earlier merge wrote")
    options, fit_options = parser.parse_known_args(argv)
    if fit_options and not options.rows:
        parser.error(f"unrecognized arguments: {' '.join(fit_options)} (options of fit choose rows to check on)")
    of_merging = [name for name in ("gguf", "dtype", "rows") if getattr(options, name) != parser.get_default(name)]
    if options.adapter_gguf and (of_merging or fit_options):
        parser.error("--adapter-gguf merges and checks nothing: leave --gguf, --dtype, --rows and options of fit out")
    if options.out.exists() and not (options.force and (options.out / MERGE_RECORD).is_file()):
        raise UserError(
            f"--out {options.out} exists: choose another folder. --force replaces one that an earlier merge wrote "
            f"(with {MERGE_RECORD} in it).",
            "out.exists",
        )
    if options.adapter_gguf:
        _write_adapter(options)
    else:
        _merge(options, fit_options)
    return 0


def _write_adapter(options: argparse.Namespace) -> None:
    """Write the adapter alone as a GGUF file."""
    from qlora_lightning.model.adapters.trained import find_adapter
    from qlora_lightning.model.load.build import meta_base, put_adapters
    from qlora_lightning.model.load.wrapped import open_text_config
    from qlora_lightning.sources.folders import read_adapter_config
    from qlora_lightning.sources.gguf_writer import write_adapter

    source, name = find_adapter(options.adapter, options.base), f"adapter-{options.adapter_gguf}.gguf"
    if (source.folder / EXTRA).is_file():
        say(f"{source.folder / EXTRA}, trained beside the adapter, is not written: llama.cpp has no place for it.")
    config = open_text_config(source.base.folder, source.base.name)
    put_adapters(meta_base(copy.deepcopy(config)), source.folder)  # rejects what does not fit the base
    with replacing_folder(options.out, MERGE_RECORD) as folder:
        settings = read_adapter_config(source.folder)
        write_adapter(folder / name, source.folder, settings, config, options.adapter_gguf)
        size = (folder / name).stat().st_size
        write_whole(folder / MERGE_RECORD, {"adapter": str(source.folder), "files": {name: size}})
    say(f"{options.out / name}  {format_bytes(size)}")
    say("Run it beside a GGUF file of its base:")
    say(f"    llama-cli -m BASE.gguf --lora {options.out / name}")


def _merge(options: argparse.Namespace, fit_options: Sequence[str]) -> None:
    """Merge an adapter into its base, check the result, and write it into a folder, in place of an earlier merge."""
    import torch

    from qlora_lightning.commands.merge_check import check_written, sample_validation_rows
    from qlora_lightning.commands.merged_model import write_companions, write_modelfile, write_weights
    from qlora_lightning.model.adapters.trained import find_adapter
    from qlora_lightning.model.merge import Merge, TrainedWeights
    from qlora_lightning.sources.gguf_writer import begin_gguf, finish_gguf

    source, out, dtype = find_adapter(options.adapter, options.base), options.out, _DTYPES[options.dtype]
    quantization, compute_dtype = source.quantization, source.compute_dtype
    if quantization is None:
        say(f"{source.folder} does not say how its base was quantized: it is merged onto the weights as they are.")
        quantization, compute_dtype = "none", "float32"
    if (source.folder / EXTRA).is_file():
        say(f"{source.folder / EXTRA}, trained beside the adapter, is not merged: the base has no place for it.")
    if stored_as := stored_format(source.base.folder):
        say(f"{source.base.name} is published in {stored_as}. The merged model is written in {dtype}, which is larger.")
    plan = Merge(source.base.folder, source.folder)
    weights = TrainedWeights(source.base, plan, quantization, source.double_quant, getattr(torch, compute_dtype))
    batch = None
    if options.rows:
        arguments = [*fit_options, *([] if options.base is None else ["--model.base", options.base])]
        batch = sample_validation_rows(source.folder, options.rows, arguments, plan.config.vocab_size)
    figures: dict[str, Any] = {
        "adapter": str(source.folder),
        "base": source.identity.get("base", source.base.name),
        "fingerprint": source.identity.get("fingerprint"),
        "dtype": dtype,
    }
    with replacing_folder(out, MERGE_RECORD) as folder:
        write_companions(source, folder, dtype)
        writer = None
        if options.gguf:  # what it cannot hold is reported before the work
            writer = begin_gguf(folder, plan.config, plan.shapes, options.gguf, source.base)
        write_weights(plan, weights, source.base, folder, getattr(torch, dtype))
        gguf_file = None
        if writer is not None:
            gguf_file = finish_gguf(writer, folder, plan.config, plan.shapes, options.gguf)
            write_modelfile(gguf_file, source, folder)
        files = sorted(file for file in folder.rglob("*") if file.suffix in (".safetensors", ".gguf"))
        figures["files"] = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
        figures["check"] = check_written(source, folder, gguf_file, batch) if batch else None
        write_whole(folder / MERGE_RECORD, figures)
    for name, size in figures["files"].items():
        say(f"{out / name}  {format_bytes(size)}")
    if gguf_file is not None:
        _explain_gguf(out / "gguf" / gguf_file.name, options.gguf)


def _explain_gguf(file: Path, kind: str) -> None:
    """Print the commands that run a GGUF file."""
    quantized = file.with_name(f"model-{kind}.gguf")
    if file != quantized:
        say("llama-quantize of llama.cpp is not on the PATH. It quantizes:")
        say(f"    llama-quantize {file} {quantized} {kind.upper()}")
    say("Run it with llama.cpp or Ollama:")
    say(f"    llama-cli -m {file}")
    say(f"    ollama create my-model -f {file.parent / 'Modelfile'}")
