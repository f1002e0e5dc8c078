"""A batch goes through the model in parts: gradients are of sums, so that it does not matter which."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from qlora_lightning.model.step.batch import cut_samples, slice_samples
from qlora_lightning.model.step.layout import Layout, OfBatch


@dataclass(frozen=True, eq=False)
class MicroBatches(OfBatch):
    """A flat batch, cut into parts of whole rows.

    Attributes:
        cu_seqlens: Where the batch's samples begin, and the last one ends: on the host.
        samples: The first sample of each part, and the one behind its last.
        layouts: Of each part.
        max_tokens: That a part was to have.
    """

    cu_seqlens: list[int]
    samples: list[tuple[int, int]]
    layouts: list[Layout]
    max_tokens: int

    def to(self, device: torch.device, non_blocking: bool = True) -> Self:
        """Move to a device, as Lightning moves a batch."""
        return dataclasses.replace(self, layouts=[each.to(device, non_blocking) for each in self.layouts])

    def parts(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the parts of a batch, each a flat batch with its ``layout``."""
        found = []
        for (first, last), layout in zip(self.samples, self.layouts, strict=True):
            part = dict(batch) if len(self.samples) == 1 else slice_samples(batch, first, last, self.cu_seqlens)
            part.pop("micro_batches", None)
            found.append({**part, "layout": layout.bind(part)})
        return found


def cut_batch(
    batch: Mapping[str, Any], max_tokens: int, lay_out: Callable[[Mapping[str, Any]], Layout], *, pads: bool
) -> MicroBatches:
    """Cut a flat batch: best before it moves to a GPU, whose numbers would have to be waited for.

    ``lay_out`` makes the layout of a part; the rest is as in :func:`~qlora_lightning.model.step.batch.cut_samples`.
    """
    cu_seqlens = batch["cu_seqlens"].tolist()
    samples = cut_samples(batch, cu_seqlens, max_tokens, pads=pads)
    layouts = [lay_out(slice_samples(batch, *each, cu_seqlens)) for each in samples]
    return MicroBatches(cu_seqlens, samples, layouts, max_tokens)
