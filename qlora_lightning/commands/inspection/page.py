"""The report as one HTML page that needs nothing beside itself: no script, no font, no network."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora_lightning import __version__
from qlora_lightning.commands.inspection.facts import (
    PERCENTILES,
    Inspection,
    SplitFacts,
    describe_epoch,
    find_faults,
    share,
    table_rows,
)
from qlora_lightning.commands.inspection.rows import Piece
from qlora_lightning.page import render_page as _render
from qlora_lightning.page import show_controls

_MARK = b'<meta name="generator" content="qlora_lightning inspect">'
_HEIGHT, _PITCH = 180, 46  # of the bars, in units of the drawing


def is_page(file: Path) -> bool:
    """Whether a file is a page of this command."""
    with file.open("rb") as opened:
        return _MARK in opened.read(1000)


def render_page(found: Inspection) -> str:
    """Return the page's HTML; every text from outside is escaped."""
    return _render(
        Path(__file__).with_name("page.html"),
        found=found,
        version=__version__,
        headline=_headline(found),
        table=table_rows(found.splits),
        percentiles=list(PERCENTILES),
        drawings=[_drawing(split) for split in found.splits if split.bars],
        epoch=[] if found.epoch is None else describe_epoch(found.epoch, found.batch_size),
        faults=find_faults(found.splits),
        rows=[(row, list(_tokens(row.pieces))) for row in found.rows],
        parts=sorted({piece.part for row in found.rows for piece in row.pieces} - {""}),
    )


def _headline(found: Inspection) -> list[tuple[str, str]]:
    """Return the few figures that say most, each with what it counts."""
    split = found.splits[0]
    report = split.report
    figures = [
        (f"{report.samples:,}", f"samples of {split.name}"),
        (f"{report.tokens:,}", "tokens"),
        (f"{split.lengths.get('max', 0):,}", "tokens in the longest"),
    ]
    if report.labelled:
        figures.append((share(report.labelled, report.tokens), "labelled"))
    if found.epoch is not None and not found.epoch.streaming:
        figures.append((f"{found.epoch.steps:,}", "steps per epoch"))
    return figures


def _drawing(split: SplitFacts) -> dict[str, Any]:
    """Return a split's histogram as the positions of its bars."""
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


def _tokens(pieces: Iterable[Piece]) -> Iterator[dict[str, str]]:
    """Yield the text of each piece, what hovering shows, and its classes in the style sheet."""
    for piece in pieces:
        kinds = {"labelled": piece.labelled, "special": piece.special, "stop": piece.stop, piece.part: piece.part}
        names = [name for name, holds in kinds.items() if holds]
        number = "id" if len(piece.ids) == 1 else "ids"
        about = " · ".join([f"{number} {' '.join(map(str, piece.ids))}", *names])
        text = show_controls(piece.text).replace("\n", "↵\n")
        yield {"text": text, "about": about, "classes": " ".join(["t", *(name[:2] for name in names)])}
