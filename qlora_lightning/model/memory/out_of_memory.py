"""Out of memory, told with the cheapest changes of the config that help."""

import contextlib
import errno
import math
from collections.abc import Callable, Iterator, Mapping
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


def cheapest_changes(settings: MemorySettings, most: int = 3) -> list[str]:
    """Name changes that apply, those first that cost least: first time only, then bits, rows' ends, and layers."""
    remedies: list[Callable[[MemorySettings], str | None]] = [
        _fewer_rows,
        _fewer_tokens,
        _checkpointing,
        _four_bits,
        _shorter_rows,
        _fewer_layers,
    ]
    found = [change for remedy in remedies if (change := remedy(settings))]
    return found[:most] or ["a smaller model.base"]


def _fewer_rows(now: MemorySettings) -> str | None:
    if now.batch_size is None or now.batch_size < 2 or now.rows < 2:
        return None
    # the largest divisor, so that a step has as many rows as before
    rows = next(n for n in range(now.batch_size // 2, 0, -1) if now.batch_size % n == 0)
    change = f"data.batch_size: {rows}"
    return change + (_as_many_as_before(now.accumulate * now.batch_size // rows, "as before") if now.training else "")


def _fewer_tokens(now: MemorySettings) -> str | None:
    if now.tokens_per_batch is None:
        return None
    tokens = max(now.tokens_per_batch // 2, max(now.lengths, default=1))  # the longest row must have room
    if tokens > 0.9 * now.tokens_per_batch:
        return None
    accumulate = math.ceil(now.accumulate * now.tokens_per_batch / tokens)
    change = f"data.tokens_per_batch: {tokens}"
    return change + (_as_many_as_before(accumulate, "nearly as before") if now.training else "")


def _as_many_as_before(accumulate: int, as_before: str) -> str:
    return f" with trainer.accumulate_grad_batches: {accumulate} (a step's rows stay {as_before})"


def _checkpointing(now: MemorySettings) -> str | None:
    if now.checkpoints or not now.training:
        return None
    return "gradient_checkpointing.enabled: true (the same result, about a third slower)"


def _four_bits(now: MemorySettings) -> str | None:
    return "model.quantization: nf4" if now.quantization in ("int8", "none") else None


def _shorter_rows(now: MemorySettings) -> str | None:
    if not now.lengths:
        return None
    ordered = sorted(now.lengths)
    length = ordered[math.ceil(0.99 * len(ordered)) - 1]
    if length > 0.9 * ordered[-1]:  # no few rows are much longer than the rest: half the longest, and say what it costs
        length = ordered[-1] // 2
    shortened = sum(1 for tokens in ordered if tokens > length)
    return f"data.max_length: {length} (shortens {shortened:,} of {len(ordered):,} rows)" if length else None


def _fewer_layers(now: MemorySettings) -> str | None:
    if not now.training or not now.all_layers or now.layers < 2:
        return None
    return f"model.layers: last:{now.layers // 2} (trains, and keeps activations of, the upper half only)"


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
