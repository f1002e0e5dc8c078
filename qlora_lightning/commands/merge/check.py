"""Whether a merged model computes what base and adapter computed, in fp32, on validation rows."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_lightning.base.folder import BaseFolder
from qlora_lightning.commands.adapter_config import add_config
from qlora_lightning.commands.merge.gguf_files import GGUFWeights
from qlora_lightning.commands.options import quiet_lightning
from qlora_lightning.commands.training import QLoRACLI
from qlora_lightning.data.batches.collate import collate_rows
from qlora_lightning.evaluation.rows import steps_bar
from qlora_lightning.model.load.build import meta_base
from qlora_lightning.model.weights.base import OriginalWeights, Weights
from qlora_lightning.model.weights.layerwise import Reference, labels_of, run_layerwise
from qlora_lightning.model.weights.merging import MergePlan
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError

_MAX_KL = {"exact": 1e-3, "rounded": 1e-2, "original": 0.5, "q4_k_m": 0.25, "q5_k_m": 0.15, "q6_k": 0.05}
_BATCH_TOKENS = 1_024  # one layer's activations of a batch exist at a time
_LOGIT_BYTES = 200_000_000  # the reference's logits are kept: 1,000 tokens of 50,000 numbers


def check_written(
    options: argparse.Namespace,
    plan: MergePlan,
    trained: Weights,
    folder: Path,
    gguf_file: Path | None,
    batches: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Compare what was written with base and adapter, layer by layer, so that no whole model is in memory.

    Args:
        options: of the command.
        plan: the base's shapes with the adapter on them.
        trained: the base's weights as the adapter saw them.
        folder: what was written.
        gguf_file: likewise, if it was asked for.
        batches: of validation rows.

    Returns:
        What was found, for ``merge.json``.

    Raises:
        UserError: a model differs by too much.
    """
    is_exact = options.onto == "dequantized" and options.dtype == "fp32"
    max_kl = _MAX_KL["original" if options.onto == "original" else "exact" if is_exact else "rounded"]
    max_kl = max_kl if options.max_kl is None else options.max_kl
    weights = OriginalWeights(BaseFolder(str(folder), folder, "folder", None))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, labels, faults = sum(len(set(batch["row_ids"].tolist())) for batch in batches), labels_of(batches), []
    with steps_bar("checking", (2 + bool(gguf_file)) * plan.config.num_hidden_layers) as watch:

        def run(model: Any, weights: Weights) -> Iterator[Tensor]:
            return run_layerwise(model, weights, batches, lambda: watch(1), device)

        reference = Reference(run(plan.model.get_base_model(), trained), labels)
        found = {f"written: onto {options.onto}, {options.dtype}": reference.compare(run(meta_base(folder), weights))}
        limits = [max_kl]
        if gguf_file is not None:
            read_back = run(meta_base(folder), GGUFWeights(gguf_file, plan.config))
            found[f"written: {gguf_file.name}"] = reference.compare(read_back)
            limits.append(max(max_kl, _MAX_KL.get(options.gguf, _MAX_KL["rounded"])))
    say(f"Checked in fp32 on {rows} validation rows, {len(labels):,} labelled tokens:")
    say(f"  base + adapter: loss {reference.loss:.4f}")
    for (name, one), limit in zip(found.items(), limits, strict=True):
        say(f"  {name}: loss {one.loss:.4f}, KL {one.kl:.1e}, same top token {one.top1:.2%}")
        if not one.kl <= limit:  # NaN is a fault
            faults.append(f"{name}: KL {one.kl:.2g} nats per token, more than {limit:g}")
    if faults:
        raise UserError(
            f"The merged model is not kept: it differs from base and adapter ({'; '.join(faults)}). Merge in fp32 or "
            "onto the dequantized base, choose a --gguf type of more bits, or allow more with --max-kl."
        )
    counts = {"rows": rows, "labelled_tokens": len(labels), "base + adapter": {"loss": reference.loss}}
    return counts | {name: one._asdict() for name, one in found.items()}


def sample_validation_rows(options: argparse.Namespace, adapter: Path, vocabulary: int) -> list[Mapping[str, Any]]:
    """Prepare validation rows as the run did, and lay ``--rows`` of them, evenly spaced, into flat batches.

    Fewer are taken if their logits, each as wide as the vocabulary, would need much memory.
    """
    arguments = add_config(adapter, options.fit)
    if options.base is not None:
        arguments += ["--model.base", options.base]
    with quiet_lightning():
        data: Any = QLoRACLI(arguments, with_trainer=False).datamodule
        data.setup("validate")
        samples = data.samples["val"]
    rows = np.unique(np.linspace(0, len(samples) - 1, min(options.rows, len(samples)), dtype=int))
    compared = np.cumsum(samples.labelled_counts[rows])
    rows = rows[: max(1, np.searchsorted(compared, _LOGIT_BYTES // (4 * vocabulary), side="right"))]
    if not samples.labelled_counts[rows].any():
        raise UserError("The validation rows have no labelled token to check the merged model on. Add --rows 0.")
    batch_numbers = np.cumsum(samples.lengths[rows]) // _BATCH_TOKENS
    batches = np.split(rows, np.flatnonzero(np.diff(batch_numbers)) + 1)
    return [collate_rows(samples, batch.tolist()) for batch in batches]
