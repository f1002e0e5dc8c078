"""The report in the terminal, readable at 80 columns, with colours or without."""

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qlora_lightning.commands.inspect.facts import SplitFacts, find_faults, table_rows, word_epoch
from qlora_lightning.commands.inspect.gather import Inspection
from qlora_lightning.commands.inspect.numbers import PERCENTILES, Bar
from qlora_lightning.commands.inspect.row_text import RowWriter
from qlora_lightning.page.visible import show_controls

_BAR_WIDTH = 40
_EIGHTHS = "▏▎▍▌▋▊▉█"


def print_inspection(found: Inspection, console: Console) -> None:
    """Print the whole report."""
    console.print(Text(found.config or "data", "bold"))
    for line in (found.settings, *found.notes):
        console.print(Text(line, "dim"))
    console.print()
    console.print(_counts(found.splits))
    _heading(console, "Tokens per sample")
    console.print(_percentiles(found.splits))
    for split in found.splits:
        if split.bars:
            _heading(console, f"{split.name}: tokens per sample")
            console.print(_histogram(split.bars))
    _print_epoch(found, console)
    _print_ends(found, console)
    for fault in find_faults(found.splits):
        _heading(console, fault.title)
        for line in fault.lines:
            console.print(Padding(Text(show_controls(line), overflow="fold"), (0, 0, 0, 2), expand=False))
    _print_rows(found, console)


def _print_epoch(found: Inspection, console: Console) -> None:
    if found.epoch is not None:
        _heading(console, "A stream of train" if found.epoch.streaming else "An epoch of train")
        table = Table.grid(padding=(0, 2))
        for heading, text in word_epoch(found.epoch, found.batch_size):
            table.add_row(f"  {heading}", text)
        console.print(table)


def _print_ends(found: Inspection, console: Console) -> None:
    table = Table.grid(padding=(0, 1))
    for well, sentence in found.ends:
        table.add_row(Text("✓", "green") if well else Text("✗", "bold red"), Text(show_controls(sentence)))
    console.print()
    console.print(table)


def _print_rows(found: Inspection, console: Console) -> None:
    _heading(console, f"Rows of {found.rows_split} as the model sees them")
    writer = RowWriter(console)
    console.print(writer.legend())
    for row in found.rows:
        console.print()
        parts = [Text(row.where, "bold")]
        if row.pieces:
            parts.append(Text(f"  {row.tokens:,} tokens, {row.labelled:,} labelled"))
        if row.why:
            parts.append(Text(f"  ({show_controls(row.why)})", "dim"))
        if row.note:
            parts.append(Text(f"  {show_controls(row.note)}"))
        console.print(Text.assemble(*parts))
        for line in writer.lines(row.pieces):
            console.print(line, soft_wrap=True)


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, "bold"))


def _counts(splits: list[SplitFacts]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for split in splits:
        table.add_column(split.name, justify="right", overflow="fold")
    for heading, cells in table_rows(splits):
        table.add_row(heading, *cells)
    return table


def _percentiles(splits: list[SplitFacts]) -> Table:
    table = Table("", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in PERCENTILES:
        table.add_column(name, justify="right", min_width=5)
    for split in splits:
        for kind, values in (("tokens", split.lengths), ("labelled", split.labels)):
            if values:
                table.add_row(f"{split.name} {kind}", *(f"{values[name]:,}" for name in PERCENTILES))
    return table


def _histogram(bars: list[Bar]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    most = max(bar.samples for bar in bars)
    for bar in bars:
        table.add_row(f"  {bar.label}", Text(_draw(bar.samples / most), "cyan"), f"{bar.samples:,}")
    return table


def _draw(share: float) -> str:
    """Draw a bar of block characters; one that is not empty is seen."""
    eighths = round(share * _BAR_WIDTH * 8) or (1 if share else 0)
    whole, part = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[part - 1] if part else "")
