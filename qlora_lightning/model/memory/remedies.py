"""The cheapest changes of a config that make training need less memory, with values to type."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field


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
