"""Whether a merged model says what base and adapter said, in fp32, on validation rows."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from qlora_lightning.base.folder import BaseFolder
from qlora_lightning.base.gguf import silence_transformers
from qlora_lightning.model.build import meta_base
from qlora_lightning.model.layers.attention import register_flat_attention
from qlora_lightning.model.weights.base import OriginalWeights, Weights
from qlora_lightning.model.weights.layerwise import Comparison, Reference, labels_of, run_layerwise
from qlora_lightning.model.weights.merging import MergedWeights, MergePlan

Advance = Callable[[], object]


class Checker:
    """Compares models with base and adapter, layer by layer, so that no whole model is in memory.

    Args:
        plan: The base's shapes with the adapter on them.
        weights: What the adapter saw in training.
        batches: Validation rows.
        advance: Called after every layer of every model.
    """

    def __init__(
        self, plan: MergePlan, weights: Weights, batches: Sequence[Mapping[str, Any]], advance: Advance
    ) -> None:
        self.plan, self.batches, self.advance = plan, batches, advance
        self.labels = labels_of(batches)
        logits = run_layerwise(plan.model.get_base_model(), weights, batches, advance)
        self.reference = Reference(logits, self.labels)

    def judge_merge(self, weights: Weights, base: BaseFolder) -> Comparison:
        """Judge a merge in fp32 that is written nowhere: onto these weights of the base."""
        return self._judge(meta_base(base.folder), MergedWeights(self.plan, weights))

    def judge_folder(self, folder: Path) -> Comparison:
        """Judge what was written into a folder, computed in fp32."""
        written = BaseFolder(str(folder), folder, "folder", None)
        return self._judge(meta_base(folder), OriginalWeights(written))

    def judge_gguf(self, file: Path) -> Comparison:
        """Judge a GGUF file as transformers reads it: the whole model in memory, in fp32."""
        with silence_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                config=meta_base(file.parents[1]).config,  # transformers reads no llama3 rope scaling in a GGUF
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                attn_implementation=register_flat_attention(),
                local_files_only=True,
            )
        return self._judge(model.eval(), _nothing_is_empty)

    def _judge(self, model: PreTrainedModel, weights: Weights) -> Comparison:
        return self.reference.compare(run_layerwise(model, weights, self.batches, self.advance))


def _nothing_is_empty(name: str) -> torch.Tensor:
    raise RuntimeError(f"transformers left {name} without a value when it read the GGUF file.")
