"""Out of memory, reported with the cheapest changes of the config that help."""

import contextlib
import errno
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_lightning.model.device import device_memory_gib, read_peak_gib
from qlora_lightning.support.errors import UserError


@dataclass(frozen=True)
class MemorySettings:
    """What a config says about memory.

    Attributes:
        training: Whether gradients are computed; validation keeps no activations.
        rows: Of the micro-batch that did not fit.
        accumulate: ``trainer.accumulate_grad_batches``.
        batch_size: ``data.batch_size``, or
        tokens_per_batch: ``data.tokens_per_batch``.
        checkpoints: Whether activations are checkpointed.
        quantization: How the base is stored.
        lengths: Tokens of each sample.
        layers: Decoder layers of the base.
        all_layers: Whether all of them have adapters.
    """

    training: bool = True
    rows: int = 1
    accumulate: int = 1
    batch_size: int | None = None
    tokens_per_batch: int | None = None
    checkpoints: bool = False
    quantization: str = "nf4"
    lengths: list[int] = field(default_factory=list)
    layers: int = 0
    all_layers: bool = False


def cheapest_changes(now: MemorySettings, most: int = 3) -> list[str]:
    """Name changes that apply, those first that cost least: first time only, then bits, rows' ends, and layers."""
    found = list(_fewer_tokens(now))
    if now.training and not now.checkpoints:
        found.append("gradient_checkpointing.enabled: true (the same result, about a third slower)")
    if now.quantization in ("int8", "none"):
        found.append("model.quantization: nf4")
    found += _shorter_rows(now)
    if now.training and now.all_layers and now.layers > 1:
        found.append(f"model.layers: last:{now.layers // 2} (trains, and keeps activations of, the upper half only)")
    return found[:most] or ["a smaller model.base"]


def _fewer_tokens(now: MemorySettings) -> Iterator[str]:
    if now.batch_size is not None and now.batch_size > 1 and now.rows > 1:
        # the largest divisor, so that a step has as many rows as before
        rows = next(n for n in range(now.batch_size // 2, 0, -1) if now.batch_size % n == 0)
        accumulate, as_before = now.accumulate * now.batch_size // rows, "as before"
        change = f"data.batch_size: {rows}"
    elif now.tokens_per_batch is not None:
        tokens = max(now.tokens_per_batch // 2, max(now.lengths, default=1))  # the longest row must have room
        if tokens > 0.9 * now.tokens_per_batch:
            return
        accumulate, as_before = math.ceil(now.accumulate * now.tokens_per_batch / tokens), "nearly as before"
        change = f"data.tokens_per_batch: {tokens}"
    else:
        return
    with_steps = f" with trainer.accumulate_grad_batches: {accumulate} (a step's rows stay {as_before})"
    yield change + (with_steps if now.training else "")


def _shorter_rows(now: MemorySettings) -> Iterator[str]:
    ordered = sorted(now.lengths)
    if not ordered or ordered[-1] < 2:
        return
    length = ordered[math.ceil(0.99 * len(ordered)) - 1]
    if length > 0.9 * ordered[-1]:  # no few rows are much longer than the rest: half the longest, and what it costs
        length = ordered[-1] // 2
    shortened = sum(tokens > length for tokens in ordered)
    yield f"data.max_length: {length} (shortens {shortened:,} of {len(ordered):,} rows)"


# What torch raises as a plain RuntimeError: its CPU allocator, the driver, and cuBLAS when it finds no workspace.
_SIGNS = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


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
        raise UserError(_describe(pl_module, batch)) from error


def _describe(pl_module: Any, batch: Any) -> str:
    device = pl_module.device
    changes = cheapest_changes(_read_settings(pl_module, batch))
    listed = "; ".join(f"({number}) {change}" for number, change in enumerate(changes, start=1))
    return (
        f"Out of memory on {device} in {_describe_batch(batch)}; the peak was {read_peak_gib(device):.2f} of "
        f"{device_memory_gib(device):.2f} GiB. The cheapest changes: {listed}."
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
        quantization=pl_module.quantization,
        lengths=[] if samples is None else samples.lengths.tolist(),
        layers=pl_module.causal_lm.config.num_hidden_layers,
        all_layers=pl_module.adapter_options["layers"] == "all",
    )
