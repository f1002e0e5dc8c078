"""Whether a merged model computes what base and adapter compute, on validation rows."""

import argparse
import dataclasses
import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

from qlora_lightning.commands.adapter_config import add_config
from qlora_lightning.commands.merge.gguf_files import architecture_of
from qlora_lightning.commands.options import quiet_lightning
from qlora_lightning.commands.training import QLoRACLI
from qlora_lightning.data.batches.collate import collate_rows
from qlora_lightning.model.load.build import AdapterSource, open_adapter
from qlora_lightning.model.load.machine import choose_compute_dtype
from qlora_lightning.model.merge import compare_logits, labelled_logits
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError

_MAX_KL = {"exact": 1e-3, "rounded": 1e-2, "original": 0.5, "q4_k_m": 0.25, "q5_k_m": 0.15, "q6_k": 0.05}
_LOGIT_BYTES = 200_000_000  # the reference's logits are kept: 1,000 tokens of 50,000 numbers


def check_written(
    options: argparse.Namespace,
    source: AdapterSource,
    folder: Path,
    gguf_file: Path | None,
    batches: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Load what was written with transformers, and compare it with base and adapter, on a GPU if there is one.

    One model is in memory at a time: base and adapter first, whose logits are kept. Returns what was found, for
    ``merge.json``; raises UserError if a model differs by too much. ``gguf_file`` is in ``folder``.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained_on = dataclasses.replace(source, quantization=source.quantization or "none")
    reference, labels = labelled_logits(open_adapter(trained_on)[0].eval(), batches)
    rows = sum(len(set(batch["row_ids"].tolist())) for batch in batches)
    loss = compare_logits(reference, reference, labels).loss
    say(f"Checked on {rows} validation rows, {len(labels):,} labelled tokens:")
    say(f"  base + adapter: loss {loss:.4f}")

    is_exact = options.dtype == "fp32" and source.compute_dtype == torch.float32
    usual_kl = _MAX_KL["original" if options.onto == "original" else "exact" if is_exact else "rounded"]
    max_kl = usual_kl if options.max_kl is None else options.max_kl
    written: list[tuple[str, float, Path | None]] = [(f"onto {options.onto}, {options.dtype}", max_kl, None)]
    if gguf_file is not None:
        usual_kl = _MAX_KL.get(gguf_file.stem.removeprefix("model-"), _MAX_KL["rounded"])
        written.append((gguf_file.name, max(max_kl, usual_kl), gguf_file))
    figures: dict[str, Any] = {"rows": rows, "labelled_tokens": len(labels), "base + adapter": {"loss": loss}}
    faults = []
    for name, limit, file in written:
        logits, _ = labelled_logits(_load_written(folder, file, device), batches)
        one = compare_logits(reference, logits, labels)
        figures[f"written: {name}"] = one._asdict()
        say(f"  written: {name}: loss {one.loss:.4f}, KL {one.kl:.1e}, same top token {one.top1:.2%}")
        if not one.kl <= limit:  # NaN is a fault
            faults.append(f"written: {name}: KL {one.kl:.2g} nats per token, more than {limit:g}")
    if faults:
        raise UserError(
            f"The merged model is not kept: it differs from base and adapter ({'; '.join(faults)}). Merge in fp32 or "
            "onto the dequantized base, choose a --gguf type of more bits, or allow more with --max-kl."
        )
    return figures


def _load_written(folder: Path, gguf_file: Path | None, device: torch.device) -> Any:
    """Load a merged model, or its GGUF file, with transformers: in fp32 if the hardware multiplies slowly otherwise."""
    gc.collect()  # the model before is in circles of references
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    is_quick = device.type == "cuda" or config.dtype == choose_compute_dtype("auto", device)
    options: dict[str, Any] = {"dtype": config.dtype if is_quick else torch.float32, "device_map": {"": device}}
    if gguf_file is None:
        return AutoModelForCausalLM.from_pretrained(folder, config=config, local_files_only=True, **options).eval()
    # transformers reads of a file's own config neither scaled rotary embeddings nor, of Qwen3, the size of heads
    kind = gguf.MODEL_ARCH_NAMES[architecture_of(config)]
    of_file = AutoConfig.for_model(**{**config.to_dict(), "model_type": kind})
    options |= {"gguf_file": gguf_file.name, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, config=of_file, local_files_only=True, **options)
    if kind != config.model_type:  # a Mistral is a llama there, which has no window
        weights, model = model.state_dict(), AutoModelForCausalLM.from_config(config, dtype=model.dtype).to(device)
        model.load_state_dict(weights)
    return model.eval()


def sample_validation_rows(options: argparse.Namespace, adapter: Path, vocabulary: int) -> list[Mapping[str, Any]]:
    """Prepare validation rows as the run did, and return ``--rows`` of them, evenly spaced, each as a flat batch.

    Fewer are taken if their logits, each as wide as the vocabulary, would need much memory.
    """
    try:
        arguments = add_config(adapter, options.fit)
        if options.base is not None:
            arguments += ["--model.base", options.base]
        with quiet_lightning():
            data: Any = QLoRACLI(arguments, with_trainer=False).datamodule
            data.setup("validate")
        if "val" not in data.samples:
            raise UserError("data.val names no file.")
    except UserError as error:
        raise UserError(f"No rows to check the merge on. {error} Or add --rows 0: it is written unchecked.") from error
    samples = data.samples["val"]
    rows = np.unique(np.linspace(0, len(samples) - 1, min(options.rows, len(samples)), dtype=int))
    compared = np.cumsum(samples.labelled_counts[rows])
    rows = rows[: max(1, np.searchsorted(compared, _LOGIT_BYTES // (4 * vocabulary), side="right"))]
    if not samples.labelled_counts[rows].any():
        raise UserError(
            "The validation rows have no labelled token to check the merge on. Add --rows 0: it is written unchecked."
        )
    return [collate_rows(samples, [row]) for row in rows.tolist()]
