"""Whether a merged model computes what base and adapter computed, in fp32, on validation rows."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig

from qlora_lightning.base.folder import BaseFolder
from qlora_lightning.base.gguf import silence_transformers
from qlora_lightning.commands.adapter_config import add_config
from qlora_lightning.commands.options import quiet_lightning
from qlora_lightning.commands.training import QLoRACLI
from qlora_lightning.data.batches.collate import collate_rows
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.evaluation.judge import steps_bar
from qlora_lightning.model.build import meta_base
from qlora_lightning.model.layers.attention import register_flat_attention
from qlora_lightning.model.opened_adapter import AdapterSource
from qlora_lightning.model.weights.base import OriginalWeights, Weights
from qlora_lightning.model.weights.layerwise import Comparison, Reference, labels_of, run_layerwise
from qlora_lightning.model.weights.merging import MergedWeights, MergePlan
from qlora_lightning.support.errors import UserError

_MIN_TOP1 = 0.995  # of a merge in fp32: what is computed twice in another order may turn over a tie
_MAX_KL = {"exact": 1e-3, "rounded": 1e-2, "original": 0.5}
_BATCH_TOKENS = 1_024  # one layer's activations of a batch exist at a time
_LOGIT_BYTES = 500_000_000  # the reference's logits are kept


@dataclass(frozen=True)
class Verdict:
    """One model against base and adapter.

    Attributes:
        name: of the model.
        comparison: with base and adapter.
        max_kl: the divergence above which the merge is rejected.
        min_top1: the agreement below which it is rejected.
    """

    name: str
    comparison: Comparison
    max_kl: float = math.inf
    min_top1: float = 0.0

    @property
    def fault(self) -> str | None:
        """What is wrong with it; None if nothing is."""
        found = self.comparison
        if not found.kl <= self.max_kl:  # NaN is a fault
            return f"{self.name}: KL {found.kl:.2g} nats per token, more than {self.max_kl:g}"
        if found.top1 < self.min_top1:
            return f"{self.name}: the same top token for {found.top1:.1%} of the tokens, fewer than {self.min_top1:.1%}"
        return None


@dataclass
class Check:
    """What a check found.

    Attributes:
        rows: validation rows.
        labelled_tokens: tokens in them that were compared.
        loss: of base and adapter.
        verdicts: on each model that was compared with them.
    """

    rows: int = 0
    labelled_tokens: int = 0
    loss: float = math.nan
    verdicts: list[Verdict] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        counts = {"rows": self.rows, "labelled_tokens": self.labelled_tokens, "base + adapter": {"loss": self.loss}}
        return counts | {verdict.name: dataclasses.asdict(verdict.comparison) for verdict in self.verdicts}

    def print(self, console: Console) -> None:
        """Print the table."""
        title = (
            f"Against base + adapter, in fp32: {self.rows} validation rows, {self.labelled_tokens:,} labelled tokens"
        )
        table = Table(title=title, title_justify="left")
        table.add_column("", no_wrap=True)
        for heading in ("loss", "KL", "same top token", "logits differ by"):
            table.add_column(heading, justify="right")
        table.add_row("base + adapter", f"{self.loss:.4f}", *3 * ("",))
        for verdict in self.verdicts:
            found = verdict.comparison
            cells = (f"{found.loss:.4f}", f"{found.kl:.1e}", f"{found.top1:.2%}", f"{found.mean_difference:.1e}")
            table.add_row(verdict.name, *cells, style="red" if verdict.fault else None)
        console.print(table)

    def reject_faults(self) -> None:
        """Raise a UserError if a model differs by too much."""
        faults = [verdict.fault for verdict in self.verdicts if verdict.fault]
        if faults:
            raise UserError(
                f"The merged model is not kept: it differs from base and adapter ({'; '.join(faults)}). Merge in fp32 "
                "or onto the dequantized base, or allow more with --max-kl."
            )


def check_model(
    options: argparse.Namespace,
    source: AdapterSource,
    plan: MergePlan,
    dequantized: Weights | None,
    original: Weights | None,
    folder: Path,
    gguf_file: Path | None,
    batches: Sequence[Mapping[str, Any]],
) -> Check:
    """Compare what was written, and for comparison the merge onto either base in fp32, with base and adapter.

    Models run layer by layer, so that no whole one is in memory.

    Args:
        options: of the command.
        source: the adapter.
        plan: the base's shapes with the adapter on them.
        dequantized: the base's weights as the adapter saw them, if that is known.
        original: the base's weights before they were quantized, if they are there.
        folder: what was written.
        gguf_file: likewise, if it was asked for.
        batches: of validation rows.
    """
    exact = options.onto == "dequantized" and options.dtype == "fp32"
    max_kl = _MAX_KL["original" if options.onto == "original" else "exact" if exact else "rounded"]
    max_kl = max_kl if options.max_kl is None else options.max_kl
    trained = dequantized or original
    assert trained is not None

    def merged_onto(weights: Weights) -> tuple[Any, Weights]:
        return meta_base(source.base.folder), MergedWeights(plan, weights)

    def written() -> tuple[Any, Weights]:
        return meta_base(folder), OriginalWeights(BaseFolder(str(folder), folder, "folder", None))

    models: list[tuple[str, Callable[[], tuple[Any, Weights]], float, float]] = []
    if dequantized is not None:
        # the merge itself, whatever is written: if it differed, the arithmetic would be wrong
        models.append(("onto dequantized, fp32", lambda: merged_onto(trained), _MAX_KL["exact"], _MIN_TOP1))
    if original is not None and source.quantization != "none":  # of which both are one
        models.append(("onto original, fp32", lambda: merged_onto(original), math.inf, 0.0))
    name = f"written: onto {options.onto}, {options.dtype}"
    models.append((name, written, max_kl, _MIN_TOP1 if exact else 0.0))
    if gguf_file is not None:
        kl_of_gguf = max(max_kl, _MAX_KL["rounded"])
        models.append((f"written: {gguf_file.name}", lambda: _open_gguf(gguf_file, folder), kl_of_gguf, 0.0))

    labels = labels_of(batches)
    with steps_bar("checking", (1 + len(models)) * plan.config.num_hidden_layers) as watch:

        def run(model: Any, weights: Weights) -> Any:
            return run_layerwise(model, weights, batches, lambda: watch(1))

        reference = Reference(run(plan.model.get_base_model(), trained), labels)
        check = Check(sum(len(batch["row_ids"]) for batch in batches), len(labels), reference.loss)
        for name, open_model, max_kl, min_top1 in models:
            check.verdicts.append(Verdict(name, reference.compare(run(*open_model())), max_kl, min_top1))
    return check


def _open_gguf(file: Path, folder: Path) -> tuple[Any, Weights]:
    """Load a GGUF file as transformers reads it: the whole model in memory, in fp32, and nothing left to fill in."""
    with silence_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=meta_base(folder).config,  # transformers reads no llama3 rope scaling in a GGUF
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            attn_implementation=register_flat_attention(),
            local_files_only=True,
        )
    return model.eval(), dict[str, Tensor]().__getitem__


# ---- rows ------------------------------------------------------------------------------------------------------------


def read_rows(options: argparse.Namespace, adapter: Path, vocabulary: int) -> list[Mapping[str, Any]]:
    """Prepare validation rows as the run did, and lay ``--rows`` of them, evenly spaced, into flat batches.

    Fewer are taken if their logits, each as wide as the vocabulary, would need much memory.
    """
    arguments = add_config(adapter, options.fit)
    if options.base is not None:
        arguments += ["--model.base", options.base]
    with quiet_lightning():
        data: Any = QLoRACLI(arguments, with_trainer=False).datamodule
        data.setup("validate")
        return _lay_out(data.samples["val"], options.rows, _LOGIT_BYTES // (4 * vocabulary))


def _lay_out(samples: SampleSet, count: int, budget: int) -> list[Mapping[str, Any]]:
    """Lay rows into batches, with at most ``budget`` labelled tokens in all; the first row is always taken."""
    lengths, labelled = samples.lengths, samples.labelled_counts
    batches: list[list[int]] = [[]]
    tokens = compared = 0
    for row in np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples)), dtype=int)).tolist():
        if compared and compared + labelled[row] > budget:
            break
        if batches[-1] and tokens + lengths[row] > _BATCH_TOKENS:
            batches.append([])
            tokens = 0
        batches[-1].append(row)
        tokens, compared = tokens + int(lengths[row]), compared + int(labelled[row])
    if not compared:
        raise UserError("The validation rows have no labelled token to check the merged model on. Add --rows 0.")
    return [collate_rows(samples, rows) for rows in batches]
