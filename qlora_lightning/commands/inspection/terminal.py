"""The report in the terminal, readable at 80 columns, with colours or without."""

from collections.abc import Collection, Iterable, Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qlora_lightning.commands.inspection.facts import (
    PERCENTILES,
    Bar,
    Inspection,
    describe_epoch,
    find_faults,
    table_rows,
)
from qlora_lightning.commands.inspection.rows import CALL, REASONING, Piece, ShownRow
from qlora_lightning.page import show_controls

_BAR_WIDTH = 40
_EIGHTHS = "▏▎▍▌▋▊▉█"
_MARGIN = "  "
_NEWLINE, _BORDER, _OPEN, _CLOSE, _STOP = "↵", "│", "⟦", "⟧", "■"
_PARTS = {REASONING: "cyan", CALL: "yellow"}  # dim if they are not labelled


def print_inspection(found: Inspection, console: Console) -> None:
    """Print the whole report."""

    def heading(text: str) -> None:
        console.print()
        console.print(Text(text, "bold"))

    console.print(Text(found.config or "data", "bold"))
    for line in found.notes:
        console.print(Text(line, "dim"))
    console.print()
    counts = [[name, *cells] for name, cells in table_rows(found.splits)]
    console.print(_table(["", *(split.name for split in found.splits)], counts))
    for split in found.splits:
        if split.sources:
            heading(f"{split.name}: sources")
            console.print(_table(*split.sources))
    heading("Tokens per sample")
    lines = []
    for split in found.splits:
        for kind, values in (("tokens", split.lengths), ("labelled", split.labels)):
            if values:
                lines.append([f"{split.name} {kind}", *(f"{value:,}" for value in values.values())])
    console.print(_table(["", *PERCENTILES], lines))
    for split in found.splits:
        if split.bars:
            heading(f"{split.name}: tokens per sample")
            console.print(_histogram(split.bars))
    if found.epoch is not None:
        heading("A stream of train" if found.epoch.streaming else "An epoch of train")
        grid = Table.grid(padding=(0, 2))
        for name, text in describe_epoch(found.epoch, found.batch_size):
            grid.add_row(f"  {name}", text)
        console.print(grid)
    grid = Table.grid(padding=(0, 1))
    for well, sentence in found.ends:
        grid.add_row(Text("✓", "green") if well else Text("✗", "bold red"), Text(show_controls(sentence)))
    console.print()
    console.print(grid)
    for fault in find_faults(found.splits):
        heading(fault.title)
        for line in fault.lines:
            console.print(Padding(Text(show_controls(line), overflow="fold"), (0, 0, 0, 2), expand=False))
    heading(f"Rows of {found.splits[0].name} as the model sees them")
    _print_rows(found.rows, console)


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        table.add_column(heading, justify="right", overflow="fold", min_width=5)
    for name, *cells in lines:
        table.add_row(Text(show_controls(name)), *cells)
    return table


def _histogram(bars: list[Bar]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    most = max(bar.samples for bar in bars)
    for bar in bars:
        eighths = round(bar.samples / most * _BAR_WIDTH * 8) or min(bar.samples, 1)  # one that is not empty is seen
        whole, part = divmod(eighths, 8)
        drawn = "█" * whole + (_EIGHTHS[part - 1] if part else "")
        table.add_row(f"  {bar.label}", Text(drawn, "cyan"), f"{bar.samples:,}")
    return table


def _print_rows(rows: Sequence[ShownRow], console: Console) -> None:
    writer = RowWriter(console)
    console.print(writer.legend({piece.part for row in rows for piece in row.pieces}))
    for row in rows:
        console.print()
        line = Text(row.where, "bold")
        if row.pieces:
            line.append(f"  {row.tokens:,} tokens, {row.labelled:,} labelled", "not bold")
        if row.weight != 1:
            line.append(f", weight {row.weight:g}", "not bold")
        if row.why:
            line.append(f"  ({show_controls(row.why)})", "not bold dim")
        if row.note:
            line.append(f"  {show_controls(row.note)}", "not bold")
        console.print(line)
        for text in writer.lines(row.pieces):
            console.print(text, soft_wrap=True)


class RowWriter:
    """Lays the pieces of a sample into lines that break between tokens, for the width and colours of ``console``."""

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
            names = (f"{_OPEN}labelled tokens{_CLOSE}", f"{_STOP} stop token", f"{_BORDER} between tokens")
            marks = [Text(name) for name in names]
        return Text(" · ").join([*marks, Text(f"{_NEWLINE} newline")])

    def lines(self, pieces: Iterable[Piece]) -> Iterator[Text]:
        """Yield the lines of a sample."""
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
        """Yield text and style of each piece, its newlines made visible."""
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


def _style(piece: Piece, number: int) -> str:
    """Return the style of a piece; neighbours differ in weight, so that each token is seen."""
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
