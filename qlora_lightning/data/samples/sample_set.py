"""Many samples as a few flat arrays, in memory or mapped from files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch

from qlora_lightning.data.chat.renderer import IGNORED
from qlora_lightning.data.samples.sample import Sample

_DTYPES: dict[str, type] = {
    "ids": np.int32,
    "labelled": np.bool_,
    "starts": np.int64,
    "row_ids": np.int64,
    "source": np.int32,
    "file": np.int32,
    "line": np.int64,
}


@dataclass(frozen=True, eq=False, repr=False)
class SampleSet(Sequence[Sample]):
    """N samples with T tokens in all; none is empty, and nothing in it can be changed.

    Attributes:
        ids: token ids, sample after sample, ``(T,)`` int32.
        labelled: whether a token is trained; never at a sample's start. ``(T,)`` bool.
        starts: where each sample begins, and last T. ``(N + 1,)`` int64.
        row_ids: number of each sample's row in its split, ``(N,)`` int64; the pieces of one row share it.
        source: which of the split's sources it came from, ``(N,)`` int32.
        file: which of ``files`` it stands in, ``(N,)`` int32.
        line: in which line of it, ``(N,)`` int64.
        files: names of the files.

    Raises:
        ValueError: if the arrays do not fit together.
    """

    ids: npt.NDArray[np.int32]
    labelled: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]
    row_ids: npt.NDArray[np.int64]
    source: npt.NDArray[np.int32]
    file: npt.NDArray[np.int32]
    line: npt.NDArray[np.int64]
    files: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            view: npt.NDArray[Any] = np.asarray(
                getattr(self, name), dtype=dtype
            ).view()  # of a mapped file, too, a plain array
            view.flags.writeable = False
            object.__setattr__(self, name, view)
        tokens, n = int(self.starts[-1]), len(self)
        if {len(self.ids), len(self.labelled)} != {tokens}:
            raise ValueError(f"expected {tokens} ids and labels, found {len(self.ids)} and {len(self.labelled)}")
        if {len(self.row_ids), len(self.source), len(self.file), len(self.line)} != {n}:
            raise ValueError(f"expected row_ids, source, file and line of {n} samples each")
        if n and int(self.lengths.min()) < 1:
            raise ValueError(f"sample {int(self.lengths.argmin())} has no tokens")

    @classmethod
    def load(cls, folder: Path, mmap: bool = True) -> "SampleSet":
        """Read what ``save`` wrote; mapped, its tokens are read from the files when they are used."""
        mode: Literal["r"] | None = "r" if mmap else None
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode=mode, allow_pickle=False) for name in _DTYPES}
        return cls(**arrays, files=tuple(json.loads((folder / "files.json").read_text(encoding="utf-8"))))

    def save(self, folder: Path) -> None:
        """Write one ``.npy`` file for each array, and the names of the files, into an existing folder."""
        for name in _DTYPES:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
        (folder / "files.json").write_text(json.dumps(self.files), encoding="utf-8")

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sample, ``(N,)`` int64."""
        return np.diff(self.starts)

    @property
    def labelled_counts(self) -> npt.NDArray[np.int64]:
        """Labelled tokens of each sample, ``(N,)`` int64."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        return np.add.reduceat(self.labelled, self.starts[:-1], dtype=np.int64)

    def where(self, n: int) -> str:
        """Return where sample ``n`` comes from: ``train.jsonl:17``; of one that stands in no file, its row."""
        if self.file[n] < 0:
            return f"row {int(self.row_ids[n])}"
        return f"{self.files[self.file[n]]}:{int(self.line[n])}"

    def take(self, indices: Sequence[int] | npt.NDArray[Any]) -> "SampleSet":
        """Return the samples of these numbers, copied, in this order; a number may occur twice."""
        chosen = np.asarray(indices, dtype=np.int64)
        starts = np.zeros(len(chosen) + 1, dtype=np.int64)
        np.cumsum(self.lengths[chosen], out=starts[1:])
        spans = list(zip(self.starts[chosen].tolist(), self.starts[chosen + 1].tolist(), strict=True))
        return SampleSet(
            _cut(self.ids, spans),
            _cut(self.labelled, spans),
            starts,
            self.row_ids[chosen],
            self.source[chosen],
            self.file[chosen],
            self.line[chosen],
            self.files,
        )

    def __repr__(self) -> str:
        return f"SampleSet({len(self):,} samples, {len(self.ids):,} tokens)"

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, n: int) -> Sample: ...
    @overload
    def __getitem__(self, n: slice) -> "SampleSet": ...
    def __getitem__(self, n: int | slice) -> "Sample | SampleSet":
        if isinstance(n, slice):
            return self.take(range(len(self))[n])
        at = range(len(self))[n]  # negative numbers count from the end, and beyond it is an IndexError
        span = slice(self.starts[at], self.starts[at + 1])
        ids = self.ids[span].copy()  # torch warns of an array that cannot be written to
        labels = np.where(self.labelled[span], ids, np.int32(IGNORED))
        return Sample(torch.from_numpy(ids), torch.from_numpy(labels), int(self.row_ids[at]), int(self.source[at]))


def _cut(flat: npt.NDArray[Any], spans: list[tuple[int, int]]) -> npt.NDArray[Any]:
    return np.concatenate([flat[start:end] for start, end in spans]) if spans else flat[:0]
