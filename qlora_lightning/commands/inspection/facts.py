"""What `inspect` shows: tables of counts, lengths and an epoch, histograms, what to look at, and rows."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qlora_lightning.commands.epoch import Epoch, plan_epoch, training_plan
from qlora_lightning.commands.inspection.rows import ShownRow, choose_rows
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.sources import Source
from qlora_lightning.data.samples import SampleSet

_PERCENTILES = {"min": 0, "5 %": 5, "25 %": 25, "50 %": 50, "75 %": 75, "95 %": 95, "99 %": 99, "max": 100}
_WITHOUT_TEMPLATE = {"text", "tokens"}  # formats
_SHOWN_IF_ZERO = ("bad rows", "dropped", "duplicates")


class Table(NamedTuple):
    """A table: the first cell of each line is its name; without headings there are two columns of text."""

    title: str
    headings: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Inspection:
    """All that terminal and page show.

    Attributes:
        config: The config files as they were typed.
        notes: Settings that the data were prepared with, and what else there is to say; a line each.
        tables: All figures.
        histograms: Of each split, how many samples have so many tokens: a range in words and a count.
        findings: What to look at: a title and the lines below it.
        split: Whose rows are shown.
        rows: Rows to show.
    """

    config: str
    notes: list[str]
    tables: list[Table]
    histograms: dict[str, dict[str, int]]
    findings: dict[str, list[str]]
    split: str
    rows: list[ShownRow]


def inspect_data(data: Any, splits: Sequence[str], config: Any, options: argparse.Namespace) -> Inspection:
    """Gather what is to be shown.

    Args:
        data: An ``InstructionDataModule`` that is set up.
        splits: Names of those to report on.
        config: The parsed settings.
        options: Which rows to show.
    """
    tokenizer, stop_ids = data.tokenizer, data.stop_ids
    stops = " or ".join(f"{tokenizer.decode([number])} ({number})" for number in stop_ids)
    name = config["data"]["init_args"]["tokenizer"]
    settings = {"tokenizer": name["name"] if isinstance(name, dict) else name, "stop token": stops}
    settings |= {key: getattr(data, key) for key in ("max_length", "too_long", "train_on")}
    notes = [" · ".join(f"{key} {value}" for key, value in settings.items())]

    counts: list[dict[str, str]] = []
    tables: list[Table] = []
    findings: dict[str, list[str]] = {}
    for split in splits:
        samples, report = data.samples[split], data.reports[split]
        ends = Ends(0, 0, 0) if split == "predict" else count_ends(samples, stop_ids, tokenizer.bos_token_id)
        counts.append(_count(report, ends))
        findings.update(find_faults(report, ends))
        held_out = split == "val" and data.val_fraction is not None
        sources = data.sources("train" if held_out else split)
        if len(sources) > 1:
            tables.append(source_table(f"{split}: sources", samples, sources))
    lines = [[heading, *(column[heading] for column in counts)] for heading in counts[0]]
    lines = [line for line in lines if line[0] in _SHOWN_IF_ZERO or set(line[1:]) != {"0"}]
    tables.insert(0, Table("Rows, samples and tokens", ["", *splits], lines))
    if "train" in splits:
        epoch = plan_epoch(training_plan(data), config["trainer"])
        tables.append(Table("An epoch of train", [], _describe_epoch(epoch, data)))
    tables.append(_length_table({split: data.samples[split] for split in splits}))
    first = splits[0]
    shown = choose_rows(first, data.samples[first], data.reports[first], tokenizer, stop_ids, options)
    return Inspection(
        config=", ".join(str(file) for file in config["config"] or ()) or "Data",
        notes=notes,
        tables=tables,
        histograms={split: histogram(data.samples[split].lengths) for split in splits},
        findings=findings,
        split=first,
        rows=list(shown),
    )


# ---- tables ----------------------------------------------------------------------------------------------------------


def _count(report: Report, ends: "Ends") -> dict[str, str]:
    counts: dict[str, int | str] = {
        "formats": ", ".join(report.formats) or "–",
        "rows read": report.rows,
        "bad rows": report.bad_rows,
        "dropped": sum(report.dropped.values()),
        "samples": report.samples,
        "with a stop token": ends.stopping,
        "with a BOS": ends.begun,
        "turn by turn": report.turn_by_turn,
        "shortened": report.shortened,
        "tokens": report.tokens,
        "labelled tokens": report.labelled,
        "labelled share": _share(report.labelled, report.tokens),
        "tokens lost": report.lost_tokens,
        "labelled tokens lost": report.lost_labels,
        "duplicates": report.duplicates,
        "also in train": report.overlap,
    }
    return {heading: count if isinstance(count, str) else f"{count:,}" for heading, count in counts.items()}


def source_table(title: str, samples: SampleSet, sources: Sequence[Source]) -> Table:
    """Return a line for each source."""
    weights = sum(source.weight or 0.0 for source in sources)
    lines = []
    for number, source in enumerate(sources):
        own = samples.source == number
        tokens, labelled = int(samples.lengths[own].sum()), int(samples.labelled_counts[own].sum())
        line = [source.path, f"{len(np.unique(samples.row_ids[own])):,}", f"{own.sum():,}", f"{tokens:,}"]
        line.append(_share(labelled, tokens))
        lines.append(line + ([_share(source.weight or 0.0, weights)] if weights else []))
    headings = ["source", "rows left", "samples", "tokens", "labelled", *(["of an epoch"] if weights else [])]
    return Table(title, headings, lines)


def _length_table(samples: Mapping[str, SampleSet]) -> Table:
    lines = []
    for split, own in samples.items():
        for kind, values in (("tokens", own.lengths), ("labelled", own.labelled_counts)):
            if values.any():
                lines.append([f"{split} {kind}", *(f"{value:,}" for value in percentiles(values))])
    return Table("Tokens per sample", ["", *_PERCENTILES], lines)


def percentiles(values: Any) -> list[int]:
    """Return minimum, quantiles and maximum of ``(N,)`` whole numbers, each one that occurs; N is not 0."""
    found: list[int] = np.percentile(values, list(_PERCENTILES.values()), method="inverted_cdf").tolist()
    return found


def histogram(values: Any, most_bars: int = 12) -> dict[str, int]:
    """Count ``(N,)`` whole numbers in ranges of one round width; N is not 0.

    Args:
        values: Lengths in tokens.
        most_bars: About how many ranges at most. What is far beyond the 99th percentile is in one open range at the
            end: a single long row must not flatten the others.
    """
    low, bulk, high = int(min(values)), percentiles(values)[-2], int(max(values))
    least = (bulk - low + 1) / (most_bars - 1)
    width = next(factor * 10**power for power in range(20) for factor in (1, 2, 5) if factor * 10**power >= least)
    first = low // width * width
    is_open = (high - first) // width >= most_bars
    starts = range(first, (bulk if is_open else high) + 1, width)
    beyond = starts[-1] + width
    counts = np.bincount((np.minimum(values, beyond) - first) // width, minlength=len(starts)).tolist()
    names = [f"{start:,}" if width == 1 else f"{start:,} to {start + width - 1:,}" for start in starts]
    return dict(zip([*names, f"{beyond:,} and more"], counts, strict=False))


def _describe_epoch(epoch: Epoch, data: Any) -> list[tuple[str, str]]:
    """Describe what an epoch costs, as pairs of a name and a sentence."""
    budget = data.tokens_per_batch
    size = f"up to {budget:,} tokens" if budget else _plural(data.batch_size, "row")
    devices = "" if epoch.devices == 1 else f" on each of {epoch.devices} devices"
    filled = f"; {epoch.mean_tokens / budget:.1%} of tokens_per_batch" if budget else ""
    every = "" if epoch.accumulate == 1 else f", a step every {epoch.accumulate}"
    if epoch.all_steps is None:
        run = "no end: set trainer.max_steps"
    elif epoch.epochs is None or epoch.all_steps < epoch.epochs * epoch.steps:
        run = f"{epoch.all_steps:,} in all (max_steps)"
    else:
        run = f"{epoch.all_steps:,} in all ({_plural(epoch.epochs, 'epoch')})"
    return [
        ("batches", f"{epoch.batches:,} of {size}{devices}"),
        ("tokens per batch", f"{epoch.mean_tokens:,.0f} on average, {epoch.most_tokens:,} at most{filled}"),
        ("tokens", f"{epoch.tokens:,}, no padding"),
        ("optimizer steps", f"{epoch.steps:,}{every}; {run}"),
    ]


# ---- what to look at -------------------------------------------------------------------------------------------------


class Ends(NamedTuple):
    """How many samples train a stop token, begin with a BOS, and begin with two."""

    stopping: int
    begun: int
    doubled: int


def count_ends(samples: SampleSet, stop_ids: Sequence[int], bos_id: int | None) -> Ends:
    """Count the samples that train a stop token, and those that begin with one or two BOS."""
    starts, ids = samples.starts, samples.ids
    stops = np.flatnonzero(np.isin(ids, stop_ids) & samples.labelled)
    stopping = len(np.unique(np.searchsorted(starts, stops, side="right")))
    if bos_id is None:
        return Ends(stopping, 0, 0)
    begins = ids[starts[:-1]] == bos_id
    begins |= np.diff(samples.row_ids, prepend=-1) == 0  # of a row that was split only the first piece has one
    second = ids[np.minimum(starts[:-1] + 1, len(ids) - 1)] == bos_id
    return Ends(stopping, int(begins.sum()), int((begins & second & (np.diff(starts) > 1)).sum()))


def find_faults(report: Report, ends: Ends) -> Iterator[tuple[str, list[str]]]:
    """Yield what a user should look at in a split: a title, and a line for each place or reason."""
    split, samples = report.split, report.samples
    if report.bad_rows:
        places = [f"{row.where}: {row.reason}" for row in report.bad]
        yield f"{split}: {_plural(report.bad_rows, 'bad row')}", _and_more(places, report.bad_rows)
    if report.unread_columns:
        yield f"{split}: columns not read", [", ".join(report.unread_columns)]
    if report.dropped:
        title = f"{split}: {_plural(sum(report.dropped.values()), 'row')} dropped"
        yield title, [f"{count:,}: {reason}" for reason, count in report.dropped.items()]
    if report.lost_labels:
        share = _share(report.lost_labels, report.labelled + report.lost_labels)
        lost = f"{report.lost_labels:,} labelled tokens lost, {share} of all: a larger max_length would keep them"
        yield f"{split}: answers were cut", [lost]
    if split != "predict" and _WITHOUT_TEMPLATE.isdisjoint(report.formats):
        if ends.stopping < samples:
            title = f"{split}: {samples - ends.stopping:,} of {_plural(samples, 'sample')} without a stop token"
            yield title, ["they do not teach the model to stop: an answer that was cut, or a piece of a long row"]
        if 0 < ends.begun < samples:
            yield f"{split}: only {ends.begun:,} of {_plural(samples, 'sample')} begin with a BOS", []
        if ends.doubled:
            yield f"{split}: {ends.doubled:,} of {_plural(samples, 'sample')} begin with two BOS", []
    if report.duplicates:
        title = f"{split}: {_plural(report.duplicates, 'row')} equal to an earlier one"
        yield title, _and_more([f"{row} = {first}" for row, first in report.duplicate_pairs], report.duplicates)
    if report.overlap:
        title = f"{split}: {_plural(report.overlap, 'row')} also in train, so {split}_loss is too good"
        yield title, _and_more([f"{row} = {first}" for row, first in report.overlap_pairs], report.overlap)


def _and_more(lines: list[str], count: int) -> list[str]:
    return lines if count <= len(lines) else [*lines, f"and {count - len(lines):,} more"]


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
