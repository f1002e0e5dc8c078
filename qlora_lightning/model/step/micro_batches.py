"""A batch goes through the model in parts: gradients are of sums, so that it does not matter which."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from qlora_lightning.model.step.batch import cut_samples, slice_samples
from qlora_lightning.model.step.layout import Layout, Origin, origin_of


@dataclass(frozen=True, eq=False)
class MicroBatches:
    """A flat batch, cut into parts of whole rows.

    Attributes:
        cu_seqlens: Where the batch's samples begin, and the last one ends: on the host.
        samples: The first sample of each part, and the one behind its last.
        layouts: Of each part.
        max_tokens: That a part was to have.
        origin: The batch's tensors when it was cut, see :meth:`bind`.
    """

    cu_seqlens: tuple[int, ...]
    samples: tuple[tuple[int, int], ...]
    layouts: tuple[Layout, ...]
    max_tokens: int
    origin: Origin = ()

    @classmethod
    def cut(
        cls,
        batch: Mapping[str, Any],
        max_tokens: int,
        lay_out: Callable[[Mapping[str, Any]], Layout],
        *,
        pads: bool = False,
    ) -> Self:
        """Cut a flat batch: best before it moves to a GPU, whose numbers would have to be waited for.

        ``lay_out`` makes the layout of a part; the rest is as in
        :func:`~qlora_lightning.model.step.batch.cut_samples`.
        """
        cu_seqlens = batch["cu_seqlens"].tolist()
        samples = cut_samples(batch, cu_seqlens, max_tokens, pads=pads)
        layouts = tuple(lay_out(slice_samples(batch, *each, cu_seqlens)) for each in samples)
        return cls(tuple(cu_seqlens), tuple(samples), layouts, max_tokens)

    def to(self, device: torch.device, non_blocking: bool = True) -> Self:
        """Move to a device, as Lightning moves a batch."""
        return dataclasses.replace(self, layouts=tuple(each.to(device, non_blocking) for each in self.layouts))

    def bind(self, batch: Mapping[str, Any]) -> Self:
        """Remember the batch that these are parts of, once it has moved."""
        return dataclasses.replace(self, origin=origin_of(batch))

    def are_of(self, batch: Mapping[str, Any], max_tokens: int) -> bool:
        """Whether a batch is still what was cut: someone may have put other labels in, or memory may have run out."""
        pairs = zip(self.origin, origin_of(batch), strict=False)
        is_same = bool(self.origin) and all(a is b and before == now for (a, before), (b, now) in pairs)
        return is_same and self.max_tokens == max_tokens

    def parts(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the parts of a batch, each a flat batch with its ``layout``."""
        found = []
        for (first, last), layout in zip(self.samples, self.layouts, strict=True):
            part = dict(batch) if len(self.samples) == 1 else slice_samples(batch, first, last, self.cu_seqlens)
            part.pop("micro_batches", None)
            found.append({**part, "layout": layout.bind(part)})
        return found
