"""Tells a user what ran out of memory, and the cheapest changes of the config against it."""

import contextlib
import errno
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from qlora_lightning.errors import UserError
from qlora_lightning.model.machine.device_memory import device_memory_gib, read_peak_gib
from qlora_lightning.model.memory.remedies import MemorySettings, cheapest_changes

# What torch raises as a plain RuntimeError: its CPU allocator, the driver, and cuBLAS when it finds no workspace.
_SIGNS = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # of mmap, for the pages of checkpointed inputs
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


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
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(_tell(pl_module, batch)) from error


def _tell(pl_module: Any, batch: Any) -> str:
    device = pl_module.device
    peak = read_peak_gib(device)
    whole = f"{device_memory_gib(device):.2f} GiB"
    changes = cheapest_changes(_read_settings(pl_module, batch))
    listed = "; ".join(f"({number}) {change}" for number, change in enumerate(changes, start=1))
    return (
        f"Out of memory on {device} in {_describe_batch(batch)}; the peak was {peak:.2f} of {whole}. "
        f"The cheapest changes: {listed}."
    )


def _describe_batch(batch: Any) -> str:
    if batch is None:
        return "the optimizer's step"
    if not (isinstance(batch, Mapping) and {"input_ids", "cu_seqlens", "longest"} <= batch.keys()):
        return "a batch"
    rows, tokens = len(batch["cu_seqlens"]) - 1, batch["input_ids"].numel()
    return f"a batch of {rows:,} rows and {tokens:,} tokens, the longest row {int(batch['longest']):,}"


def _read_settings(pl_module: Any, batch: Any) -> MemorySettings:
    trainer = pl_module.trainer
    data = getattr(trainer, "datamodule", None)
    samples = getattr(data, "samples", {}).get("train" if trainer.training else "val")
    return MemorySettings(
        training=bool(trainer.training),
        rows=len(batch["cu_seqlens"]) - 1 if isinstance(batch, Mapping) and "cu_seqlens" in batch else 1,
        accumulate=int(trainer.accumulate_grad_batches),
        batch_size=getattr(data, "batch_size", None),
        tokens_per_batch=getattr(data, "tokens_per_batch", None),
        checkpoints=any(getattr(module, "gradient_checkpointing", False) for module in pl_module.modules()),
        quantization=getattr(pl_module, "quantization", "none"),
        lengths=[] if samples is None else samples.lengths.tolist(),
        layers=int(getattr(pl_module.causal_lm.config, "num_hidden_layers", 0)),
        all_layers=getattr(pl_module, "adapter_options", {}).get("layers") == "all",
    )
