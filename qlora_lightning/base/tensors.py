"""Files of tensors: their headers, and how they are written."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import set_usual_mode

if TYPE_CHECKING:
    from torch import Tensor
from typing import Any


def format_bytes(count: int) -> str:
    """Word a number of bytes in decimal units, as file managers and model hubs do: ``98 MB``, ``5.6 GB``."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    digits = 1 if unit in ("GB", "TB") and size < 100 else 0
    return f"{size:.{digits}f} {unit}"


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


SHARD_BYTES = 2_000_000_000


class ShardWriter:
    """Collects tensors into shards, and writes the index that transformers reads.

    Args:
        folder: where to.
        shard_bytes: a shard is written before it would grow beyond this; a larger tensor gets one of its own.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._size = 0
        self._written: list[tuple[Path, list[str]]] = []
        self._total = 0

    def add(self, name: str, tensor: "Tensor") -> None:
        """Take a tensor, in the dtype in which it shall be stored."""
        if self._shard and self._size + tensor.nbytes > self.shard_bytes:
            self._write()
        self._shard[name] = tensor.contiguous()
        self._size += tensor.nbytes
        self._total += tensor.nbytes

    def finish(self) -> list[Path]:
        """Write what is left, and the index where there are several shards; return the weight files."""
        if self._shard:
            self._write()
        if len(self._written) == 1:
            file = self._written[0][0].rename(self.folder / "model.safetensors")
            return [file]
        count, index, files = len(self._written), dict[str, str](), []
        for number, (file, names) in enumerate(self._written, start=1):
            final = file.rename(self.folder / f"model-{number:05d}-of-{count:05d}.safetensors")
            index.update(dict.fromkeys(names, final.name))
            files.append(final)
        content = {"metadata": {"total_size": self._total}, "weight_map": index}
        text = json.dumps(content, indent=2) + "\n"
        (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        return files

    def _write(self) -> None:
        from safetensors.torch import save_file

        file = self.folder / f"model-{len(self._written) + 1:05d}.safetensors"
        save_file(self._shard, file, {"format": "pt"})
        set_usual_mode(file)  # a server may be another user
        self._written.append((file, list(self._shard)))
        self._shard, self._size = {}, 0


def save_model(model: Any, folder: Path, **options: Any) -> None:
    """Write a model of transformers with its configs.

    Where several processes train together, transformers lets the first one write and the others write nothing, without
    a word. An entry of the cache is made by whichever process comes first.

    Args:
        model: what to write.
        folder: where to.
        options: of transformers' ``save_pretrained``.

    Raises:
        RuntimeError: nothing was written.
    """
    model.should_save_on_this_rank = lambda is_main_process: True  # transformers' own method asks torch for the rank
    try:
        model.save_pretrained(folder, **options)
    finally:
        del model.should_save_on_this_rank
    files = list(folder.glob("*.safetensors"))
    for file in files:
        set_usual_mode(file)
    if not files:
        raise RuntimeError(f"transformers wrote no weights into {folder}: do other processes share this training?")
