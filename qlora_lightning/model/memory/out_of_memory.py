"""Out of memory, reported with the batch, the peak and what helps."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from qlora_lightning.model.load.device import device_memory_gib, read_peak_gib
from qlora_lightning.model.step.batch import is_flat
from qlora_lightning.support.errors import UserError

_REMEDIES = (
    "data.batch_size or data.tokens_per_batch halved with trainer.accumulate_grad_batches doubled (the same result); "
    "gradient_checkpointing.enabled: true, on a GPU also its offload (the same result, slower); model.quantization: "
    "nf4; a smaller data.max_length, model.rank or model.base"
)


@contextlib.contextmanager
def telling_out_of_memory(pl_module: Any, batch: Any) -> Iterator[None]:
    """Turn running out of memory inside the block into one sentence for the user.

    Args:
        pl_module: The module whose step this is.
        batch: The micro-batch at work; ``None`` in the optimizer's step.

    Raises:
        UserError: Memory ran out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        device, place = pl_module.device, "the optimizer's step" if batch is None else "a batch"
        if is_flat(batch) and "longest" in batch:
            rows, tokens = len(batch["cu_seqlens"]) - 1, batch["input_ids"].numel()
            place = f"a batch of {rows:,} rows and {tokens:,} tokens, the longest row {int(batch['longest']):,}"
        raise UserError(
            f"Out of memory on {device} in {place}; the peak was {read_peak_gib(device):.2f} of "
            f"{device_memory_gib(device):.2f} GiB. What helps: {_REMEDIES}."
        ) from error
