"""What `inspect` prints: counts, sources, an epoch, lengths, what to look at, and rows token by token."""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_lightning.commands.epoch import Epoch, plan_epoch, training_plan
from qlora_lightning.commands.inspection.rows import REASONING, TOOL_CALL, Piece, ShownRow, choose_rows
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.sources import Source
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.support.console import show_controls

_PERCENTILES = {"min": 0, "5 %": 5, "25 %": 25, "50 %": 50, "75 %": 75, "95 %": 95, "99 %": 99, "max": 100}
_WITHOUT_TEMPLATE = {"text", "tokens"}  # formats
_SHOWN_IF_ZERO = ("bad rows", "dropped", "duplicates")
_BORDER, _OPEN, _CLOSE, _STOP = "│", "⟦", "⟧", "■"
_COLOURS = {REASONING: "cyan", TOOL_CALL: "yellow"}


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
    tokenizer, stop_ids, first = data.tokenizer, data.stop_ids, splits[0]
    rows = list(choose_rows(first, data.samples[first], data.reports[first], tokenizer, stop_ids, options))
    console.print(Text(", ".join(str(file) for file in config["config"] or ()) or "Data", "bold"))
    stops = " or ".join(f"{tokenizer.decode([number])} ({number})" for number in stop_ids)
    name = config["data"]["init_args"]["tokenizer"]
    settings = {"tokenizer": name["name"] if isinstance(name, dict) else name, "stop token": stops}
    settings |= {key: getattr(data, key) for key in ("max_length", "too_long", "train_on")}
    console.print(Text(" · ".join(f"{key} {value}" for key, value in settings.items()), "dim"))

    def heading(text: str) -> None:
        console.print()
        console.print(Text(text, "bold"))

    heading("Rows, samples and tokens")
    bos = tokenizer.bos_token_id
    ends = {split: count_ends(data.samples[split], stop_ids, bos) for split in splits if split != "predict"}
    ends.setdefault("predict", Ends(0, 0, 0))
    counts = [_count(data.reports[split], ends[split]) for split in splits]
    lines = [[heading, *(column[heading] for column in counts)] for heading in counts[0]]
    lines = [line for line in lines if line[0] in _SHOWN_IF_ZERO or set(line[1:]) != {"0"}]
    console.print(_table(["", *splits], lines))
    for split in splits:
        sources = data.sources("train" if split == "val" and data.val_fraction is not None else split)
        if len(sources) > 1:
            heading(f"{split}: sources")
            console.print(_source_table(data.samples[split], sources))
    if "train" in splits:
        heading("An epoch of train")
        for name, sentence in _describe_epoch(plan_epoch(training_plan(data), config["trainer"]), data):
            console.print(Text(f"{name:17} {sentence}"))
    heading("Tokens per sample")
    console.print(_length_table({split: data.samples[split] for split in splits}))
    for split in splits:
        heading(f"{split}: tokens per sample")
        bars = histogram(data.samples[split].lengths)
        for name, samples in bars.items():
            bar = "█" * math.ceil(40 * samples / max(bars.values()))
            console.print(Text.assemble(f"{name:>19}  ", (bar, "blue"), f"  {samples:,}"))
    for split in splits:
        for title, places in find_faults(data.reports[split], ends[split]):
            heading(title)
            for place in places:
                _print_indented(Text(place), console)
    heading(f"Rows of {first} as the model sees them")
    marks = f"{_OPEN}labelled tokens{_CLOSE} · {_STOP} stop token · {_BORDER} between tokens · ↵ newline · "
    console.print(Text.assemble(marks, *((f"{part} ", colour) for part, colour in _COLOURS.items())))
    for row in rows:
        print_row(row, console)


# ---- figures ---------------------------------------------------------------------------------------------------------


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, heading in enumerate(headings):
        drawn.add_column(heading, justify="right" if number else "left", overflow="fold")
    for line in lines:
        drawn.add_row(*map(Text, line))
    return drawn


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
                lines.append([f"{split} {kind}", *(f"{value:,}" for value in percentiles(values))])
    return _table(["", *_PERCENTILES], lines)


def percentiles(values: Any) -> list[int]:
    """Return minimum, quantiles and maximum of ``(N,)`` whole numbers, each one that occurs; N is not 0."""
    found: list[int] = np.percentile(values, list(_PERCENTILES.values()), method="inverted_cdf").tolist()
    return found


def histogram(values: Any, bars: int = 10) -> dict[str, int]:
    """Count ``(N,)`` whole numbers in ranges of one width up to the 99th percentile, and what is beyond; N is not 0."""
    low, bulk = int(min(values)), percentiles(values)[-2]
    width = math.ceil((bulk - low + 1) / bars)
    counts = np.bincount(np.minimum((np.asarray(values) - low) // width, bars), minlength=bars + 1).tolist()
    starts = [low + width * number for number in range(bars + 1)]
    names = [f"{start:,}" if width == 1 else f"{start:,} to {start + width - 1:,}" for start in starts[:-1]]
    found = dict(zip([*names, f"{starts[-1]:,} and more"], counts, strict=True))
    return {name: count for name, count in found.items() if count or name in names[: bulk - low + 1]}


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
    if report.suspicious:
        title = f"{split}: {_plural(report.suspicious, 'row')} that look incomplete; data.missing drops them"
        yield title, _and_more(report.suspicious_rows, report.suspicious)
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


# ---- rows ------------------------------------------------------------------------------------------------------------


def print_row(row: ShownRow, console: Console) -> None:
    """Print a row with its tokens set apart by marks, and by colours where there are some."""
    console.print()
    console.print(Text.assemble((row.where, "bold"), f"  {row.about}"))
    text, is_labelled = Text(), False
    for number, piece in enumerate(row.pieces):
        mark = _BORDER if number else ""
        if piece.labelled != is_labelled:
            mark, is_labelled = (_OPEN if piece.labelled else _CLOSE), piece.labelled
        text.append(mark, "dim")
        text.append(show_controls(piece.text).replace("\n", "↵\n"), _style(piece))
        text.append(_STOP if piece.stop else "")
    text.append(_CLOSE if is_labelled else "")
    if text.plain.endswith("\n"):
        text.right_crop()
    if row.pieces:
        _print_indented(text, console)


def _style(piece: Piece) -> str:
    if piece.special:
        return "bold magenta" if piece.labelled else "magenta"
    return _COLOURS.get(piece.part) or ("green" if piece.labelled else "")


def _print_indented(text: Text, console: Console) -> None:
    for line in text.wrap(console, console.width - 2, overflow="fold"):
        console.print(Text("  ") + line)
