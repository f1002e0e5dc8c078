"""Data files as streams of bytes, compressed or not, and the kind of a file by its name."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qlora_lightning.support.errors import UserError

KINDS = (".jsonl", ".json", ".csv", ".parquet")
_CHUNK_BYTES = 1 << 20


def _open_zstd(file: Path) -> io.BufferedReader:
    import pyarrow  # a fifth of a second, for the one compression that the standard library lacks before Python 3.14

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstd,
}


def kind_of(file: Path) -> tuple[str, str]:
    """Return kind and compression by the file's name: ``a.jsonl.gz`` is ``(".jsonl", ".gz")``, else empty strings."""
    name = file.name.lower()
    compression = next((suffix for suffix in _OPENERS if name.endswith(suffix)), "")
    name = name.removesuffix(compression)
    return next((suffix for suffix in KINDS if name.endswith(suffix)), ""), compression


def describe_kinds() -> str:
    """Name the suffixes that are read."""
    return f"{', '.join(KINDS[:-1])} or {KINDS[-1]}, each also compressed ({', '.join(_OPENERS)})"


@contextmanager
def open_stream(file: Path, offset: int = 0) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed, from a byte on (counted after decompression).

    Raises:
        UserError: here or while it is read: it cannot be read, is damaged, or ends before the offset.
    """
    _, compression = kind_of(file)
    try:
        with _OPENERS[compression](file) if compression else file.open("rb") as stream:
            _skip(stream, offset, file, compression)
            yield stream
    except EOFError as error:
        raise UserError(f"{file} is cut off in the middle: compress or download it again.") from error
    except (OSError, zlib.error, lzma.LZMAError) as error:
        # Errors of the system have a number; those of decompressing have none.
        if not compression or getattr(error, "errno", None):
            raise UserError(f"{file} cannot be read: {error}.") from error
        message = f"{file} is damaged, or not a {compression} file ({error}): compress or download it again."
        raise UserError(message) from error


def _skip(stream: BinaryIO, offset: int, file: Path, compression: str) -> None:
    if not compression:
        size = file.stat().st_size
        left = max(offset - size, 0)
        stream.seek(offset)
    else:
        left = offset
        while left and (chunk := stream.read(min(left, _CHUNK_BYTES))):
            left -= len(chunk)
    if left:
        raise UserError(f"{file} ends before byte {offset}, where reading is to go on: it was changed since.")
