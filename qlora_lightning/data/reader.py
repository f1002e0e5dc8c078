"""A data file as rows: JSON lines, or one JSON array, each row with the line it stands on."""

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qlora_lightning.data.bad_rows import BadRow, refuse
from qlora_lightning.errors import UserError

_SPACE = re.compile(r"[ \t\r\n]*")
_SUFFIXES = (".jsonl", ".json")


class Row(NamedTuple):
    """One dict of a data file.

    Attributes:
        values: the row's own keys and values.
        file: the path as the user wrote it.
        line: the line on which the row begins, counted from 1.
    """

    values: dict[str, Any]
    file: str
    line: int

    @property
    def where(self) -> str:
        """File and line, as every message about this row begins: ``train.jsonl:17``."""
        return f"{self.file}:{self.line}"


def read_rows(path: str | Path, bad: list[BadRow] | None = None) -> list[Row]:
    """Read all rows of a ``.jsonl`` or ``.json`` file, in file order; blank lines are skipped.

    Args:
        path: the file; relative paths are relative to the current folder.
        bad: where lines that are no rows are collected; without it they are an error.

    Raises:
        UserError: if the file is missing, a folder, of another kind or empty; or if a line is not UTF-8, not JSON or
            not an object (and ``bad`` was not given).
    """
    file = _find_file(str(path))
    faults: list[BadRow] = []
    rows = []
    for line, values, fault in _parse(file):
        if fault:
            faults.append(BadRow(f"{path}:{line}", fault))
        else:
            rows.append(Row(values, str(path), line))
    if not rows and not faults:
        raise UserError(f"{path} holds no rows: expected one JSON object per line, or an array of objects.")
    if bad is None:
        refuse(faults)
    else:
        bad.extend(faults)
    return rows


def _find_file(name: str) -> Path:
    """Return the path of an existing data file of a known kind, or say what is wrong with the name."""
    file = Path(name).expanduser()
    if file.is_dir():
        raise UserError(f"{name} is a folder: expected one data file in it ({' or '.join(_SUFFIXES)}).")
    if not file.exists():
        raise UserError(_describe_missing(name, file))
    if file.suffix.lower() not in _SUFFIXES:
        raise UserError(
            f"{name} ends in {file.suffix or 'nothing'!r}: expected {' or '.join(_SUFFIXES)} (one JSON object per "
            "line, or an array of objects)."
        )
    return file


def _describe_missing(name: str, file: Path) -> str:
    message = f"data file {name} does not exist (paths are relative to the current folder, {Path.cwd()})"
    if not file.parent.is_dir():
        return f"{message}: there is no folder {file.parent} either."
    near = difflib.get_close_matches(file.name, [entry.name for entry in file.parent.iterdir()], n=1)
    return f"{message}: did you mean {file.parent / near[0]}?" if near else f"{message}."


def _parse(file: Path) -> Iterator[tuple[int, Any, str]]:
    """Yield (line, values, fault) for each row; the fault is empty where the row is an object."""
    if file.suffix.lower() == ".json":
        text, line, fault = _decode(file.read_bytes(), 1)
        if fault:
            yield line, None, fault
            return
        if text.lstrip().startswith("["):
            yield from _parse_array(text)
            return
        if _is_one_long_object(text):
            raise UserError(f"{file} holds one JSON object: expected an array of objects, or one object per line.")
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            text, _, fault = _decode(raw, number)
            if fault or text.strip():
                yield number, *((None, fault) if fault else _parse_object(text))


def _decode(raw: bytes, line: int) -> tuple[str, int, str]:
    """Return (text, line, fault); a byte order mark, which Windows editors write, is dropped."""
    try:
        return raw.decode("utf-8-sig"), line, ""
    except UnicodeDecodeError as error:
        return "", line + raw[: error.start].count(b"\n"), "not UTF-8 text: save the file as UTF-8"


def _is_one_long_object(text: str) -> bool:
    if text.strip().count("\n") == 0:
        return False
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def _parse_object(text: str) -> tuple[Any, str]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg} (column {error.colno})"
    return values, "" if isinstance(values, dict) else f"{_kind(values)}, not a JSON object"


def _parse_array(text: str) -> Iterator[tuple[int, Any, str]]:
    """Yield the elements one by one, so that each has its line; what follows a syntax error cannot be read."""
    decoder = json.JSONDecoder()
    at, line, counted, index = text.index("[") + 1, 1, 0, 0
    while True:
        at = _skip_space(text, at)
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]" and index == 0:
            return
        try:
            values, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield error.lineno, None, f"not JSON in element {index} of the array: {error.msg} (column {error.colno})"
            return
        fault = "" if isinstance(values, dict) else f"element {index} of the array is {_kind(values)}, not an object"
        yield line, values, fault
        at, index = _skip_space(text, at), index + 1
        if text[at : at + 1] == "]":
            if text[at + 1 :].strip():
                yield line + text.count("\n", counted, at), None, "more text after the end of the array"
            return
        if text[at : at + 1] != ",":
            yield (
                line + text.count("\n", counted, at),
                None,
                f"expected ',' or ']' after element {index - 1} of the array",
            )
            return
        at += 1


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _kind(value: object) -> str:
    names = {str: "a string", list: "an array", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
