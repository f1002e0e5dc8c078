"""JSON lines: one object per line, read line by line."""

import codecs
import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qlora_lightning.data.reading.compression import open_stream
from qlora_lightning.data.reading.cursor import MAX_ROW_BYTES, Cursor, Parsed

NOT_UTF8 = "not UTF-8 text: save the file as UTF-8"
TOO_LONG = f"longer than {MAX_ROW_BYTES >> 20} MiB: two rows have probably run together"
_PIECE_BYTES = 1 << 16


class RowDecoder(json.JSONDecoder):
    """Decodes JSON, and remembers a key that stands twice in an object, of which Python keeps the last.

    Attributes:
        fault: what is wrong with what was decoded last; empty where no key stands twice.
    """

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._make_object)
        self.fault = ""

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        """Decode the value that begins at ``idx``, and give its end."""
        self.fault = ""
        return super().raw_decode(s, idx)

    def _make_object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs) and not self.fault:
            keys = [key for key, _ in pairs]
            twice = next(key for key in values if keys.count(key) > 1)
            self.fault = f"has the key {reprlib.repr(twice)} twice in one object, where the last would count: keep one"
        return values


_DECODER = RowDecoder()


def read_lines(file: Path, cursor: Cursor) -> Iterator[Parsed]:
    """Yield the rows of a ``.jsonl`` file from the cursor on, and move it; blank lines are skipped."""
    with open_stream(file, cursor.offset) as stream:
        while raw := stream.readline(MAX_ROW_BYTES + 1):
            too_long = len(raw) > MAX_ROW_BYTES
            cursor.offset += len(raw) + (_pass_line(stream, raw) if too_long else 0)
            line, cursor.line = cursor.line, cursor.line + 1
            # Windows editors write it at the beginning of a file, and files are laid end to end.
            raw = raw.removeprefix(codecs.BOM_UTF8)
            if raw.isspace() or not raw:
                continue
            cursor.count += 1
            yield line, *((None, TOO_LONG) if too_long else _parse_line(raw))


def _pass_line(stream: BinaryIO, raw: bytes) -> int:
    """Read to the end of the line of which ``raw`` is the beginning, and return the bytes passed over."""
    passed = 0
    while raw and not raw.endswith(b"\n"):
        raw = stream.readline(_PIECE_BYTES)
        passed += len(raw)
    return passed


def _parse_line(raw: bytes) -> tuple[dict[str, Any] | None, str]:
    """Return the object and no fault, or None and what is wrong."""
    try:
        # Not json.loads(raw): it lets surrogates pass, which no tokenizer takes.
        text = raw.rstrip(b"\r\n").decode()
    except UnicodeDecodeError as error:
        cut = error.reason == "unexpected end of data" and not raw.endswith(b"\n")
        return None, "the line ends in the middle of a character" if cut else NOT_UTF8
    try:
        values = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        return None, _describe_error(error, text)
    if not isinstance(values, dict):
        return None, f"{kind_of_value(values)}, not a JSON object"
    return (None, _DECODER.fault) if _DECODER.fault else (values, "")


def _describe_error(error: ValueError | RecursionError, text: str) -> str:
    """Say why a line is not JSON, and where."""
    if not isinstance(error, json.JSONDecodeError):
        # A number of thousands of digits, brackets nested a thousand deep.
        return f"not JSON that can be read: {str(error).partition(';')[0]}"
    if "\0" in text:
        return f"not JSON: NUL byte (column {text.index(chr(0)) + 1})"
    if is_cut(error, text):
        return f"not JSON: the line ends in the middle of the row ({error.msg}, column {error.colno})"
    return f"not JSON: {error.msg} (column {error.colno})"


def is_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Return whether more text could have mended the error: it stands at the end."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip())


def kind_of_value(value: object) -> str:
    """Name the JSON kind of a value that is no object."""
    names = {str: "a string", list: "an array", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
