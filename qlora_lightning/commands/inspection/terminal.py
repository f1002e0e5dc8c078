"""The report in the terminal, readable at 80 columns, with colours or without."""

from collections.abc import Collection, Iterable, Iterator

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qlora_lightning.commands.inspection.facts import (
    PERCENTILES,
    Bar,
    SourceFacts,
    SplitFacts,
    describe_epoch,
    find_faults,
    source_table,
    table_rows,
)
from qlora_lightning.commands.inspection.gather import CALL, REASONING, Inspection, Piece
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
    for split in found.splits:
        if split.sources:
            _heading(console, f"{split.name}: sources")
            console.print(_sources(split.sources))
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
        for heading, text in describe_epoch(found.epoch, found.batch_size):
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
    console.print(writer.legend({piece.part for row in found.rows for piece in row.pieces}))
    for row in found.rows:
        console.print()
        parts = [Text(row.where, "bold")]
        if row.pieces:
            parts.append(Text(f"  {row.tokens:,} tokens, {row.labelled:,} labelled"))
        if row.weight != 1:
            parts.append(Text(f", weight {row.weight:g}"))
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


def _sources(sources: list[SourceFacts]) -> Table:
    headings, lines = source_table(sources)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for name, *cells in lines:
        table.add_row(Text(show_controls(name)), *cells)
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


_MARGIN = "  "
_NEWLINE, _BORDER, _OPEN, _CLOSE, _STOP = "↵", "│", "⟦", "⟧", "■"


class RowWriter:
    """Lays the pieces of a sample into lines that break between tokens.

    Args:
        console: whose width and colours count.
    """

    def __init__(self, console: Console) -> None:
        self.width = console.width
        self.coloured = console.color_system is not None and not console.no_color

    def legend(self, parts: Collection[str] = ()) -> Text:
        """Return what the marks mean, and the colours of those parts that occur."""
        if self.coloured:
            labelled = Text.assemble(("labelled", "bold green"), (" tokens", "green"), " (the loss counts them)")
            stop = Text.assemble(("stop token", "bold white on red"))
            special = Text.assemble(("special", "magenta"), " token")
            marks = [labelled, stop, special, *(Text(part, style) for part, style in _PARTS.items() if part in parts)]
        else:
            marks = [
                Text(f"{_OPEN}labelled tokens{_CLOSE}"),
                Text(f"{_STOP} stop token"),
                Text(f"{_BORDER} between tokens"),
            ]
        return Text(" · ").join([*marks, Text(f"{_NEWLINE} newline")])

    def lines(self, pieces: Iterable[Piece]) -> Iterator[Text]:
        """Give the lines of a sample."""
        line = Text(_MARGIN)
        for text, style in self._marked(pieces):
            first, *rest = text.split("\n")
            if cell_len(line.plain) + cell_len(first) > self.width and len(line) > len(_MARGIN):
                yield line
                line = Text(_MARGIN)
            line.append(first, style)
            for part in rest:
                yield line
                line = Text(_MARGIN)
                line.append(part, style)
        if len(line) > len(_MARGIN):
            yield line

    def _marked(self, pieces: Iterable[Piece]) -> Iterator[tuple[str, str]]:
        """Give text and style of each piece, its newlines made visible."""
        inside = False
        for number, piece in enumerate(pieces):
            text = show_controls(piece.text).replace("\n", f"{_NEWLINE}\n")
            if self.coloured:
                yield text, _style(piece, number)
                continue
            mark = _BORDER if number else ""
            if piece.labelled != inside:
                mark, inside = (_OPEN if piece.labelled else _CLOSE), piece.labelled
            yield f"{mark}{text}{_STOP if piece.stop else ''}", ""
        if inside and not self.coloured:
            yield _CLOSE, ""


_PARTS = {REASONING: "cyan", CALL: "yellow"}  # dim where they are not labelled


def _style(piece: Piece, number: int) -> str:
    """Neighbours differ in weight, so that each token is seen."""
    if piece.stop:
        return "bold white on red"
    if piece.special:
        return "bold magenta" if piece.labelled else "magenta"
    if piece.part:
        weight = "" if piece.labelled else "dim "
        return f"{weight}{'' if number % 2 else 'bold '}{_PARTS[piece.part]}"
    if piece.labelled:
        return "green" if number % 2 else "bold green"
    return "dim" if number % 2 else ""
