"""What is known of each split and of an epoch, in numbers and in sentences, the same for terminal and page."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from qlora_lightning.data.batches.epoch_plan import EpochPlan
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.sources import Source
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.support.errors import UserError

PERCENTILES = {"min": 0, "5 %": 5, "25 %": 25, "50 %": 50, "75 %": 75, "95 %": 95, "99 %": 99, "max": 100}


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


def percentiles(values: Any) -> dict[str, int]:
    """Return minimum, quantiles and maximum of ``(N,)`` whole numbers, each one that occurs; nothing if N is 0."""
    if not len(values):
        return {}
    found = np.percentile(values, list(PERCENTILES.values()), method="inverted_cdf")
    return dict(zip(PERCENTILES, map(int, found), strict=True))


def histogram(values: Any, most_bars: int = 12) -> list[Bar]:
    """Count ``(N,)`` whole numbers in bars of one round width; none if N is 0.

    Args:
        values: lengths in tokens.
        most_bars: about how many bars at most. What lies far beyond the 99th percentile is one open bar at the end:
            a single long row must not flatten the others.
    """
    if not len(values):
        return []
    low, bulk, high = int(min(values)), int(percentiles(values)["99 %"]), int(max(values))
    width = _round_width((bulk - low + 1) / (most_bars - 1))
    first = low // width * width
    closed = (high - first) // width + 1
    is_open = closed > most_bars
    if is_open:
        closed = (bulk - first) // width + 1
    edges = [first + number * width for number in range(closed + 1)]
    counts = np.histogram(np.minimum(values, edges[-1]), [*edges, edges[-1] + 1])[0].tolist()
    bars = [Bar(edge, edge + width - 1, count) for edge, count in zip(edges, counts[:closed], strict=False)]
    return [*bars, Bar(edges[-1], None, counts[-1])] if is_open else bars


def _round_width(least: float) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50, … that is not below ``least``."""
    step = 1
    while True:
        for factor in (1, 2, 5):
            if factor * step >= least:
                return factor * step
        step *= 10


class Ends(NamedTuple):
    """Counts over the samples of a split.

    Attributes:
        samples: all of them.
        stopping: samples with a stop token among their labelled tokens.
        with_bos: samples that begin with the tokenizer's BOS; None if it has none.
        doubled: samples that begin with it twice.
        written: whether some were trained without a chat template: text, segments or tokens.
    """

    samples: int
    stopping: int
    with_bos: int | None
    doubled: int
    written: bool = False


def count_ends(samples: SampleSet, stop_ids: Collection[int], bos_id: int | None) -> Ends:
    """Look at every sample of a ``SampleSet``."""
    starts, ids, number = samples.starts, samples.ids, len(samples)
    stops = np.flatnonzero(np.isin(ids, list(stop_ids)) & samples.labelled)
    stopping = len(np.unique(np.searchsorted(starts, stops, side="right")))
    if bos_id is None:
        return Ends(number, stopping, None, 0)
    begins = ids[starts[:-1]] == bos_id
    begins |= np.diff(samples.row_ids, prepend=-1) == 0  # of a row that was split only the first piece has one
    longer = np.diff(starts) > 1
    doubled = begins & longer & (ids[np.minimum(starts[:-1] + 1, max(0, len(ids) - 1))] == bos_id)
    return Ends(number, stopping, int(begins.sum()), int(doubled.sum()))


def describe_ends(ends: Ends, tokenizer: Any, stop_ids: Collection[int]) -> list[tuple[bool, str]]:
    """Say in a sentence each, with whether it is well: the stop token, then the BOS."""
    stops = " or ".join(f"{tokenizer.decode([number])} ({number})" for number in sorted(stop_ids))
    if ends.stopping == ends.samples:
        stop = (True, f"Stop token {stops}: every sample trains one.")
    elif ends.written:
        found = f"{ends.stopping:,} of {ends.samples:,} samples train one"
        stop = (True, f"Stop token {stops}: {found} (a text ends in one; segments and tokens are taken as written).")
    else:
        without = ends.samples - ends.stopping
        found = "no sample trains" if not ends.stopping else f"{without:,} of {ends.samples:,} samples do not train"
        stop = (
            False,
            f"Stop token {stops}: {found} one (an answer that was cut, or a piece before its end, has none).",
        )
    if ends.with_bos is None:
        return [stop, (True, "BOS: this tokenizer has none.")]
    name = f"BOS {tokenizer.bos_token} ({tokenizer.bos_token_id})"
    if ends.doubled:
        return [stop, (False, f"{name}: {ends.doubled:,} of {ends.samples:,} samples begin with two.")]
    if ends.with_bos == ends.samples:
        return [stop, (True, f"{name}: every sample begins with exactly one.")]
    if not ends.with_bos:
        whose = "" if ends.written else "; the chat template writes none"
        return [stop, (True, f"{name}: no sample begins with it{whose}.")]
    return [stop, (ends.written, f"{name}: {ends.with_bos:,} of {ends.samples:,} samples begin with one.")]


_DEFAULT_EPOCHS = 1  # as `fit` has it


@dataclass(frozen=True)
class Epoch:
    """One epoch of the training rows.

    Attributes:
        batches: micro-batches on each device.
        mean_tokens: tokens per micro-batch, on average.
        most_tokens: tokens of the largest micro-batch.
        budget: ``tokens_per_batch``; None where batches are made of rows.
        tokens: tokens of all rows.
        devices: on which micro-batches run side by side.
        accumulate: micro-batches per optimizer step.
        steps: optimizer steps per epoch.
        all_steps: optimizer steps of the whole run; None if nothing ends it.
        epochs: of the whole run; None if only steps end it.
        streaming: whether the rows are only the first ones of a stream, which has no epochs.
    """

    batches: int
    mean_tokens: float
    most_tokens: int
    budget: int | None
    tokens: int
    devices: int
    accumulate: int
    steps: int
    all_steps: int | None
    epochs: int | None
    streaming: bool = False

    @property
    def fill(self) -> float | None:
        """Share of the token budget that is used, all batches together."""
        return None if self.budget is None else self.mean_tokens / self.budget


def plan_epoch(plan: EpochPlan, trainer: dict[str, Any], streaming: bool = False) -> Epoch:
    """Count what the trainer's settings make of the first epoch.

    Args:
        plan: the training loader's, for one device.
        trainer: the trainer section of the config.
        streaming: whether these are only the first rows of a stream.

    Raises:
        UserError: a setting that is needed is not a number.
    """
    accumulate = _whole(trainer, "accumulate_grad_batches", 1)
    devices = count_devices(trainer)
    batches = _limit(len(replace(plan, world_size=devices)), trainer.get("limit_train_batches"))
    lengths = plan.samples.lengths
    batch_tokens = [int(lengths[batch.rows].sum()) for batch in plan.batches(0)]
    steps = math.ceil(batches / accumulate)
    max_steps = _whole(trainer, "max_steps", -1)
    epochs = _whole(trainer, "max_epochs", _DEFAULT_EPOCHS)
    ends = [end for end in (-1 if streaming else epochs * steps, max_steps) if end >= 0]
    return Epoch(
        batches=batches,
        mean_tokens=sum(batch_tokens) / max(1, len(batch_tokens)),
        most_tokens=max(batch_tokens, default=0),
        budget=plan.tokens_per_batch,
        tokens=sum(batch_tokens),
        devices=devices,
        accumulate=accumulate,
        steps=steps,
        all_steps=min(ends, default=None),
        epochs=None if epochs < 0 or streaming else epochs,
        streaming=streaming,
    )


def count_devices(trainer: dict[str, Any]) -> int:
    """Count the devices of all nodes that ``trainer.devices`` asks for: a number, a list, or all of this machine."""
    return _devices_of_a_node(trainer) * _whole(trainer, "num_nodes", 1)


def _devices_of_a_node(trainer: dict[str, Any]) -> int:
    devices = trainer.get("devices", "auto")
    if isinstance(devices, list):
        return max(1, len(devices))
    text = str(devices)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if text.isdigit():
        return max(1, int(text))
    here = torch.cuda.device_count() if trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda") else 1
    return max(1, here)


def _limit(batches: int, limit: Any) -> int:
    """Apply ``limit_train_batches``: a number of batches, or a share of them."""
    if isinstance(limit, float):
        return int(batches * limit)
    return batches if limit is None else min(batches, int(limit))


def _whole(trainer: dict[str, Any], key: str, default: int) -> int:
    value = trainer.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"trainer.{key} is {value!r}: expected an integer.")
    if value < 1 and value != -1:
        raise UserError(f"trainer.{key} is {value}: expected 1 or more.")
    return value


class SourceFacts(NamedTuple):
    """What is left of one source of a split.

    Attributes:
        path: as the config names it.
        rows: rows that gave a sample.
        samples: these.
        tokens: of all its samples.
        labelled: of these, labelled ones.
        share: of an epoch, by the weights; None without weights.
    """

    path: str
    rows: int
    samples: int
    tokens: int
    labelled: int
    share: float | None


def count_sources(samples: SampleSet, sources: Sequence[Source]) -> list[SourceFacts]:
    """Count the samples of each source; nothing if there is only one."""
    if len(sources) < 2:
        return []
    weights = sum(source.weight or 0.0 for source in sources)
    found = []
    for number, source in enumerate(sources):
        own = samples.source == number
        rows, share = len(np.unique(samples.row_ids[own])), None if source.weight is None else source.weight / weights
        tokens, labelled = int(samples.lengths[own].sum()), int(samples.labelled_counts[own].sum())
        found.append(SourceFacts(source.path, rows, int(own.sum()), tokens, labelled, share))
    return found


def source_table(sources: Sequence[SourceFacts]) -> tuple[list[str], list[list[str]]]:
    """Return the table of sources: the headings, and a line each."""
    headings = ["source", "rows left", "samples", "tokens", "labelled"]
    lines = [
        [each.path, f"{each.rows:,}", f"{each.samples:,}", f"{each.tokens:,}", _share(each.labelled, each.tokens)]
        for each in sources
    ]
    if any(each.share is not None for each in sources):
        headings.append("of an epoch")
        lines = [[*line, f"{each.share or 0:.1%}"] for line, each in zip(lines, sources, strict=True)]
    return headings, lines


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
        sources: each source, if there are several.
    """

    name: str
    report: Report
    lengths: dict[str, int]
    labels: dict[str, int]
    bars: list[Bar]
    ends: Ends | None
    sources: list[SourceFacts] = field(default_factory=list)


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
    count("with a weight", "weighted")
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
            share = _share(report.lost_labels, report.labelled + report.lost_labels)
            lost = f"{report.lost_labels:,} labelled tokens lost, {share} of all"
            found.append(Finding(f"{name}: answers were cut", [f"{lost}: a larger max_length would keep them"]))
        if report.duplicates:
            lines = [_describe_pair(*pair) for pair in report.duplicate_pairs]
            title = f"{name}: {_count(report.duplicates, 'row')} equal to an earlier one"
            found.append(Finding(title, _and_more(lines, report.duplicates)))
        if report.overlap:
            lines = [_describe_pair(*pair) for pair in report.overlap_pairs]
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


def describe_epoch(epoch: Epoch, batch_size: int | None) -> list[tuple[str, str]]:
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


def _describe_pair(where: str, first: str) -> str:
    """Say which row equals which; a file is named once."""
    (file, _, _), (first_file, _, line) = where.rpartition(":"), first.rpartition(":")
    return f"{where} = line {line}" if file == first_file else f"{where} = {first}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _and_more(lines: list[str], count: int) -> list[str]:
    return lines if count <= len(lines) else [*lines, f"and {count - len(lines):,} more"]
