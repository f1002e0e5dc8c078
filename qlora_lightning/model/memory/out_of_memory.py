"""Out of memory, reported with the batch, the peak and the changes of the config that help."""

import contextlib
import errno
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from qlora_lightning.model.load.device import device_memory_gib, read_peak_gib
from qlora_lightning.support.errors import UserError

# What torch raises as a plain RuntimeError: its CPU allocator, the driver, and cuBLAS when it finds no workspace.
_SIGNS = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_SHORTEST = 256  # tokens: shorter rows are not worth cutting


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory ran out, on a GPU or a CPU."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # of mmap, for the pages of checkpointed inputs
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
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
        device, longest, where = pl_module.device, 0, "the optimizer's step" if batch is None else "a batch"
        if isinstance(batch, Mapping) and {"input_ids", "cu_seqlens", "longest"} <= batch.keys():
            rows, tokens, longest = len(batch["cu_seqlens"]) - 1, batch["input_ids"].numel(), int(batch["longest"])
            where = f"a batch of {rows:,} rows and {tokens:,} tokens, the longest row {longest:,}"
        changes = "; ".join(
            f"({number}) {each}" for number, each in enumerate(_list_changes(pl_module, longest, device), 1)
        )
        raise UserError(
            f"Out of memory on {device} in {where}; the peak was {read_peak_gib(device):.2f} of "
            f"{device_memory_gib(device):.2f} GiB. What helps: {changes}. `qlora-lightning plan` with the same config "
            "shows how much each would save."
        ) from error


def _list_changes(pl_module: Any, longest: int, device: torch.device) -> list[str]:
    """List the changes that apply: first those that cost time only, then bits of the base and ends of rows."""
    trainer = pl_module.trainer
    data = getattr(trainer, "datamodule", None)
    size, budget = (getattr(data, name, None) for name in ("batch_size", "tokens_per_batch"))
    accumulate, changes = trainer.accumulate_grad_batches, []
    if size is not None and size > 1:
        # the largest divisor, so that a step has as many rows as before
        rows = next(n for n in range(size // 2, 0, -1) if size % n == 0)
        changes.append(f"data.batch_size: {rows} with trainer.accumulate_grad_batches: {accumulate * size // rows}")
    elif budget is not None and longest <= budget // 2:
        changes.append(f"data.tokens_per_batch: {budget // 2} with trainer.accumulate_grad_batches: {2 * accumulate}")
    checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in pl_module.modules())
    if trainer.training and not checkpoints:  # validation keeps no activations
        changes.append("gradient_checkpointing.enabled: true (the same result, about a third slower)")
    elif trainer.training and device.type == "cuda":
        changes.append("gradient_checkpointing.offload: true (the same result), if it is not set")
    if pl_module.quantization in ("int8", "none"):
        changes.append("model.quantization: nf4")
    if longest > _SHORTEST:
        changes.append(f"data.max_length: {longest // 2} (longer rows are cut, see data.too_long)")
    return changes or ["a smaller model.base"]
