"""What one change of a setting would save."""

import math
from dataclasses import dataclass, replace

from qlora_lightning.commands.plan.planner import Choice, Planner


@dataclass(frozen=True)
class Knob:
    """A change of one setting.

    Attributes:
        change: What to type.
        saves: Bytes at the peak.
        costs: What it costs, in words.
    """

    change: str
    saves: int
    costs: str


def turn_knobs(
    planner: Planner, now: Choice, accumulate: int, batch_size: int | None, budget: int | None
) -> list[Knob]:
    """Plan each change that applies and saves something, those first that save most.

    Args:
        planner: Of the base.
        now: The config as it is.
        accumulate: ``trainer.accumulate_grad_batches``.
        batch_size: ``data.batch_size``, or
        budget: ``data.tokens_per_batch``.
    """
    peak = planner.plan(now).peak_bytes
    changes = [
        *_checkpoint(now),
        *_fewer_tokens(now, accumulate, batch_size, budget),
        *_shorter(now),
        *_store_smaller(now),
        *_train_less(now, planner.config.num_hidden_layers),
    ]
    knobs = [Knob(change, peak - planner.plan(choice).peak_bytes, costs) for change, choice, costs in changes]
    return sorted((knob for knob in knobs if knob.saves > 0), key=lambda knob: -knob.saves)


_Change = tuple[str, Choice, str]
_SHORTEST = 256  # tokens: rows that are shorter already are not cut


def _checkpoint(now: Choice) -> list[_Change]:
    if now.every_n_layers == 1:
        return []
    option = "enabled: true" if now.every_n_layers == 0 else "every_n_layers: 1"
    changed = replace(now, every_n_layers=1)
    return [(f"gradient_checkpointing.{option}", changed, "same result, about a third slower")]


def _fewer_tokens(now: Choice, accumulate: int, batch_size: int | None, budget: int | None) -> list[_Change]:
    lengths = now.batch.lengths
    if batch_size is not None and batch_size > 1 and len(lengths) > 1:
        rows = next(n for n in range(batch_size // 2, 0, -1) if batch_size % n == 0)
        change = f"data.batch_size: {rows}, trainer.accumulate_grad_batches: {accumulate * batch_size // rows}"
        return [(change, replace(now, batch=now.batch.longest(rows)), "same result, a little slower")]
    if budget is not None and max(lengths) <= budget // 2:
        change = f"data.tokens_per_batch: {budget // 2}, trainer.accumulate_grad_batches: {2 * accumulate}"
        half = now.batch.longest(math.ceil(len(lengths) / 2))
        return [(change, replace(now, batch=half), "nearly the same result, a little slower")]
    return []


def _shorter(now: Choice) -> list[_Change]:
    half = max(now.batch.lengths) // 2
    if half < _SHORTEST:
        return []
    return [
        (f"data.max_length: {half}", replace(now, batch=now.batch.cut(half)), "longer rows are cut, see data.too_long")
    ]


def _store_smaller(now: Choice) -> list[_Change]:
    found: list[_Change] = []
    if now.quantization in ("int8", "none"):
        four = replace(now, quantization="nf4", double_quant=True)
        found.append(("model.quantization: nf4", four, "a base in 4 bits: small losses of quality"))
    elif not now.double_quant:
        double = replace(now, double_quant=True)
        found.append(("model.double_quant: true", double, "next to nothing"))
    if now.optimizer is None:
        eight = replace(now, optimizer="bitsandbytes.optim.AdamW8bit")
        found.append(("model.optimizer: bitsandbytes.optim.AdamW8bit", eight, "averages in 8 bits"))
    return found


def _train_less(now: Choice, layers: int) -> list[_Change]:
    options = now.adapter_options
    if now.adapter is not None or options["lora_options"]:
        return []
    found: list[_Change] = []
    half, upper = int(options["rank"]) // 2, layers // 2
    if half:
        smaller = replace(now, adapter_options={**options, "rank": half})
        found.append((f"model.rank: {half}", smaller, "a smaller adapter"))
    if options["layers"] == "all" and upper:
        change = f"last:{upper}"
        fewer = replace(now, adapter_options={**options, "layers": change})
        found.append((f"model.layers: {change}", fewer, "trains the upper half of the layers only; faster"))
    return found
