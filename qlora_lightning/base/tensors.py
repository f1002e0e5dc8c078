"""Files of tensors: their headers, and how they are written."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import set_usual_mode, write_whole

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 2_000_000_000
GIB = 2**30


def format_bytes(count: int) -> str:
    """Format a number of bytes in decimal units, as file managers and model hubs do: ``98 MB``, ``5.6 GB``."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    digits = 1 if unit in ("GB", "TB") and size < 100 else 0
    return f"{size:.{digits}f} {unit}"


def format_gib(count: float) -> str:
    """Format a number of bytes as memory is sold: ``5.30 GiB``."""
    return f"{count / GIB:.2f} GiB"


@dataclass(frozen=True)
class TensorSpan:
    """Where one tensor's bytes are: ``size_bytes`` from ``start`` on, counted from the start of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size_bytes: int


def read_spans(file: Path) -> list[TensorSpan]:
    """Return the spans of all tensors of a safetensors file that is whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy"):  # checks the header and the file's length
            pass
    except SafetensorError as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}). Download or save it again.") from error
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(start - 8))
    header.pop("__metadata__", None)
    spans = []
    for name, item in header.items():
        begin, end = item["data_offsets"]
        spans.append(TensorSpan(name, item["dtype"], tuple(item["shape"]), file, start + begin, end - begin))
    return spans


class ShardWriter:
    """Collects tensors into shards of up to so many bytes, and writes the index that transformers reads."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._written: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: "Tensor") -> None:
        """Take a tensor, in the dtype in which it is stored."""
        if self._shard and self._size + tensor.nbytes > self.shard_bytes:
            self._write()
        self._shard[name] = tensor.contiguous()
        self._size += tensor.nbytes
        self._total += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, and the index if there are several shards."""
        self._write()
        count = len(self._written)
        if count == 1:
            self._written[0][0].rename(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, (file, names) in enumerate(self._written, start=1):
            final = file.rename(self.folder / f"model-{number:05d}-of-{count:05d}.safetensors")
            weight_map.update(dict.fromkeys(names, final.name))
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        write_whole(self.folder / "model.safetensors.index.json", index)

    def _write(self) -> None:
        from safetensors.torch import save_file

        file = self.folder / f"model-{len(self._written) + 1:05d}.safetensors"
        save_file(self._shard, file, {"format": "pt"})
        set_usual_mode(file)  # a server may be another user
        self._written.append((file, list(self._shard)))
        self._shard, self._size = {}, 0


def save_model(model: Any, folder: Path, **options: Any) -> None:
    """Write a model of transformers with its configs, by ``save_pretrained`` with those options, in any process.

    Of processes that train together, transformers lets the first one alone write, without a word. An entry of the
    cache is made by whichever process comes first.
    """
    model.should_save_on_this_rank = lambda is_main_process: True  # transformers' own method asks torch for the rank
    try:
        model.save_pretrained(folder, **options)
    finally:
        del model.should_save_on_this_rank
    for file in folder.glob("*.safetensors"):
        set_usual_mode(file)
