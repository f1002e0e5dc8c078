"""Prepares the data and gathers everything that is shown of them."""

from dataclasses import dataclass, field
from typing import Any

from qlora_lightning.commands.inspect.arguments import SPLITS, Config, Options
from qlora_lightning.commands.inspect.choose import RowChooser, ShownRow
from qlora_lightning.commands.inspect.ends import Ends, count_ends, word_ends
from qlora_lightning.commands.inspect.epoch import Epoch, plan_epoch
from qlora_lightning.commands.inspect.facts import SplitFacts
from qlora_lightning.commands.inspect.numbers import histogram, percentiles
from qlora_lightning.commands.inspect.pieces import PieceCutter
from qlora_lightning.data.batches.epoch_plan import EpochPlan
from qlora_lightning.support.errors import UserError


@dataclass(frozen=True)
class Inspection:
    """All that terminal and page show.

    Attributes:
        config: name of the config.
        settings: what the data were prepared with, in words.
        splits: facts of each split, in order.
        ends: sentences on stop token and BOS, with whether all is well: ``(well, sentence)``.
        epoch: what an epoch of training costs; None if there are no training rows to report on.
        batch_size: rows per batch, if they are counted.
        rows: rows to show.
        rows_split: the split that they come from.
        notes: what else there is to say.
    """

    config: str
    settings: str
    splits: list[SplitFacts]
    ends: list[tuple[bool, str]]
    epoch: Epoch | None
    batch_size: int | None
    rows: list[ShownRow]
    rows_split: str
    notes: list[str] = field(default_factory=list)


def inspect_data(data: Any, config: Config, options: Options) -> Inspection:
    """Prepare all splits that the config names and gather what is to be shown.

    Args:
        data: an ``InstructionDataModule``, not yet set up.
        config: with the trainer's settings.
        options: which split and rows.

    Raises:
        UserError: the data cannot be prepared, or there is no such split or row.
    """
    data.setup()
    names = [name for name in SPLITS if name in data.reports and options.split in (None, name)]
    if not names:
        missing = f"data.{options.split}" if options.split else "data.train"
        raise UserError(f"there are no rows to inspect: {missing} names no file.")
    facts = [_split_facts(data, name) for name in names]
    samples = data.samples[names[0]]
    cutter = PieceCutter(data.tokenizer, data.stop_ids)
    others = {name: other for name, other in data.samples.items() if name != names[0]}
    rows = RowChooser(names[0], samples, data.reports[names[0]], cutter, others).choose(options)
    ends = _add([split.ends for split in facts if split.ends is not None])
    return Inspection(
        config=config.name,
        settings=_settings(data, config),
        splits=facts,
        ends=[] if ends is None else word_ends(ends, data.tokenizer, data.stop_ids),
        epoch=_plan(data, config) if "train" in names else None,
        batch_size=data.batch_size,
        rows=rows,
        rows_split=names[0],
        notes=_notes(data, names),
    )


def _notes(data: Any, names: list[str]) -> list[str]:
    if not getattr(data, "streaming", False) or "train" not in names:
        return []
    return [
        f"Streaming: of train only the first {data.reports['train'].rows:,} rows were read; its figures are theirs."
    ]


def _add(ends: list[Ends]) -> Ends | None:
    """Add up the counts of all splits."""
    if not ends:
        return None
    with_bos = None if ends[0].with_bos is None else sum(of_split.with_bos or 0 for of_split in ends)
    samples, stopping, doubled = (sum(getattr(e, name) for e in ends) for name in ("samples", "stopping", "doubled"))
    return Ends(samples, stopping, with_bos, doubled)


def _plan(data: Any, config: Config) -> Epoch:
    streaming = getattr(data, "streaming", False)
    if not streaming:
        return plan_epoch(data.train_dataloader().plan, config.trainer)
    plan = EpochPlan(data.samples["train"], data.batch_size, data.tokens_per_batch, shuffle=True)
    return plan_epoch(plan, config.trainer, streaming=True)


def _split_facts(data: Any, name: str) -> SplitFacts:
    samples = data.samples[name]
    labels = percentiles(samples.labelled_counts) if name != "predict" else {}
    ends = None if name == "predict" else count_ends(samples, data.stop_ids, data.tokenizer.bos_token_id)
    lengths = samples.lengths
    return SplitFacts(name, data.reports[name], percentiles(lengths), labels, histogram(lengths), ends)


def _settings(data: Any, config: Config) -> str:
    tokenizer = config.data.init_args.get("tokenizer")
    shown = {"tokenizer": tokenizer["name"] if isinstance(tokenizer, dict) else tokenizer}
    shown |= {key: getattr(data, key, None) for key in ("max_length", "too_long", "train_on")}
    return " · ".join(f"{key} {value}" for key, value in shown.items() if value is not None)
