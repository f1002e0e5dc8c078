"""``qlora-lightning merge``: merge an adapter into its base, checked against both."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jsonargparse.typing import NonNegativeInt

from qlora_lightning.commands.adapter import add_config
from qlora_lightning.commands.options import OptionParser, expand_path, quiet_lightning
from qlora_lightning.data.chat.templates import find_stop_ids
from qlora_lightning.sources import folders
from qlora_lightning.sources.tensors import IGNORED, format_bytes
from qlora_lightning.support.console import progress_counter, say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import MERGE_RECORD, naming_file, read_json_object, set_usual_mode, write_whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qlora_lightning.commands.adapter import AdapterSource
    from qlora_lightning.model.merge import MergePlan, Weights

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_K_QUANTS = ("q4_k_m", "q5_k_m", "q6_k")  # quantized from f16 by llama.cpp's own program
# Share that is kept of an adapter's gain in loss, for GSM8K on SmolLM2-135M: the table is in README.md.
_KEPT = {"f16": "100 %", "q8_0": "99.8 %", "q6_k": "99.4 %", "q5_k_m": "96.2 %", "q4_k_m": "96.8 %"}
_MAX_KL, _MAX_KL_OF_GGUF = 1e-2, {"q4_k_m": 0.25, "q5_k_m": 0.15, "q6_k": 0.05}  # nats per token
_LOGIT_BYTES = 200_000_000  # the reference's logits are kept: 1,000 tokens of 50,000 numbers
_DESCRIPTION = """Merge an adapter into its base: a folder for transformers, vLLM and others, and a GGUF file if asked.

Layer by layer, in fp32, never into 4 bits, onto the dequantized base that the adapter was trained on. The result is
compared with base and adapter on validation rows, and kept only if they agree; merge.json in it has the figures."""
_EPILOG = """examples:
  qlora-lightning merge --adapter runs/quickstart/adapter --out runs/quickstart/merged
  qlora-lightning merge --adapter runs/quickstart/adapter --out runs/quickstart/gguf --gguf q8_0 --rows 16

The validation rows are those of the run's config.yaml beside the adapter folder; --config FILE, or options of fit such
as --data.val FILE, name others. q4_k_m, q5_k_m and q6_k are quantized by llama.cpp's own program llama-quantize; where
it is not on the PATH, f16 is written, and the command that quantizes it is printed."""


def main(argv: Sequence[str]) -> int:
    """Merge an adapter; return the exit code."""
    parser = OptionParser("merge", _DESCRIPTION, _EPILOG, fit=True)
    add = parser.add_argument
    add("--adapter", required=True, metavar="DIR", help="the adapter folder, or the run folder around it")
    add("--out", required=True, type=expand_path, metavar="DIR", help="the folder to write")
    add("--base", metavar="NAME", help="the base, if it is no longer found under the name it was trained under")
    add("--dtype", choices=tuple(_DTYPES), default="bf16", help="of the weights that are written (default: bf16)")
    gguf_help = "write a GGUF file for llama.cpp, and a Modelfile for Ollama, too"
    add("--gguf", choices=(*_K_QUANTS, "q8_0", "f16"), help=gguf_help)
    rows_help = "validation rows to check on (default: 8; 0: no check)"
    add("--rows", type=NonNegativeInt, default=8, metavar="N", help=rows_help)
    add("--force", action="store_true", help="replace a folder that an earlier merge wrote")
    options, fit_options = parser.parse_known_args(argv)
    if fit_options and not options.rows:
        parser.error(f"unrecognized arguments: {' '.join(fit_options)} (options of fit choose rows to check on)")
    if options.out.exists() and not (options.force and (options.out / MERGE_RECORD).is_file()):
        raise UserError(
            f"--out {options.out} exists: choose another folder. --force replaces one that an earlier merge wrote "
            f"(with {MERGE_RECORD} in it).",
            "out.exists",
        )
    folders.read_identity(folders.find_adapter_folder(options.adapter))  # a misspelt folder is reported at once
    _merge(options, fit_options)
    return 0


def _merge(options: argparse.Namespace, fit_options: Sequence[str]) -> None:
    """Merge an adapter into its base, check the result, and write it into a folder, in place of an earlier merge."""
    import torch

    from qlora_lightning.commands.adapter import find_adapter
    from qlora_lightning.commands.gguf_files import architecture_of, check_gguf
    from qlora_lightning.model.merge import TrainedWeights, plan_merge

    source, out, dtype = find_adapter(options.adapter, options.base), options.out, _DTYPES[options.dtype]
    plan = plan_merge(source.base.folder, source.folder)
    base_files = folders.TensorFiles(source.base.folder, source.base.name)
    if source.quantization is None:
        say(f"{source.folder} does not say how its base was quantized: it is merged onto the weights as they are.")

        def weights(name: str) -> Tensor:
            return base_files.read(plan.stored_names.get(name, name))
    else:
        quantization = (source.quantization, source.double_quant, source.compute_dtype)
        weights = TrainedWeights(source.base, *quantization, plan.transposed, plan.stored_names)
    if options.gguf is not None:
        architecture_of(plan.config)  # raises before the work
    batches = []
    if options.rows:
        arguments = [*fit_options, *([] if options.base is None else ["--model.base", options.base])]
        batches = _sample_validation_rows(source.folder, options.rows, arguments, plan.config.vocab_size)
    figures: dict[str, Any] = {
        "adapter": str(source.folder),
        "base": source.identity.get("base", source.base.name),
        "fingerprint": source.identity.get("fingerprint"),
        "dtype": dtype,
    }
    with naming_file(out), _atomic_folder(out) as folder:
        _write_companions(source, folder, dtype)
        if options.gguf:
            check_gguf(folder, plan, source.base)
        _write_weights(plan, weights, base_files, folder, getattr(torch, dtype))
        gguf_file = _write_gguf(source, plan, folder, options.gguf) if options.gguf else None
        files = sorted(file for file in folder.rglob("*") if file.suffix in (".safetensors", ".gguf"))
        figures["files"] = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
        figures["check"] = _check_written(source, folder, gguf_file, batches) if batches else None
        write_whole(folder / MERGE_RECORD, figures)
    for name, size in figures["files"].items():
        say(f"{out / name}  {format_bytes(size)}")
    if gguf_file is not None:
        _explain_gguf(out / "gguf" / gguf_file.name, options.gguf)


# ---- the folder ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces ``target`` at the end; if anything fails, it is removed."""
    folder = Path(os.path.realpath(target))
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a merge that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if (folder / MERGE_RECORD).is_file():  # by --force
            shutil.rmtree(folder)
        os.replace(unfinished, folder)  # fails if another process has filled a folder of that name
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_weights(
    plan: MergePlan, weights: Weights, files: folders.TensorFiles, folder: Path, dtype: torch.dtype
) -> None:
    """Merge tensor by tensor, and write the shards; what is no weight of the text model is copied as it is."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    from qlora_lightning.model.merge import MergedWeights

    merged, merged_name = MergedWeights(plan, weights), dict[str, str]()  # by the name that is written
    shapes, tensors = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, shape in plan.shapes.items():
        parts = plan.publish(name, torch.empty(shape, dtype=dtype, device="meta"))
        shapes |= parts
        merged_name |= dict.fromkeys(parts, name)
    shapes |= {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in plan.copied.items()}
    shards = split_torch_state_dict_into_shards(shapes, max_shard_size=2_000_000_000)
    with progress_counter("merging", len(shapes)) as advance:
        for shard, names in shards.filename_to_tensors.items():
            for name in names:
                if name in plan.copied:
                    tensors[name] = files.read(name)
                elif name not in tensors:
                    tensors |= plan.publish(merged_name[name], merged(merged_name[name]).to(dtype))
                advance(1)
            written = {name: tensors.pop(name).contiguous() for name in names}
            save_file(written, folder / shard, {"format": "pt"})
            set_usual_mode(folder / shard)  # a server may run as another user
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_whole(folder / "model.safetensors.index.json", index)


def _write_companions(source: AdapterSource, folder: Path, dtype: str) -> None:
    """Write config and tokenizer, the files beside the weights; tokenizer and stop tokens are the adapter's."""
    from transformers import GenerationConfig

    config = folders.read_config(source.base.folder, source.base.name)
    dropped = {"quantization_config", "torch_dtype", "auto_map", *folders.FIXED_KEYS}  # some name code
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
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        if (file := source.base.folder / name).is_file():  # of what else than text a model reads
            settings = read_json_object(file, "Copy it from where the base came from.")
            write_whole(folder / name, {key: value for key, value in settings.items() if key != "auto_map"})
    write_whole(folder / "config.json", config)
    _check_links(source.tokenizer_folder)
    folders.load_tokenizer(str(source.tokenizer_folder)).save_pretrained(folder)


def _check_links(folder: Path) -> None:
    """Reject files of a tokenizer that are links out of its folder: what they lead to would be copied."""
    root = folder.resolve()
    root = root.parents[1] if root.parent.name == "snapshots" else root  # the hub's cache links to its blobs
    for file in [*folder.glob("*token*"), *folder.rglob("*.jinja")]:
        if not file.resolve().is_relative_to(root):
            raise UserError(
                f"{file} is a link to {file.resolve()}, which merge would copy: put the file itself there.",
                "tokenizer.link",
            )


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def _write_gguf(source: AdapterSource, plan: MergePlan, folder: Path, kind: str) -> Path:
    """Write a merged model as a GGUF file of a kind, or f16 without a program that makes it, and its Modelfile."""
    from qlora_lightning.commands.gguf_files import write_gguf

    file = write_gguf(folder, plan, "f16" if kind in _K_QUANTS else kind, source.base)
    if kind in _K_QUANTS and shutil.which("llama-quantize"):
        half, file = file, file.with_name(f"model-{kind}.gguf")
        command = ["llama-quantize", str(half), str(file), kind.upper()]
        process = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if process.returncode:
            message = f"--gguf {kind}: llama-quantize failed:\n{process.stderr or process.stdout}"
            raise UserError(message, "gguf.llama_quantize")
        half.unlink()
    tokenizer = folders.load_tokenizer(str(folder))
    stops = (tokenizer.decode([token_id]) for token_id in sorted(find_stop_ids(tokenizer)))
    # in JSON's quotes a token cannot end its line
    lines = [f"FROM ./{file.name}", *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops)]
    system = ((source.identity.get("data") or {}).get("settings") or {}).get("system")
    if system and '"""' not in f'{system}"':  # Ollama unescapes nothing in its quotes
        lines.append(f'SYSTEM """{system}"""')
    # Ollama takes the chat template from the file, if it knows that
    (file.parent / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _explain_gguf(file: Path, kind: str) -> None:
    """Print the commands that run a GGUF file."""
    quantized = file.with_name(f"model-{kind}.gguf")
    if file != quantized:
        say("llama-quantize of llama.cpp is not on the PATH. It quantizes:")
        say(f"    llama-quantize {file} {quantized} {kind.upper()}")
    say(f"Of an adapter for GSM8K on SmolLM2-135M, {kind} kept {_KEPT[kind]} of the gain in loss.")
    say("Run it with llama.cpp or Ollama:")
    say(f"    llama-cli -m {file}")
    say(f"    ollama create my-model -f {file.parent / 'Modelfile'}")


# ---- agreement -------------------------------------------------------------------------------------------------------


def _sample_validation_rows(
    adapter: Path, count: int, fit_options: Sequence[str], vocabulary: int
) -> list[Mapping[str, Any]]:
    """Prepare validation rows as the run did, and return so many of them, evenly spaced, each as a packed batch.

    Fewer are taken if their logits, each as wide as the vocabulary, would need much memory.
    """
    from qlora_lightning.commands.fit import QLoRACLI
    from qlora_lightning.data.batches import collate_rows
    from qlora_lightning.evaluation.row_results import spread

    try:
        arguments = add_config(adapter, fit_options)
        with quiet_lightning():
            data: Any = QLoRACLI(arguments).datamodule
            data.setup("validate")
    except UserError as error:
        message = f"No rows to check the merge on. {error} Or add --rows 0: it is written unchecked."
        raise UserError(message, error.key) from error
    samples = data.samples["val"]
    rows = spread(range(len(samples)), count)
    n_labelled = np.cumsum(samples.labelled_counts[rows])
    rows = rows[: max(1, int(np.searchsorted(n_labelled, _LOGIT_BYTES // (4 * vocabulary), side="right")))]
    return [collate_rows(samples, [row]) for row in rows]


def _check_written(
    source: AdapterSource, folder: Path, gguf_file: Path | None, batches: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Load the merged models with transformers, one after the other, and compare them with base and adapter."""
    from qlora_lightning.commands.adapter import open_adapter

    module = open_adapter(dataclasses.replace(source, quantization=source.quantization or "none"))
    with module.autocast(whole=True):
        reference, labels = _compute_logits(module.model, batches)
    del module  # before the merged model is loaded
    loss = compare_logits(reference, reference, labels)["loss"]
    say(f"Checked on {len(batches)} validation rows, {len(labels):,} labelled tokens: base + adapter: loss {loss:.4f}")
    figures: dict[str, Any] = {"rows": len(batches), "labelled_tokens": len(labels), "base + adapter": {"loss": loss}}
    for file in (None, gguf_file) if gguf_file else (None,):
        name, kind = ("merged", "") if file is None else (file.name, file.stem.removeprefix("model-"))
        logits, _ = _compute_logits(_load_written(folder, file), batches)
        agreement = figures[name] = compare_logits(reference, logits, labels)
        say(f"  {name}: loss {agreement['loss']:.4f}, KL {agreement['kl']:.1e}, same top token {agreement['top1']:.2%}")
        limit = _MAX_KL_OF_GGUF.get(kind, _MAX_KL)
        if not agreement["kl"] <= limit:  # NaN is a fault
            raise UserError(
                f"The merged model is not kept: {name} differs from base and adapter (KL {agreement['kl']:.2g} nats "
                f"per token, more than {limit:g}). Merge in fp32, or choose a --gguf type of more bits.",
                "merge.differs",
            )
    return figures


def _load_written(folder: Path, gguf_file: Path | None) -> Any:
    """Load a merged model, or its GGUF file, with transformers: in fp32 if the hardware multiplies slowly otherwise."""
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, GgufConfig

    from qlora_lightning.commands.gguf_files import architecture_of
    from qlora_lightning.model.load.machine import choose_compute_dtype, free_bytes
    from qlora_lightning.model.load.wrapped import is_wrapper

    gc.collect()  # the previous model is in reference cycles
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weight_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if device.type == "cuda" and 1.2 * weight_bytes > free_bytes(device):  # a card that held the base in 4 bits
        device = torch.device("cpu")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    is_fast = device.type == "cuda" or config.dtype == choose_compute_dtype("auto", device)
    options: dict[str, Any] = {"dtype": config.dtype if is_fast else torch.float32, "device_map": {"": device}}
    if gguf_file is not None:
        # from a file's own config transformers reads neither scaled rotary embeddings nor Qwen3's size of heads
        kind = gguf.MODEL_ARCH_NAMES[architecture_of(config)]
        config, folder = AutoConfig.for_model(**{**config.to_dict(), "model_type": kind}), gguf_file.parent
        options |= {"gguf_file": gguf_file.name, "quantization_config": GgufConfig(dequantize=True)}
    auto_class = AutoModelForMultimodalLM if is_wrapper(config) else AutoModelForCausalLM
    return auto_class.from_pretrained(folder, config=config, local_files_only=True, **options).eval()


def _compute_logits(model: Any, batches: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """Run each sample of packed batches alone through a causal language model's own forward.

    Returns the logits ``(labelled tokens, vocabulary)`` that predict the labels, in fp32 on the CPU, and the labels.
    """
    import torch

    device = next(model.parameters()).device
    logits, labels = [], []
    for batch in batches:
        for start, end in itertools.pairwise(batch["cu_seqlens"].tolist()):
            next_labels = batch["labels"][0, start + 1 : end]
            predict_index = (next_labels != IGNORED).nonzero()[:, 0]
            input_ids = batch["input_ids"][:, start:end].to(device)
            with torch.no_grad():
                output = model(input_ids=input_ids, logits_to_keep=predict_index.to(device), use_cache=False)
            logits.append(output.logits[0].float().cpu())
            labels.append(next_labels[predict_index])
    return torch.cat(logits), torch.cat(labels)


def compare_logits(reference: Tensor, logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Compare a model's logits ``(tokens, vocabulary)`` with a reference's at the same labelled tokens.

    Returns:
        ``loss``, the mean negative log-likelihood of the labels, and ``kl``, the mean Kullback-Leibler divergence of
        the model from the reference, in nats; ``top1``, the share of tokens at which both put the same token first.
    """
    import torch.nn.functional as F

    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).clamp_min(0)  # rounding may go below
    same_top = reference.argmax(-1) == logits.argmax(-1)
    return {"loss": float(F.nll_loss(log_q, labels)), "kl": float(kl), "top1": float(same_top.float().mean())}
