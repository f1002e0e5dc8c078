"""A merged model loaded again, and compared with base and adapter on validation rows."""

import dataclasses
import gc
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, GgufConfig

from qlora_lightning.commands.adapter import add_config
from qlora_lightning.commands.fit import QLoRACLI
from qlora_lightning.commands.options import quiet_lightning
from qlora_lightning.data.batches import Batch, collate_rows
from qlora_lightning.evaluation.row_results import spread
from qlora_lightning.model.adapters.trained import AdapterSource, open_adapter
from qlora_lightning.model.load.machine import choose_compute_dtype, free_bytes
from qlora_lightning.model.load.wrapped import is_wrapper
from qlora_lightning.model.module import QLoRAModule
from qlora_lightning.sources.gguf_writer import architecture_of
from qlora_lightning.sources.tensors import IGNORED
from qlora_lightning.support.console import count_of, say
from qlora_lightning.support.errors import UserError

_LOGIT_BYTES = 200_000_000  # the reference's logits are kept: 1,000 tokens of 50,000 numbers
_MAX_KL, _MAX_KL_OF_K_QUANTS = 1e-2, {"q4_k_m": 0.25, "q5_k_m": 0.15, "q6_k": 0.05}  # nats per token


def sample_validation_rows(adapter: Path, count: int, fit_options: Sequence[str], vocabulary: int) -> Batch:
    """Prepare validation rows as the run did, and return so many of them, evenly spaced, as a packed batch.

    Fewer are taken if their logits, each as wide as the vocabulary, would need much memory.
    """
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
    return collate_rows(samples, rows)


def check_written(source: AdapterSource, folder: Path, gguf_file: Path | None, batch: Batch) -> dict[str, Any]:
    """Load the merged models with transformers, one after the other, and compare them with base and adapter."""
    module = open_adapter(dataclasses.replace(source, quantization=source.quantization or "none"), QLoRAModule)
    with module.autocast(whole=True):
        reference, labels = _compute_logits(module.model, batch)
    del module  # before the merged model is loaded
    loss = compare_logits(reference, reference, labels)["loss"]
    rows = len({*batch["row_ids"].tolist()})
    checked = f"{count_of(rows, 'validation row')}, {count_of(len(labels), 'labeled token')}"
    say(f"Checked on {checked}: base + adapter: loss {loss:.4f}")
    figures: dict[str, Any] = {"rows": rows, "labelled_tokens": len(labels), "base + adapter": {"loss": loss}}
    for file in (None, gguf_file) if gguf_file else (None,):
        name, kind = ("merged", "") if file is None else (file.name, file.stem.removeprefix("model-"))
        logits, _ = _compute_logits(_load_written(folder, file), batch)
        agreement = figures[name] = compare_logits(reference, logits, labels)
        say(f"  {name}: loss {agreement['loss']:.4f}, KL {agreement['kl']:.1e}, same top token {agreement['top1']:.2%}")
        limit = _MAX_KL_OF_K_QUANTS.get(kind, _MAX_KL)
        if not agreement["kl"] <= limit:  # NaN is a fault
            raise UserError(
                f"The merged model is not kept: {name} differs from base and adapter (KL {agreement['kl']:.2g} nats "
                f"per token, more than {limit:g}). Merge in fp32, or choose a --gguf type of more bits.",
                "merge.differs",
            )
    return figures


def _load_written(folder: Path, gguf_file: Path | None) -> Any:
    """Load a merged model, or its GGUF file, with transformers: in fp32 if the hardware multiplies slowly otherwise."""
    gc.collect()  # the previous model is in reference cycles
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weight_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if device.type == "cuda" and 1.2 * weight_bytes > free_bytes(device):  # a GPU that held the base in 4 bits
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
    options |= {"use_kernels": False, "local_files_only": True}  # kernels come from the hub, since 5.25 by default
    return auto_class.from_pretrained(folder, config=config, **options).eval()


def _compute_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Run each sample of a packed batch alone through a causal language model's own forward.

    Returns the logits ``(labelled tokens, vocabulary)`` that predict the labels, in fp32 on the CPU, and the labels.
    """
    device = next(model.parameters()).device
    logits, labels = [], []
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
    """Compare a model's logits ``(tokens, vocabulary)`` with a reference's at the same labeled tokens.

    Returns:
        ``loss``, the mean negative log-likelihood of the labels, and ``kl``, the mean Kullback-Leibler divergence of
        the model from the reference, in nats; ``top1``, the share of tokens at which both put the same token first.
    """
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).clamp_min(0)  # rounding may go below
    same_top = reference.argmax(-1) == logits.argmax(-1)
    return {"loss": float(F.nll_loss(log_q, labels)), "kl": float(kl), "top1": float(same_top.float().mean())}
