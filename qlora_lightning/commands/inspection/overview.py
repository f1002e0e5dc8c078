"""What `inspect` prints: counts, sources, an epoch, lengths, what to look at, and rows token by token."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_lightning.commands.epoch import Epoch, plan_epoch, training_plan
from qlora_lightning.commands.inspection.tokens import MARKS, show_rows
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.sources import Source
from qlora_lightning.data.samples import SampleSet

_PERCENTILES = {"min": 0, "5 %": 5, "25 %": 25, "50 %": 50, "75 %": 75, "95 %": 95, "99 %": 99, "max": 100}
_WITHOUT_TEMPLATE = {"text", "tokens"}  # formats
_SHOWN_IF_ZERO = ("bad rows", "dropped", "duplicates")


def print_inspection(
    data: Any, splits: Sequence[str], config: Any, options: argparse.Namespace, console: Console
) -> None:
    """Print the whole report.

    Args:
        data: An ``InstructionDataModule`` that is set up.
        splits: Names of those to report on.
        config: The parsed settings.
        options: Which rows to show.
        console: Where to.
    """

    def heading(text: str) -> None:
        console.print()
        console.print(Text(text, "bold"))

    tokenizer, stop_ids, first = data.tokenizer, data.stop_ids, splits[0]
    rows = list(show_rows(first, data.samples[first], data.reports[first], tokenizer, stop_ids, options))
    console.print(Text(", ".join(str(file) for file in config["config"] or ()) or "Data", "bold"))
    stops = " or ".join(f"{tokenizer.decode([number])} ({number})" for number in stop_ids)
    name = config["data"]["init_args"]["tokenizer"]
    settings = {"tokenizer": name["name"] if isinstance(name, dict) else name, "stop token": stops}
    settings |= {key: getattr(data, key) for key in ("max_length", "too_long", "train_on")}
    console.print(Text(" · ".join(f"{key} {value}" for key, value in settings.items()), "dim"))

    heading("Rows, samples and tokens")
    ends = {split: count_ends(data.samples[split], stop_ids, tokenizer.bos_token_id) for split in splits}
    counts = [_count(data.reports[split], *ends[split][:2]) for split in splits]
    lines = [[name, *(column[name] for column in counts)] for name in counts[0]]
    console.print(_table(["", *splits], [line for line in lines if line[0] in _SHOWN_IF_ZERO or {*line[1:]} != {"0"}]))
    for split in splits:
        sources = data.sources("train" if split == "val" and data.val_fraction is not None else split)
        if len(sources) > 1:
            heading(f"{split}: sources")
            console.print(_source_table(data.samples[split], sources))
    if "train" in splits:
        heading("An epoch of train")
        for name, sentence in _describe_epoch(plan_epoch(training_plan(data), config["trainer"]), data).items():
            console.print(Text(f"{name:17} {sentence}"))
    heading("Tokens per sample")
    console.print(_length_table({split: data.samples[split] for split in splits}))
    for split in splits:
        for title, places in list_findings(data.reports[split], *ends[split]):
            heading(f"{split}: {title}")
            for place in places:
                _print_indented(Text(place), console)
    heading(f"Rows of {first} as the model sees them")
    console.print(MARKS)
    for row, tokens in rows:
        console.print()
        console.print(row)
        if tokens:
            _print_indented(tokens, console)


def _print_indented(text: Text, console: Console) -> None:
    for line in text.wrap(console, console.width - 2, overflow="fold"):
        console.print(Text("  ") + line)


# ---- figures ---------------------------------------------------------------------------------------------------------


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, heading in enumerate(headings):
        drawn.add_column(heading, justify="right" if number else "left", overflow="fold")
    for line in lines:
        drawn.add_row(*map(Text, line))
    return drawn


def _count(report: Report, stopping: int, begun: int) -> dict[str, str]:
    counts: dict[str, int | str] = {
        "formats": ", ".join(report.formats) or "–",
        "rows read": report.rows,
        "bad rows": report.bad_rows,
        "dropped": sum(report.dropped.values()),
        "samples": report.samples,
        "with a stop token": stopping,
        "with a BOS": begun,
        "shortened": report.shortened,
        "tokens": report.tokens,
        "labelled tokens": report.labelled,
        "labelled share": _share(report.labelled, report.tokens),
        "labelled tokens lost": report.lost_labels,
        "desirable answers": report.desirable or 0,
        "duplicates": report.duplicates,
        "also in train": report.overlap,
    }
    return {heading: count if isinstance(count, str) else f"{count:,}" for heading, count in counts.items()}


def _source_table(samples: SampleSet, sources: Sequence[Source]) -> Table:
    weights = sum(source.weight or 0.0 for source in sources)
    lines = []
    for number, source in enumerate(sources):
        own = samples.source == number
        tokens, labelled = int(samples.lengths[own].sum()), int(samples.labelled_counts[own].sum())
        line = [source.path, f"{len(np.unique(samples.row_ids[own])):,}", f"{own.sum():,}", f"{tokens:,}"]
        line.append(_share(labelled, tokens))
        lines.append(line + ([_share(source.weight or 0.0, weights)] if weights else []))
    headings = ["source", "rows left", "samples", "tokens", "labelled", *(["of an epoch"] if weights else [])]
    return _table(headings, lines)


def _length_table(samples: Mapping[str, SampleSet]) -> Table:
    lines = []
    for split, own in samples.items():
        for kind, values in (("tokens", own.lengths), ("labelled", own.labelled_counts)):
            if values.any():
                found = np.percentile(values, list(_PERCENTILES.values()), method="inverted_cdf")  # values that occur
                lines.append([f"{split} {kind}", *(f"{int(value):,}" for value in found)])
    return _table(["", *_PERCENTILES], lines)


def _describe_epoch(epoch: Epoch, data: Any) -> dict[str, str]:
    """Describe what an epoch costs, in a sentence by name."""
    budget = data.tokens_per_batch
    size = f"up to {budget:,} tokens" if budget else f"{data.batch_size:,} rows"
    devices = "" if epoch.devices == 1 else f" on each of {epoch.devices} devices"
    filled = f"; {epoch.mean_tokens / budget:.1%} of tokens_per_batch" if budget else ""
    every = "" if epoch.accumulate == 1 else f", a step every {epoch.accumulate}"
    run = "no end: set trainer.max_steps" if epoch.all_steps is None else f"{epoch.all_steps:,} in all"
    return {
        "batches": f"{epoch.batches:,} of {size}{devices}",
        "tokens per batch": f"{epoch.mean_tokens:,.0f} on average, {epoch.most_tokens:,} at most{filled}",
        "tokens": f"{epoch.tokens:,}, no padding",
        "optimizer steps": f"{epoch.steps:,}{every}; {run}",
    }


# ---- what to look at -------------------------------------------------------------------------------------------------


def count_ends(samples: SampleSet, stop_ids: Sequence[int], bos_id: int | None) -> tuple[int, int, int]:
    """Count the samples that train a stop token, those that begin with a BOS, and those that begin with two."""
    starts, ids = samples.starts, samples.ids
    stops = np.flatnonzero(np.isin(ids, stop_ids) & samples.labelled)
    stopping = len(np.unique(np.searchsorted(starts, stops, side="right")))
    if bos_id is None:
        return stopping, 0, 0
    begins = ids[starts[:-1]] == bos_id
    begins |= np.diff(samples.row_ids, prepend=-1) == 0  # of a row that was split only the first piece has one
    second = ids[np.minimum(starts[:-1] + 1, len(ids) - 1)] == bos_id
    return stopping, int(begins.sum()), int((begins & second & (np.diff(starts) > 1)).sum())


def list_findings(report: Report, stopping: int, begun: int, doubled: int) -> Iterator[tuple[str, list[str]]]:
    """Yield what a user should look at in a split: a title, and a line for each place or reason."""
    has_template = report.split != "predict" and _WITHOUT_TEMPLATE.isdisjoint(report.formats)
    bad = [f"{place}: {reason}" for reason, places in report.bad.items() for place in places]
    for count, title, places in (
        (report.bad_rows, "bad rows", bad),
        (report.suspicious, "rows that look incomplete; data.missing drops them", report.suspicious_rows),
        (report.duplicates, "rows equal to an earlier one", report.duplicate_pairs),
        (report.overlap, f"rows also in train, so {report.split}_loss is too good", report.overlap_pairs),
    ):
        if count:
            yield f"{count:,} {title}", [*places, f"and {count - len(places):,} more"][:count]
    if report.unread_columns:
        yield "columns not read", [", ".join(report.unread_columns)]
    if report.dropped:
        reasons = [f"{count:,}: {reason}" for reason, count in report.dropped.items()]
        yield f"{sum(report.dropped.values()):,} rows dropped", reasons
    if report.lost_labels:
        share = _share(report.lost_labels, report.labelled + report.lost_labels)
        lost = f"{report.lost_labels:,} labelled tokens lost, {share} of all: a larger max_length would keep them"
        yield "answers were cut", [lost]
    if has_template and stopping < report.samples:
        reason = "they do not teach the model to stop: an answer that was cut, or a piece of a long row"
        yield f"{report.samples - stopping:,} of {report.samples:,} samples without a stop token", [reason]
    if has_template and 0 < begun < report.samples:
        yield f"only {begun:,} of {report.samples:,} samples begin with a BOS", []
    if has_template and doubled:
        yield f"{doubled:,} of {report.samples:,} samples begin with two BOS", []


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "–"
