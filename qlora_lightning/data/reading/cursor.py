"""Where reading stands in a source, and what the readers of all kinds of files hand over."""

from dataclasses import dataclass
from typing import Any

# No instruction is that long: two rows have run together, or a quote was never closed.
MAX_ROW_BYTES = 4 << 20

# What follows a broken bracket or quote cannot be told from what stands inside it.
REST_UNREAD = "the rest of the file cannot be read"

Parsed = tuple[int, dict[str, Any] | None, str]
"""A row's line, its values (None where it is no row), and then the reason."""


@dataclass
class Cursor:
    """Where the next row begins; plain numbers, so that a checkpoint can hold them.

    Attributes:
        file: index in the source's files.
        offset: bytes of the file, decompressed, that lie before it; -1 if nothing more can be read of this file.
        line: its line, counted from 1.
        count: rows of this file read so far, bad ones included.
    """

    file: int = 0
    offset: int = 0
    line: int = 1
    count: int = 0

    def end_file(self) -> None:
        """Give up the rest of the file."""
        self.offset = -1

    def next_file(self) -> None:
        """Go to the beginning of the next file."""
        self.file, self.offset, self.line, self.count = self.file + 1, 0, 1, 0
