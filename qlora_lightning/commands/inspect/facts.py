"""The report of the splits in words and formatted numbers, the same for terminal and page."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qlora_lightning.commands.inspect.ends import Ends
from qlora_lightning.commands.inspect.epoch import Epoch
from qlora_lightning.commands.inspect.numbers import Bar
from qlora_lightning.data.report import Report


@dataclass(frozen=True)
class SplitFacts:
    """What is known of one split.

    Attributes:
        name: train, val, test or predict.
        report: the data module's ``Report``.
        lengths: percentiles of tokens per sample.
        labels: percentiles of labelled tokens per sample; none where nothing is labelled.
        bars: histogram of tokens per sample.
        ends: stop tokens and BOS; None for rows to predict, which have no answers.
    """

    name: str
    report: Report
    lengths: dict[str, int]
    labels: dict[str, int]
    bars: list[Bar]
    ends: Ends | None


class Finding(NamedTuple):
    """Something to look at: what it is, where (a line each), and whether ``fit`` may stop at it."""

    title: str
    lines: list[str]
    grave: bool = False


def table_rows(splits: Sequence[SplitFacts]) -> list[tuple[str, list[str]]]:
    """Return the table of counts: a heading and a cell for each split; rows in which nothing happened are left out."""
    rows: list[tuple[str, list[str], bool]] = []

    def add(heading: str, cells: list[str], always: bool = True) -> None:
        rows.append((heading, cells, always))

    def count(heading: str, name: str, always: bool = False) -> None:
        add(heading, [f"{getattr(split.report, name):,}" for split in splits], always)

    add("shapes found", [", ".join(split.report.formats) or "–" for split in splits])
    count("rows read", "rows", always=True)
    count("bad rows", "bad_rows", always=True)
    add("dropped", [f"{sum(split.report.dropped.values()):,}" for split in splits])
    count("samples", "samples", always=True)
    count("tokens", "tokens", always=True)
    count("labelled tokens", "labelled", always=True)
    add("labelled share", [_share(split.report.labelled, split.report.tokens) for split in splits])
    count("samples shortened", "shortened", always=True)
    count("  tokens lost", "lost_tokens")
    count("  labels lost", "lost_labels")
    count("turn by turn", "turn_by_turn")
    count("duplicates", "duplicates", always=True)
    if len(splits) > 1 or splits[0].name != "train":
        overlaps = ["" if split.name == "train" else f"{split.report.overlap:,}" for split in splits]
        add("also in train", overlaps)
    return [(heading, cells) for heading, cells, always in rows if always or any(cell != "0" for cell in cells)]


def find_faults(splits: Sequence[SplitFacts]) -> list[Finding]:
    """List what a user should look at: bad rows, drops, cuts, duplicates, overlap."""
    found = []
    for split in splits:
        name, report = split.name, split.report
        if report.bad_rows:
            lines = [f"{row.where}: {row.reason}" for row in report.bad]
            title = f"{name}: {_count(report.bad_rows, 'bad row')}"
            found.append(Finding(title, _and_more(lines, report.bad_rows), grave=True))
        if report.unread_columns:
            found.append(Finding(f"{name}: columns not read", [", ".join(report.unread_columns)]))
        if report.dropped:
            lines = [f"{count:,}: {reason}" for reason, count in report.dropped.items()]
            found.append(Finding(f"{name}: {_count(sum(report.dropped.values()), 'row')} dropped", lines))
        if report.lost_labels:
            lost = f"{report.lost_labels:,} labelled tokens lost, {_share(report.lost_labels, _whole(report))} of all"
            found.append(Finding(f"{name}: answers were cut", [f"{lost}: a larger max_length would keep them"]))
        if report.duplicates:
            lines = [_word_pair(*pair) for pair in report.duplicate_pairs]
            title = f"{name}: {_count(report.duplicates, 'row')} equal to an earlier one"
            found.append(Finding(title, _and_more(lines, report.duplicates)))
        if report.overlap:
            lines = [_word_pair(*pair) for pair in report.overlap_pairs]
            title = f"{name}: {_count(report.overlap, 'row')} also in train, so {name}_loss is too good"
            found.append(Finding(title, _and_more(lines, report.overlap)))
    return found


def headline(split: SplitFacts, epoch: Epoch | None) -> list[tuple[str, str]]:
    """Return the few figures that say most, each with what it counts."""
    report = split.report
    figures = [
        (f"{report.samples:,}", f"samples of {split.name}"),
        (f"{report.tokens:,}", "tokens"),
        (f"{split.lengths.get('max', 0):,}", "tokens in the longest"),
    ]
    if report.labelled:
        figures.append((_share(report.labelled, report.tokens), "labelled"))
    if epoch is not None and not epoch.streaming:
        figures.append((f"{epoch.steps:,}", "steps per epoch"))
    return figures


def word_epoch(epoch: Epoch, batch_size: int | None) -> list[tuple[str, str]]:
    """Say what an epoch costs, as pairs of a heading and a sentence."""
    of = f"up to {epoch.budget:,} tokens" if epoch.budget else _count(batch_size or 0, "row")
    fill = "" if epoch.fill is None else f"; {epoch.fill:.1%} of tokens_per_batch"
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
        whole = f"{epoch.all_steps:,} in all ({_count(epoch.epochs, 'epoch')})"
    return [
        ("batches per epoch", f"{epoch.batches:,} of {of}{on}"),
        filled,
        ("tokens per epoch", f"{epoch.tokens:,}, no padding"),
        ("optimizer steps", f"{epoch.steps:,} per epoch{accumulated}; {whole}"),
    ]


def _word_pair(where: str, first: str) -> str:
    """Say which row equals which; a file is named once."""
    (file, _, _), (first_file, _, line) = where.rpartition(":"), first.rpartition(":")
    return f"{where} = line {line}" if file == first_file else f"{where} = {first}"


def _whole(report: Report) -> int:
    return int(report.labelled + report.lost_labels)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _and_more(lines: list[str], count: int) -> list[str]:
    return lines if count <= len(lines) else [*lines, f"and {count - len(lines):,} more"]
