"""The header of a safetensors file: which tensors it holds and where, without reading them."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from qlora_lightning.errors import UserError


@dataclass(frozen=True)
class TensorSpan:
    """Where one tensor's bytes lie: ``size_bytes`` from ``start`` on, counted from the start of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size_bytes: int


def read_spans(file: Path) -> list[TensorSpan]:
    """Return the spans of all tensors of a safetensors file.

    Raises:
        UserError: the file is not a safetensors file, or is shorter than its header says.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (header_size,) = struct.unpack("<Q", stream.read(8))
            if header_size > size - 8:
                raise ValueError("the header is cut off")
            header = json.loads(stream.read(header_size))
        header.pop("__metadata__", None)
        spans = [_span(file, 8 + header_size, name, item) for name, item in header.items()]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}). Download or save it again.") from error
    end = max((span.start + span.size_bytes for span in spans), default=0)
    if end > size:
        raise UserError(
            f"{file} is cut off: its header promises {end:,} bytes, the file has {size:,}. Download or save it again."
        )
    return spans


def _span(file: Path, data_start: int, name: str, item: dict[str, object]) -> TensorSpan:
    shape, offsets = item["shape"], item["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError(f"the header's line of {name} is not readable")
    start, end = offsets
    return TensorSpan(name, str(item["dtype"]), tuple(shape), file, data_start + start, end - start)
