"""Writes a model's tensors as safetensors shards while they come, holding one shard in memory."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_lightning.safe_file import set_usual_mode

if TYPE_CHECKING:
    from torch import Tensor

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
