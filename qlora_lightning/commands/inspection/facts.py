"""Prepares the data and gathers what is shown: figures of each split and of an epoch, their sentences, and rows."""

import argparse
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qlora_lightning.commands.epoch import Epoch, plan_epoch, training_plan
from qlora_lightning.commands.inspection.arguments import SPLITS, Config
from qlora_lightning.commands.inspection.rows import PieceCutter, ShownRow, choose_rows
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.sources import Source
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.support.errors import UserError

PERCENTILES = {"min": 0, "5 %": 5, "25 %": 25, "50 %": 50, "75 %": 75, "95 %": 95, "99 %": 99, "max": 100}
_WITHOUT_TEMPLATE = {"text", "segments", "tokens"}  # formats
_RARE = ("  tokens lost", "  labels lost", "turn by turn", "with a weight")


class Bar(NamedTuple):
    """Samples of ``low`` to ``high`` tokens, both included; ``high`` is None in an open last bar."""

    low: int
    high: int | None
    samples: int

    @property
    def label(self) -> str:
        """The bar's range in words."""
        if self.high is None:
            return f"{self.low:,} and more"
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,} to {self.high:,}"


class Finding(NamedTuple):
    """Something to look at: what it is, where (a line each), and whether ``fit`` may stop at it."""

    title: str
    lines: list[str]
    grave: bool = False


@dataclass(frozen=True)
class SplitFacts:
    """Figures of one split.

    Attributes:
        name: train, val, test or predict.
        report: The data module's ``Report``.
        lengths: Percentiles of tokens per sample.
        labels: Percentiles of labelled tokens per sample; none if nothing is labelled.
        bars: Histogram of tokens per sample.
        sources: Headings and lines of the table of sources; None if there is only one.
    """

    name: str
    report: Report
    lengths: dict[str, int]
    labels: dict[str, int]
    bars: list[Bar]
    sources: tuple[list[str], list[list[str]]] | None = None


@dataclass(frozen=True)
class Inspection:
    """All that terminal and page show.

    Attributes:
        config: Name of the config.
        notes: Settings that the data were prepared with, and what else there is to say; a line each.
        splits: Figures of each split, in order; rows to show are of the first.
        ends: Sentences on stop token and BOS, with whether all is well: ``(well, sentence)``.
        epoch: What an epoch of training costs; None if there are no training rows to report on.
        batch_size: Rows per batch, if they are counted.
        rows: Rows to show.
    """

    config: str
    notes: list[str]
    splits: list[SplitFacts]
    ends: list[tuple[bool, str]]
    epoch: Epoch | None
    batch_size: int | None
    rows: list[ShownRow]


def inspect_data(data: Any, config: Config, options: argparse.Namespace) -> Inspection:
    """Prepare all splits that the config names and gather what is to be shown.

    Args:
        data: An ``InstructionDataModule``, not yet set up.
        config: With the trainer's settings.
        options: Which split and rows.
    """
    data.setup()
    names = [name for name in SPLITS if name in data.reports and options.split in (None, name)]
    if not names:
        raise UserError(f"there are no rows to inspect: data.{options.split or 'train'} names no file.")
    cutter = PieceCutter(data.tokenizer, data.stop_ids)
    epoch = plan_epoch(training_plan(data), config.trainer, data.streaming) if "train" in names else None
    notes = [_settings(data, config)]
    if data.streaming and "train" in names:
        read = data.reports["train"].rows
        notes.append(f"Streaming: of train only the first {read:,} rows were read; its figures are theirs.")
    return Inspection(
        config=config.name,
        notes=notes,
        splits=[_split_facts(data, name) for name in names],
        ends=_describe_ends(data, [name for name in names if name != "predict"]),
        epoch=epoch,
        batch_size=data.batch_size,
        rows=choose_rows(names[0], data.samples[names[0]], data.reports[names[0]], cutter, options),
    )


def _settings(data: Any, config: Config) -> str:
    tokenizer = config.data.init_args.get("tokenizer")
    shown = {"tokenizer": tokenizer["name"] if isinstance(tokenizer, dict) else tokenizer}
    shown |= {key: getattr(data, key) for key in ("max_length", "too_long", "train_on")}
    usual = {"reasoning": "template", "deduplicate": False, "shuffle": True}
    shown |= {key: getattr(data, key) for key, default in usual.items() if getattr(data, key) != default}
    return " · ".join(f"{key} {value}" for key, value in shown.items())


def _split_facts(data: Any, name: str) -> SplitFacts:
    samples = data.samples[name]
    labels, sources = {}, []
    if name != "predict":
        labels = percentiles(samples.labelled_counts)
        held_out = name == "val" and data.val_fraction is not None
        sources = data.sources("train" if held_out else name)
    table = source_table(samples, sources) if len(sources) > 1 else None
    lengths = samples.lengths
    return SplitFacts(name, data.reports[name], percentiles(lengths), labels, histogram(lengths), table)


# ---- lengths ---------------------------------------------------------------------------------------------------------


def percentiles(values: Any) -> dict[str, int]:
    """Return minimum, quantiles and maximum of ``(N,)`` whole numbers, each one that occurs; nothing if N is 0."""
    if not len(values):
        return {}
    found = np.percentile(values, list(PERCENTILES.values()), method="inverted_cdf")
    return dict(zip(PERCENTILES, map(int, found), strict=True))


def histogram(values: Any, most_bars: int = 12) -> list[Bar]:
    """Count ``(N,)`` whole numbers in bars of one round width; none if N is 0.

    Args:
        values: Lengths in tokens.
        most_bars: About how many bars at most. What is far beyond the 99th percentile is one open bar at the end:
            a single long row must not flatten the others.
    """
    if not len(values):
        return []
    low, bulk, high = int(min(values)), int(percentiles(values)["99 %"]), int(max(values))
    least = (bulk - low + 1) / (most_bars - 1)
    width = next(factor * 10**power for power in range(20) for factor in (1, 2, 5) if factor * 10**power >= least)
    first = low // width * width
    closed = (high - first) // width + 1
    is_open = closed > most_bars
    if is_open:
        closed = (bulk - first) // width + 1
    edges = [first + number * width for number in range(closed + 1)]
    counts = np.histogram(np.minimum(values, edges[-1]), [*edges, edges[-1] + 1])[0].tolist()
    bars = [Bar(edge, edge + width - 1, count) for edge, count in zip(edges, counts[:closed], strict=False)]
    return [*bars, Bar(edges[-1], None, counts[-1])] if is_open else bars


# ---- stop token and BOS ----------------------------------------------------------------------------------------------


def count_ends(samples: SampleSet, stop_ids: Collection[int], bos_id: int | None) -> Counter[str]:
    """Count samples: all, those that train a stop token, those that begin with the BOS, and those with two of it."""
    starts, ids = samples.starts, samples.ids
    stops = np.flatnonzero(np.isin(ids, list(stop_ids)) & samples.labelled)
    counts = Counter(all=len(samples), stopping=len(np.unique(np.searchsorted(starts, stops, side="right"))))
    if bos_id is not None:
        begins = ids[starts[:-1]] == bos_id
        begins |= np.diff(samples.row_ids, prepend=-1) == 0  # of a row that was split only the first piece has one
        second = ids[np.minimum(starts[:-1] + 1, len(ids) - 1)] == bos_id
        counts.update(begun=int(begins.sum()), doubled=int((begins & second & (np.diff(starts) > 1)).sum()))
    return counts


def describe_ends(
    counts: Counter[str], tokenizer: Any, stop_ids: Collection[int], has_template: bool = True
) -> list[tuple[bool, str]]:
    """Describe counts in a sentence each, with whether it is well: the stop token, then the BOS."""
    every, stopping, begun, doubled = (counts[name] for name in ("all", "stopping", "begun", "doubled"))
    stops = " or ".join(f"{tokenizer.decode([number])} ({number})" for number in sorted(stop_ids))
    if stopping == every:
        stop = (True, f"Stop token {stops}: every sample trains one.")
    elif not has_template:
        found = f"{stopping:,} of {every:,} samples train one"
        stop = (True, f"Stop token {stops}: {found} (a text ends in one; segments and tokens are taken as written).")
    else:
        found = f"{every - stopping:,} of {every:,} samples do not train" if stopping else "no sample trains"
        why = "(an answer that was cut, or a piece before its end, has none)"
        stop = (False, f"Stop token {stops}: {found} one {why}.")
    if tokenizer.bos_token_id is None:
        return [stop, (True, "BOS: this tokenizer has none.")]
    name = f"BOS {tokenizer.bos_token} ({tokenizer.bos_token_id})"
    if doubled:
        return [stop, (False, f"{name}: {doubled:,} of {every:,} samples begin with two.")]
    if begun == every:
        return [stop, (True, f"{name}: every sample begins with exactly one.")]
    if not begun:
        whose = "; the chat template writes none" if has_template else ""
        return [stop, (True, f"{name}: no sample begins with it{whose}.")]
    return [stop, (not has_template, f"{name}: {begun:,} of {every:,} samples begin with one.")]


def _describe_ends(data: Any, names: Sequence[str]) -> list[tuple[bool, str]]:
    """Describe the ends of all splits together, those of splits without a chat template by themselves."""
    groups: dict[bool, Counter[str]] = {}
    for name in names:
        has_template = _WITHOUT_TEMPLATE.isdisjoint(data.reports[name].formats)
        counts = count_ends(data.samples[name], data.stop_ids, data.tokenizer.bos_token_id)
        groups.setdefault(has_template, Counter()).update(counts)
    return [
        sentence
        for has_template, counts in sorted(groups.items(), reverse=True)
        for sentence in describe_ends(counts, data.tokenizer, data.stop_ids, has_template)
    ]


# ---- tables and sentences --------------------------------------------------------------------------------------------


def source_table(samples: SampleSet, sources: Sequence[Source]) -> tuple[list[str], list[list[str]]]:
    """Return headings, and a line for each source."""
    weights = sum(source.weight or 0.0 for source in sources)
    lines = []
    for number, source in enumerate(sources):
        own = samples.source == number
        rows, tokens = len(np.unique(samples.row_ids[own])), int(samples.lengths[own].sum())
        labelled = share(int(samples.labelled_counts[own].sum()), tokens)
        of_epoch = [f"{(source.weight or 0.0) / weights:.1%}"] if weights else []
        lines.append([source.path, f"{rows:,}", f"{own.sum():,}", f"{tokens:,}", labelled, *of_epoch])
    headings = ["source", "rows left", "samples", "tokens", "labelled", *(["of an epoch"] if weights else [])]
    return headings, lines


def table_rows(splits: Sequence[SplitFacts]) -> list[tuple[str, list[str]]]:
    """Return the table of counts: a heading and a cell for each split; rare rows are left out if all are zero."""
    reports = [split.report for split in splits]

    def count(name: str) -> list[str]:
        return [f"{getattr(report, name):,}" for report in reports]

    rows = {
        "shapes found": [", ".join(report.formats) or "–" for report in reports],
        "rows read": count("rows"),
        "bad rows": count("bad_rows"),
        "dropped": [f"{sum(report.dropped.values()):,}" for report in reports],
        "samples": count("samples"),
        "tokens": count("tokens"),
        "labelled tokens": count("labelled"),
        "labelled share": [share(report.labelled, report.tokens) for report in reports],
        "samples shortened": count("shortened"),
        "  tokens lost": count("lost_tokens"),
        "  labels lost": count("lost_labels"),
        "turn by turn": count("turn_by_turn"),
        "with a weight": count("weighted"),
        "duplicates": count("duplicates"),
    }
    if [split.name for split in splits] != ["train"]:
        rows["also in train"] = ["" if split.name == "train" else f"{split.report.overlap:,}" for split in splits]
    return [(heading, cells) for heading, cells in rows.items() if heading not in _RARE or {*cells} != {"0"}]


def find_faults(splits: Sequence[SplitFacts]) -> list[Finding]:
    """List what a user should look at: bad rows, drops, cuts, duplicates, overlap."""
    found = []
    for name, report in ((split.name, split.report) for split in splits):
        if report.bad_rows:
            lines = [f"{row.where}: {row.reason}" for row in report.bad]
            title = f"{name}: {count_of(report.bad_rows, 'bad row')}"
            found.append(Finding(title, _and_more(lines, report.bad_rows), grave=True))
        if report.unread_columns:
            found.append(Finding(f"{name}: columns not read", [", ".join(report.unread_columns)]))
        if report.dropped:
            lines = [f"{count:,}: {reason}" for reason, count in report.dropped.items()]
            found.append(Finding(f"{name}: {count_of(sum(report.dropped.values()), 'row')} dropped", lines))
        if report.lost_labels:
            of_all = share(report.lost_labels, report.labelled + report.lost_labels)
            lost = f"{report.lost_labels:,} labelled tokens lost, {of_all} of all"
            found.append(Finding(f"{name}: answers were cut", [f"{lost}: a larger max_length would keep them"]))
        pairs = (
            (report.duplicates, report.duplicate_pairs, "equal to an earlier one"),
            (report.overlap, report.overlap_pairs, f"also in train, so {name}_loss is too good"),
        )
        for count, places, what in pairs:
            if count:
                lines = [_describe_pair(*pair) for pair in places]
                found.append(Finding(f"{name}: {count_of(count, 'row')} {what}", _and_more(lines, count)))
    return found


def describe_epoch(epoch: Epoch, batch_size: int | None) -> list[tuple[str, str]]:
    """Describe what an epoch costs, as pairs of a heading and a sentence."""
    of = f"up to {epoch.budget:,} tokens" if epoch.budget else count_of(batch_size or 0, "row")
    fill = f"; {epoch.mean_tokens / epoch.budget:.1%} of tokens_per_batch" if epoch.budget else ""
    on = "" if epoch.devices == 1 else f" on each of {epoch.devices} devices"
    accumulated = "" if epoch.accumulate == 1 else f", a step every {epoch.accumulate}"
    filled = ("tokens per batch", f"{epoch.mean_tokens:,.0f} on average, {epoch.most_tokens:,} at most{fill}")
    if epoch.streaming:
        steps = "trainer.max_steps is missing: it says where to stop"
        if epoch.all_steps is not None:
            steps = f"{epoch.all_steps:,} in all (max_steps){accumulated}"
        return [("batches", f"of {of}{on}"), filled, ("optimizer steps", steps)]
    if epoch.all_steps is None:
        whole = "no end (max_epochs and max_steps are -1)"
    elif epoch.epochs is None or epoch.all_steps < epoch.epochs * epoch.steps:
        whole = f"{epoch.all_steps:,} in all (max_steps)"
    else:
        whole = f"{epoch.all_steps:,} in all ({count_of(epoch.epochs, 'epoch')})"
    return [
        ("batches per epoch", f"{epoch.batches:,} of {of}{on}"),
        filled,
        ("tokens per epoch", f"{epoch.tokens:,}, no padding"),
        ("optimizer steps", f"{epoch.steps:,} per epoch{accumulated}; {whole}"),
    ]


def share(part: int, whole: int) -> str:
    """Format a share in percent."""
    return f"{part / whole:.1%}" if whole else "–"


def count_of(number: int, noun: str) -> str:
    """Format a number with its noun, in the plural unless it is one."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _describe_pair(where: str, first: str) -> str:
    """Describe which row equals which; a file is named once."""
    (file, _, _), (first_file, _, line) = where.rpartition(":"), first.rpartition(":")
    return f"{where} = line {line}" if file == first_file else f"{where} = {first}"


def _and_more(lines: list[str], count: int) -> list[str]:
    return lines if count <= len(lines) else [*lines, f"and {count - len(lines):,} more"]
