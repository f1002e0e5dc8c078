"""A ``.json`` file: an array of objects, or one object per line."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from qlora_lightning.data.reading.compression import open_stream
from qlora_lightning.data.reading.cursor import MAX_ROW_BYTES, Cursor, Parsed
from qlora_lightning.data.reading.read_array import read_array
from qlora_lightning.data.reading.read_lines import is_cut, read_lines
from qlora_lightning.support.errors import UserError


def read_json(file: Path, cursor: Cursor) -> Iterator[Parsed]:
    """Yield the rows of a ``.json`` file from the cursor on, and move it.

    Raises:
        UserError: the file holds one object that runs over several lines.
    """
    with open_stream(file) as stream:
        head = stream.read(MAX_ROW_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
        is_whole = not stream.read(1)
    if head.startswith(b"["):
        return read_array(file, cursor)
    if _is_one_long_object(head.decode(errors="replace"), is_whole):
        raise UserError(
            f"{file} holds one JSON object over several lines: expected an array of objects, or one object per line."
        )
    return read_lines(file, cursor)


def _is_one_long_object(head: str, is_whole: bool) -> bool:
    """Return whether a file begins with an object over several lines, by its first 4 MiB or by the whole of it."""
    if not head.startswith("{"):
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(head)
    except json.JSONDecodeError as error:
        return not is_whole and "\n" in head and is_cut(error, head)
    except (ValueError, RecursionError):
        return False
    return "\n" in head[:end]
