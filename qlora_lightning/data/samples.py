"""Token ids and labels of many rows, as a few flat arrays; rows that occur twice; rows held out for validation."""

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from qlora_lightning.data.chat.labels import IGNORED
from qlora_lightning.support.errors import UserError

if TYPE_CHECKING:
    import torch


class Sample(NamedTuple):
    """One conversation or piece of text, ready to be laid into a batch.

    Attributes:
        ids: token ids, ``(length,)`` int32.
        labels: aligned with ``ids``, -100 where nothing is trained; the first is always -100. ``(length,)`` int32.
        row_id: number of the row among the rows of its split, from 0; -1 in a filler.
        source: which of the split's sources the row came from.
        weight: of the row, for a loss that reads it.
    """

    ids: "torch.Tensor"
    labels: "torch.Tensor"
    row_id: int
    source: int
    weight: float = 1.0


def make_sample(ids: Sequence[int], labels: Sequence[int], row_id: int, source: int = 0, weight: float = 1.0) -> Sample:
    """Make a sample of plain lists."""
    builder = SampleSetBuilder()
    builder.add(ids, labels, row_id, source, weight=weight)
    return builder.build()[0]


def find_labelled(labels: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Return which tokens of a sample are trained: never the first one, which nothing predicts."""
    labelled: npt.NDArray[np.bool_] = np.array(labels, dtype=np.int64) != IGNORED
    labelled[:1] = False
    return labelled


_DTYPES: dict[str, type] = {
    "ids": np.int32,
    "labelled": np.bool_,
    "starts": np.int64,
    "row_ids": np.int64,
    "source": np.int32,
    "file": np.int32,
    "line": np.int64,
    "weights": np.float32,
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
        weights: of the rows, ``(N,)`` float32; None if every row weighs 1.

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
    weights: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        for name in self._arrays():
            # a view of a mapped file is a plain array, too
            view: npt.NDArray[Any] = np.asarray(getattr(self, name), dtype=_DTYPES[name]).view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)
        sizes = {name: len(getattr(self, name)) for name in self._arrays() if name != "starts"}
        for name, size in sizes.items():
            expected = int(self.starts[-1]) if name in ("ids", "labelled") else len(self)
            if size != expected:
                raise ValueError(f"{name}: expected {expected} values, found {size}")
        n = len(self)
        if n and int(self.lengths.min()) < 1:
            raise ValueError(f"sample {int(self.lengths.argmin())} has no tokens")

    @classmethod
    def load(cls, folder: Path, mmap: bool = True) -> "SampleSet":
        """Read what ``save`` wrote; mapped, its tokens are read from the files when they are used."""
        mode: Literal["r"] | None = "r" if mmap else None
        files = {name: folder / f"{name}.npy" for name in _DTYPES}
        arrays = {
            name: np.load(file, mmap_mode=mode, allow_pickle=False)
            for name, file in files.items()
            if name != "weights" or file.exists()
        }
        return cls(**arrays, files=tuple(json.loads((folder / "files.json").read_text(encoding="utf-8"))))

    def save(self, folder: Path) -> None:
        """Write one ``.npy`` file for each array, and the names of the files, into an existing folder."""
        for name in self._arrays():
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
        (folder / "files.json").write_text(json.dumps(self.files), encoding="utf-8")

    def _arrays(self) -> list[str]:
        return [name for name in _DTYPES if name != "weights" or self.weights is not None]

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
            None if self.weights is None else self.weights[chosen],
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
        import torch  # here: the processes that render rows do without it, which saves each of them a second

        at = range(len(self))[n]  # negative numbers count from the end, and beyond it is an IndexError
        span = slice(self.starts[at], self.starts[at + 1])
        ids = self.ids[span].copy()  # torch warns of an array that cannot be written to
        labels = np.where(self.labelled[span], ids, np.int32(IGNORED))
        weight = 1.0 if self.weights is None else float(self.weights[at])
        row_id, source = int(self.row_ids[at]), int(self.source[at])
        return Sample(torch.from_numpy(ids), torch.from_numpy(labels), row_id, source, weight)


def _cut(flat: npt.NDArray[Any], spans: list[tuple[int, int]]) -> npt.NDArray[Any]:
    return np.concatenate([flat[start:end] for start, end in spans]) if spans else flat[:0]


def gather_samples(samples: SampleSet | Iterable[Sample]) -> SampleSet:
    """Make a set of samples that stand in no file; a set is returned as it is."""
    if isinstance(samples, SampleSet):
        return samples
    builder = SampleSetBuilder()
    for sample in samples:
        builder.add(sample.ids.tolist(), sample.labels.tolist(), sample.row_id, sample.source, weight=sample.weight)
    return builder.build()


class SampleSetBuilder:
    """Gathers rendered rows or whole sets, and makes one ``SampleSet`` of them."""

    def __init__(self) -> None:
        self._ids, self._labelled = array("i"), bytearray()
        self._ends, self._row_ids, self._source = array("q"), array("q"), array("i")
        self._file, self._line, self._weights = array("i"), array("q"), array("f")
        self._files: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def add(
        self,
        ids: Sequence[int],
        labels: Sequence[int],
        row_id: int,
        source: int = 0,
        file: str | None = None,
        line: int = 0,
        weight: float = 1.0,
    ) -> None:
        """Append one sample."""
        if not 0 < len(ids) == len(labels):
            raise ValueError(f"expected as many labels as ids, and at least one, found {len(labels)} and {len(ids)}")
        self._ids.extend(ids)
        self._labelled += find_labelled(labels).tobytes()
        self._ends.append(len(self._ids))
        self._row_ids.append(row_id)
        self._source.append(source)
        self._file.append(-1 if file is None else self._number(file))
        self._line.append(line)
        self._weights.append(weight)

    def extend(self, samples: SampleSet) -> None:
        """Append a whole set, its row numbers, sources and files as they are."""
        numbers = np.array([*map(self._number, samples.files), -1], dtype=np.int32)  # -1, no file, stays -1
        ends = samples.starts[1:] + len(self._ids)
        self._ids.frombytes(samples.ids.tobytes())
        self._labelled += samples.labelled.tobytes()
        self._ends.frombytes(ends.tobytes())
        self._row_ids.frombytes(samples.row_ids.tobytes())
        self._source.frombytes(samples.source.tobytes())
        self._file.frombytes(numbers[samples.file].tobytes())
        self._line.frombytes(samples.line.tobytes())
        weights = np.ones(len(samples), dtype=np.float32) if samples.weights is None else samples.weights
        self._weights.frombytes(weights.tobytes())

    def build(self) -> SampleSet:
        """Return all that was added, without copying it; the builder is used up."""
        weights = np.frombuffer(self._weights, dtype=np.float32)
        return SampleSet(
            np.frombuffer(self._ids, dtype=np.int32),
            np.frombuffer(self._labelled, dtype=np.bool_),
            np.array([0, *self._ends], dtype=np.int64),
            np.frombuffer(self._row_ids, dtype=np.int64),
            np.frombuffer(self._source, dtype=np.int32),
            np.frombuffer(self._file, dtype=np.int32),
            np.frombuffer(self._line, dtype=np.int64),
            tuple(self._files),
            None if (weights == 1).all() else weights,
        )

    def _number(self, file: str) -> int:
        return self._files.setdefault(file, len(self._files))


_SHOWN = 20


class Repeats(NamedTuple):
    """How many rows occur elsewhere too, and the places of the first 20, each with the first row like it."""

    rows: int
    pairs: list[tuple[str, str]]


def find_duplicates(samples: SampleSet) -> Repeats:
    """Find the rows that equal an earlier one of the same set: the same token ids and labels, in all their pieces."""
    rows, earliest = _find_first_rows(samples)
    repeated = np.flatnonzero(earliest != rows)
    pairs = [(samples.where(rows[n]), samples.where(earliest[n])) for n in repeated[:_SHOWN]]
    return Repeats(len(repeated), pairs)


def drop_duplicates(samples: SampleSet) -> SampleSet:
    """Return the samples without the rows that equal an earlier one."""
    rows, earliest = _find_first_rows(samples)
    kept = samples.row_ids[rows[earliest == rows]]
    return samples.take(np.flatnonzero(np.isin(samples.row_ids, kept)))


def _find_first_rows(samples: SampleSet) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the first sample of each row, and that of the first row with the same content."""
    rows, digests = _row_digests(samples)
    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    return rows, rows[first[which]]


def find_overlap(train: SampleSet, val: SampleSet) -> Repeats:
    """Find the rows of ``val`` that are trained on too: the same token ids and labels, in all their pieces."""
    train_rows, train_digests = _row_digests(train)
    val_rows, val_digests = _row_digests(val)
    contents, first = np.unique(train_digests, return_index=True)
    repeated = np.flatnonzero(np.isin(val_digests, contents))
    pairs = [
        (val.where(val_rows[n]), train.where(train_rows[first[np.searchsorted(contents, val_digests[n])]]))
        for n in repeated[:_SHOWN]
    ]
    return Repeats(len(repeated), pairs)


def digest_samples(samples: SampleSet, key: bytes = b"", labels: bool = True) -> npt.NDArray[np.uint64]:
    """Return a hash of each sample's token ids and labels, ``(N,)``.

    Args:
        samples: N samples.
        key: another key makes other hashes; at most 64 bytes.
        labels: whether they count, beside the token ids.
    """
    # Bytes of whole arrays, cut up without copying: one call of the hash for each sample is all that takes time.
    ids, labelled = samples.ids.view(np.uint8).data, samples.labelled.view(np.uint8).data
    digests = bytearray()
    for start, end in pairwise(samples.starts.tolist()):
        digest = blake2b(ids[4 * start : 4 * end], key=key, digest_size=8)
        if labels:
            digest.update(labelled[start:end])
        digests += digest.digest()
    return np.frombuffer(bytes(digests), dtype=np.uint64)


def digest_rows(samples: SampleSet, key: bytes = b"", labels: bool = True) -> npt.NDArray[np.uint64]:
    """Return for each sample a hash of its whole row, of which it may be a piece, ``(N,)``; arguments as above."""
    digests = digest_samples(samples, key, labels)
    _, which = np.unique(samples.row_ids, return_inverse=True)
    of_row = np.zeros(int(which.max(initial=-1)) + 1, dtype=np.uint64)
    np.add.at(of_row, which, digests)
    return of_row[which]


def _row_digests(samples: SampleSet) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
    """Return the first sample of each row, in the order of the set, and the hash of each row."""
    _, first = np.unique(samples.row_ids, return_index=True)
    first = np.sort(first)
    return first, digest_rows(samples)[first]


def hold_out(samples: SampleSet | Sequence[Sample], fraction: float, seed: int) -> tuple[SampleSet, SampleSet]:
    """Split samples into (training, validation), both in file order.

    Rows with the same tokens stand on the same side, so that no duplicate is trained on and validated on, and so do all
    pieces of a row: the fraction is of different contents, at least one on each side. A row's place depends on its
    content and the seed, not on its line.

    Raises:
        UserError: there are fewer than two different rows.
    """
    samples = gather_samples(samples)
    digests = digest_rows(samples, key=str(seed).encode(), labels=False)
    contents = np.unique(digests)  # sorted: those held out are the ones with the lowest hashes
    if len(contents) < 2:
        raise UserError(f"val_fraction: expected at least 2 different rows to split, found {len(contents)}.")
    count = min(max(round(fraction * len(contents)), 1), len(contents) - 1)
    held = digests <= contents[count - 1]
    return samples.take(np.flatnonzero(~held)), samples.take(np.flatnonzero(held))
