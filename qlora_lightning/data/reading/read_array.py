"""One JSON array of objects, parsed from chunks, so that it never lies in memory as a whole."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qlora_lightning.data.reading.compression import open_stream
from qlora_lightning.data.reading.cursor import MAX_ROW_BYTES, REST_UNREAD, Cursor, Parsed
from qlora_lightning.data.reading.read_lines import NOT_UTF8, TOO_LONG, RowDecoder, is_cut, kind_of_value

_CHUNK_BYTES = 1 << 18
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = RowDecoder()


def read_array(file: Path, cursor: Cursor) -> Iterator[Parsed]:
    """Yield the elements of the array in a ``.json`` file from the cursor on, and move it.

    The cursor stands right behind an element, before the comma. What follows a syntax error is not read.
    """
    with open_stream(file, cursor.offset) as stream:
        window = _Window(stream, cursor)
        if not cursor.offset:
            window.enter_array()
        try:
            while window.enter_element():
                line, value = cursor.line, window.read_value()
                cursor.count += 1
                reason = _DECODER.fault if isinstance(value, dict) else f"is {kind_of_value(value)}, not an object"
                if reason:
                    yield line, None, f"element {cursor.count - 1} of the array {reason}"
                else:
                    yield line, value, ""
        except _Fault as fault:
            cursor.count += 1
            cursor.end_file()
            yield fault.line, None, f"{fault}; {REST_UNREAD}"
        cursor.end_file()


class _Fault(Exception):
    """The array cannot be read any further."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line


class _Window:
    """The part of the file's text in which the next element is looked for; ``at`` is where the cursor stands in it."""

    def __init__(self, stream: BinaryIO, cursor: Cursor) -> None:
        self.text, self.at = "", 0
        self._stream, self._cursor = stream, cursor
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._ended = self._broken = False  # no more text; and that because of bytes that are not UTF-8

    def enter_array(self) -> None:
        """Step over the opening bracket, which is there, and a byte order mark before it."""
        self._skip_space()
        if self.text.startswith("\ufeff"):
            self._move(self.at + 1)
            self._skip_space()
        self._move(self.at + 1)

    def enter_element(self) -> bool:
        """Step to the next element; False at the end of the array.

        Raises:
            _Fault: there is neither a comma nor the end.
        """
        mark = self._skip_space()
        if mark == "]":
            self._move(self.at + 1)
            if self._skip_space():
                raise self._fault("more text after the end of the array", self.at)
            return False
        if self._cursor.count:
            if mark != ",":
                reason = f"expected ',' or ']' after element {self._cursor.count - 1} of the array"
                raise self._fault(reason, self.at)
            self._move(self.at + 1)
            self._skip_space()
        return True

    def read_value(self) -> Any:
        """Parse the element and step over it.

        Raises:
            _Fault: it is not JSON, or too long.
        """
        while True:
            error, end = None, len(self.text)
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as raised:
                error = raised
            # 12 at the end of the text may be the beginning of 123 or 12.5.
            if error is None and end < len(self.text) and self.text[end] in ",] \t\r\n":
                break
            if not self._grow():
                break
        if error is not None:
            raise self._explain(error)
        self._move(end)
        return value

    def _explain(self, error: ValueError | RecursionError) -> _Fault:
        index, element = self._cursor.count, self.text[self.at :]
        if not isinstance(error, json.JSONDecodeError):
            return self._fault(f"element {index} of the array cannot be read: {str(error).partition(';')[0]}", self.at)
        if len(element) > MAX_ROW_BYTES and is_cut(error, self.text):
            return self._fault(f"element {index} of the array is {TOO_LONG}", self.at)
        if self._broken and is_cut(error, self.text):
            return self._fault("", len(self.text))
        place = f"{error.msg}, character {error.pos - self.at + 1} of it"
        cut = "the file ends in the middle: " if is_cut(error, self.text) else ""
        return self._fault(f"not JSON in element {index} of the array ({cut}{place})", error.pos)

    def _fault(self, reason: str, at: int) -> _Fault:
        line = self._cursor.line + self.text.count("\n", self.at, at)
        return _Fault(NOT_UTF8 if self._broken and at >= len(self.text) else reason, line)

    def _skip_space(self) -> str:
        """Step over white space and return the character behind it; empty at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.at)
            self._move(match.end() if match else self.at)
            if self.at < len(self.text) or not self._grow():
                return self.text[self.at : self.at + 1]

    def _move(self, at: int) -> None:
        passed = self.text[self.at : at]
        self._cursor.offset += len(passed.encode())
        self._cursor.line += passed.count("\n")
        self.at = at

    def _grow(self) -> bool:
        """Read on, as much again as is in hand; False at the end of the file, or with more than one row in hand."""
        kept = self.text[self.at :]
        size = min(max(_CHUNK_BYTES, len(kept)), MAX_ROW_BYTES + 1 - len(kept))
        if self._ended or size <= 0:
            return False
        raw = self._stream.read(size)
        self._ended = not raw
        try:
            more = self._decoder.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            more, self._ended, self._broken = error.object[: error.start].decode(), True, True
        self.text, self.at = kept + more, 0
        return True
