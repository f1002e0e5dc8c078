"""What `inspect` prints: the report of each split, sources, lengths, an epoch, and rows token by token."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_lightning.commands.epoch import plan_epoch
from qlora_lightning.data.chat.tokenizer import ControlTokens
from qlora_lightning.data.rows.sources import Source
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.support.console import show_controls
from qlora_lightning.support.errors import UserError

_PERCENTILES = {"min": 0, "5 %": 5, "25 %": 25, "50 %": 50, "75 %": 75, "95 %": 95, "99 %": 99, "max": 100}
_MARKS = Text("⟦labelled tokens⟧ · ■ stop token · │ between tokens · ↵ newline")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character yet
_MOST_TOKENS = 16  # of a character
_FIRST = 2  # rows shown if none are asked for


def print_inspection(
    data: Any,
    splits: Sequence[str],
    config: Any,
    console: Console,
    places: Sequence[str] = (),
    longest: bool = False,
) -> None:
    """Print the whole report.

    Args:
        data: An ``InstructionDataModule`` that is set up.
        splits: Names of those to report on.
        config: The parsed settings.
        console: Where to.
        places: Rows to show, each ``LINE`` or ``FILE:LINE``; without any the first two.
        longest: Whether to show the longest row.
    """

    def heading(text: str) -> None:
        console.print()
        console.print(Text(text, "bold"))

    first = splits[0]
    rows = list(_show_rows(data.samples[first], data.tokenizer, data.stop_ids, places, longest))
    stops = " or ".join(f"{data.tokenizer.decode([number])} ({number})" for number in data.stop_ids)
    settings = {"stop token": stops, **{key: getattr(data, key) for key in ("max_length", "too_long", "train_on")}}
    console.print(Text(" · ".join(f"{key} {value}" for key, value in settings.items()), "dim"))
    heading("Rows")
    for split in splits:
        console.print(Text(data.reports[split].describe()))
    heading("Tokens per sample")
    console.print(_length_table({split: data.samples[split] for split in splits}))
    for split in splits:
        sources = data.sources("train" if split == "val" and data.val_fraction is not None else split)
        if len(sources) > 1:
            heading(f"Sources of {split}")
            console.print(_source_table(data.samples[split], sources))
    if "train" in splits:
        heading("An epoch of train")
        epoch = plan_epoch(data.train_dataloader().plan, config["trainer"])
        size = f"{data.batch_size:,} rows" if data.batch_size else f"up to {data.tokens_per_batch:,} tokens"
        on_each = "" if epoch.devices == 1 else f" on each of {epoch.devices} devices"
        console.print(Text(f"{epoch.batches:,} batches of {size}{on_each}; {epoch.tokens:,} tokens, no padding"))
        in_all = "no end: set trainer.max_steps" if epoch.all_steps is None else f"{epoch.all_steps:,} in all"
        console.print(Text(f"{epoch.steps:,} optimizer steps; {in_all}"))
    heading(f"Rows of {first} as the model sees them")
    console.print(_MARKS)
    for where, tokens in rows:
        console.print()
        console.print(where)
        console.print(tokens)


# ---- tables --------------------------------------------------------------------------------------------------------


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    return table


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


def _length_table(samples: dict[str, SampleSet]) -> Table:
    lines = []
    for split, own in samples.items():
        for kind, values in (("tokens", own.lengths), ("labelled", own.labelled_counts)):
            if values.any():
                found = np.percentile(values, list(_PERCENTILES.values()), method="inverted_cdf")  # values that occur
                lines.append([f"{split} {kind}", *(f"{int(value):,}" for value in found)])
    return _table(["", *_PERCENTILES], lines)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "–"


# ---- rows token by token ---------------------------------------------------------------------------------------------


def _show_rows(
    samples: SampleSet, tokenizer: Any, stop_ids: Collection[int], places: Sequence[str], longest: bool
) -> Iterator[tuple[Text, Text]]:
    """Yield a heading and the tokens of each row, or of its answers, that is named; else of the first two.

    Raises:
        UserError: ``--row`` names no row.
    """
    numbers: list[int] = []
    for place in places:
        file, _, line = place.rpartition(":")
        of_line = np.flatnonzero(samples.line == int(line)).tolist() if line.isdecimal() else []
        found = [number for number in of_line if samples.where(number).endswith(f"{file}:{line}")]
        if not found:
            raise UserError(f"--row {place}: no sample begins there. Expected a line number, or FILE:LINE.")
        numbers += found
    if longest:
        numbers.append(int(samples.lengths.argmax()))
    for number in numbers or range(min(_FIRST, len(samples))):
        start, end = samples.starts[number : number + 2].tolist()
        parts = [("", start, end)]
        if samples.first is not None:
            second = start + int(samples.first[number])
            parts = [("chosen: ", start, second), ("rejected: ", second, end)]
        elif samples.desirable is not None:
            parts = [("desirable: " if samples.desirable[number] else "undesirable: ", start, end)]
        for kind, begin, stop in parts:
            ids, labelled = samples.ids[begin:stop].tolist(), samples.labelled[begin:stop].tolist()
            about = f"  {kind}{len(ids):,} tokens, {sum(labelled):,} labelled"
            tokens = _mark_tokens(ids, labelled, tokenizer, stop_ids)
            yield Text.assemble((samples.where(number), "bold"), about), tokens


def _mark_tokens(ids: Sequence[int], labelled: Sequence[bool], tokenizer: Any, stop_ids: Collection[int]) -> Text:
    """Return a sample as text: a mark between tokens, labelled ones in brackets, control tokens in colours."""
    special_ids, text = ControlTokens(tokenizer, stop_ids).known, Text()
    is_labelled = False
    for piece, number in _cut(ids, labelled, tokenizer):
        mark = "│" if number else ""
        if labelled[number] != is_labelled:
            is_labelled = labelled[number]
            mark = "⟦" if is_labelled else "⟧"
        colour = "green" if is_labelled else ""
        if ids[number] in special_ids:
            colour = "bold magenta" if is_labelled else "magenta"
        text.append(mark, "dim").append(show_controls(piece).replace("\n", "↵\n"), colour)
        text.append("■" if is_labelled and ids[number] in stop_ids else "")
    text.append("⟧" if is_labelled else "")
    text.rstrip()
    return text


def _cut(ids: Sequence[int], labelled: Sequence[bool], tokenizer: Any) -> Iterator[tuple[str, int]]:
    """Yield the text of each token, or of the few that make up a character together, and the number of the first."""
    before = start = 0
    while start < len(ids):
        # decoded behind the piece before it, a token keeps the space that some decoders drop at the start of a text
        context = tokenizer.decode(list(ids[before:start])) if start else ""
        for end in range(start + 1, len(ids) + 1):
            text = tokenizer.decode(list(ids[before:end])).removeprefix(context)
            is_whole = not text.endswith(_UNFINISHED) or end in (len(ids), start + _MOST_TOKENS)
            if is_whole or labelled[end] != labelled[start]:
                break
        yield text, start
        before, start = start, end
