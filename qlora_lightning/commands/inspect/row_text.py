"""A sample in the terminal: token by token, labelled ones in colour, or in brackets where there is no colour."""

from collections.abc import Iterable, Iterator

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from qlora_lightning.commands.inspect.pieces import Piece
from qlora_lightning.page.visible import show_controls

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

    def legend(self) -> Text:
        """Say what the marks mean."""
        if self.coloured:
            labelled = Text.assemble(("labelled", "bold green"), (" tokens", "green"), " (the loss counts them)")
            stop = Text.assemble(("stop token", "bold white on red"))
            special = Text.assemble(("special", "magenta"), " token")
            marks = [labelled, stop, special]
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


def _style(piece: Piece, number: int) -> str:
    """Neighbours differ in weight, so that each token is seen."""
    if piece.stop:
        return "bold white on red"
    if piece.special:
        return "bold magenta" if piece.labelled else "magenta"
    if piece.labelled:
        return "green" if number % 2 else "bold green"
    return "dim" if number % 2 else ""
