"""The report as one HTML page that needs nothing beside itself: no script, no font, no network."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlora_lightning import __version__
from qlora_lightning.commands.inspection.facts import (
    PERCENTILES,
    SplitFacts,
    describe_epoch,
    find_faults,
    headline,
    source_table,
    table_rows,
)
from qlora_lightning.commands.inspection.gather import Inspection, Piece
from qlora_lightning.commands.output import write_output
from qlora_lightning.page.render import render_page as _render
from qlora_lightning.page.visible import show_controls

_MARK = b'<meta name="generator" content="qlora_lightning inspect">'
_TEMPLATE = Path(__file__).with_name("page.html")
_HEIGHT, _PITCH = 180, 46  # of the bars, in units of the drawing


def write_page(found: Inspection, file: Path) -> None:
    """Write the page.

    Raises:
        UserError: the file cannot be written.
    """
    write_output(file, render_page(found))


def is_page(file: Path) -> bool:
    """Whether a file is a page of this command."""
    with file.open("rb") as opened:
        return _MARK in opened.read(1000)


def render_page(found: Inspection) -> str:
    """Return the page's HTML; every text from outside is escaped."""
    return _render(
        _TEMPLATE,
        found=found,
        version=__version__,
        headline=headline(found.splits[0], found.epoch),
        table=table_rows(found.splits),
        sources=[(split.name, *source_table(split.sources)) for split in found.splits if split.sources],
        percentiles=list(PERCENTILES),
        drawings=[_drawing(split) for split in found.splits if split.bars],
        epoch=[] if found.epoch is None else describe_epoch(found.epoch, found.batch_size),
        faults=find_faults(found.splits),
        rows=[(row, list(_tokens(row.pieces))) for row in found.rows],
        parts=sorted({piece.part for row in found.rows for piece in row.pieces} - {""}),
    )


def _drawing(split: SplitFacts) -> dict[str, Any]:
    """Return a split's histogram as the places of its bars."""
    most = max(bar.samples for bar in split.bars)
    bars = []
    for number, bar in enumerate(split.bars):
        height = max(2.0, _HEIGHT * bar.samples / most) if bar.samples else 0.0
        tick = f"{_short(bar.low)}+" if bar.high is None else _short(bar.low)
        shown = {"x": _PITCH * number, "y": round(_HEIGHT - height, 1), "height": round(height, 1), "tick": tick}
        about = f"{bar.label} tokens: {bar.samples:,} samples"
        bars.append({**shown, "count": _short(bar.samples) if bar.samples else "", "about": about})
    return {"name": split.name, "bars": bars, "pitch": _PITCH, "width": _PITCH * len(bars), "height": _HEIGHT}


def _short(number: int) -> str:
    """Write a number so that it fits over a bar."""
    if number < 10_000:
        return f"{number:,}"
    thousands = round(number / 1_000)
    return f"{thousands:,}k" if thousands < 1_000 else f"{number / 1_000_000:.1f}M"


def _tokens(pieces: Iterable[Piece]) -> Iterable[dict[str, str]]:
    """Give each piece its text, what hovering tells, and its classes in the style sheet."""
    for piece in pieces:
        kinds = {"labelled": piece.labelled, "special": piece.special, "stop": piece.stop}
        names = [name for name, holds in kinds.items() if holds] + [piece.part] * bool(piece.part)
        number = "id" if len(piece.ids) == 1 else "ids"
        about = " · ".join([f"{number} {' '.join(map(str, piece.ids))}", *names])
        text = show_controls(piece.text).replace("\n", "↵\n")
        yield {"text": text, "about": about, "classes": " ".join(["t", *(name[:2] for name in names)])}
