"""The report in the terminal, with colours or without, and as one HTML page that needs nothing beside itself."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_lightning import __version__
from qlora_lightning.commands.inspection import facts
from qlora_lightning.commands.inspection.rows import REASONING, TOOL_CALL, Piece
from qlora_lightning.page import render_page
from qlora_lightning.support.console import show_controls

_BAR = "█" * 40
_BORDER, _OPEN, _CLOSE, _STOP = "│", "⟦", "⟧", "■"
_PARTS = {REASONING: "cyan", TOOL_CALL: "yellow"}  # dim if they are not labelled


def print_inspection(found: facts.Inspection, console: Console) -> None:
    """Print the whole report."""

    def heading(text: str) -> None:
        console.print()
        console.print(Text(text, "bold"))

    console.print(Text(found.config, "bold"))
    for note in found.notes:
        console.print(Text(note, "dim"))
    for table in found.tables:
        heading(table.title)
        console.print(_draw_table(table))
    for split, bars in found.histograms.items():
        heading(f"{split}: tokens per sample")
        console.print(_draw_histogram(bars))
    for title, lines in found.findings.items():
        heading(title)
        for line in lines:
            _print_indented(Text(line), console)
    heading(f"Rows of {found.split} as the model sees them")
    is_coloured = console.color_system is not None and not console.no_color
    console.print(_legend(is_coloured))
    for row in found.rows:
        console.print()
        console.print(Text.assemble((row.where, "bold"), f"  {row.about}"))
        if row.pieces:
            _print_indented(_write_row(row.pieces, is_coloured), console)


def _print_indented(text: Text, console: Console) -> None:
    for line in text.wrap(console, console.width - 2, overflow="fold"):
        console.print(Text("  ") + line)


def _draw_table(table: facts.Table) -> Table:
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(table.headings))
    for number, heading in enumerate(table.headings or ("", "")):
        is_number = number > 0 and bool(table.headings)
        drawn.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for line in table.lines:
        drawn.add_row(*map(Text, line))
    return drawn


def _draw_histogram(bars: Mapping[str, int]) -> Table:
    drawn = Table.grid(padding=(0, 2))
    for justify in ("right", "left", "right"):
        drawn.add_column(justify=justify)
    most = max(bars.values())
    for tokens, samples in bars.items():
        width = round(samples / most * len(_BAR)) or min(samples, 1)  # one that is not empty is seen
        drawn.add_row(f"  {tokens}", Text(_BAR[:width], "blue"), f"{samples:,}")
    return drawn


def _legend(is_coloured: bool) -> Text:
    if not is_coloured:
        return Text(f"{_OPEN}labelled tokens{_CLOSE} · {_STOP} stop token · {_BORDER} between tokens · ↵ newline")
    marks = [("labelled", "bold green"), ("stop token", "bold reverse green"), ("control token", "magenta")]
    marks += list(_PARTS.items())
    return Text(" · ").join([*(Text(*mark) for mark in marks), Text("↵ newline")])


def _write_row(pieces: Sequence[Piece], is_coloured: bool) -> Text:
    """Write a sample with its tokens set apart: by colour and weight, or by marks if there are no colours."""
    row = Text()
    is_labelled = False
    for number, piece in enumerate(pieces):
        text = show_controls(piece.text).replace("\n", "↵\n")
        if is_coloured:
            row.append(text, _style(piece, number))
            continue
        mark = _BORDER if number else ""
        if piece.labelled != is_labelled:
            mark, is_labelled = (_OPEN if piece.labelled else _CLOSE), piece.labelled
        row.append(f"{mark}{text}{_STOP if piece.stop else ''}")
    if is_labelled and not is_coloured:
        row.append(_CLOSE)
    if row.plain.endswith("\n"):
        row.right_crop()
    return row


def _style(piece: Piece, number: int) -> str:
    if piece.stop:
        return "bold reverse green"
    if piece.special:
        return "bold magenta" if piece.labelled else "magenta"
    weight = "bold " if number % 2 == 0 else ""  # neighbours differ
    if piece.part:
        return f"{weight}{_PARTS[piece.part]}" if piece.labelled else f"dim {weight}{_PARTS[piece.part]}"
    return f"{weight}green" if piece.labelled else ("dim" if number % 2 else "")


def render_inspection(found: facts.Inspection) -> str:
    """Return the page's HTML; every text from outside is escaped."""
    return render_page(
        Path(__file__).with_name("page.html"),
        found=found,
        tokens_of=_describe_tokens,
        parts=list(_PARTS),
        version=__version__,
    )


def _describe_tokens(pieces: Sequence[Piece]) -> Iterator[tuple[str, str, str]]:
    """Yield of each piece its text, its classes in the style sheet, and what hovering shows."""
    for piece in pieces:
        kinds = {"labelled": piece.labelled, "control": piece.special, "stop": piece.stop, piece.part: piece.part}
        names = [name for name, holds in kinds.items() if holds]
        ids = f"id {' '.join(map(str, piece.ids))}"
        classes = " ".join(["token", *names]).replace("tool call", "tool-call")
        yield show_controls(piece.text).replace("\n", "↵\n"), classes, " · ".join([ids, *names])
