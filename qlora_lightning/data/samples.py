"""Token ids and labels of many rows, as a few flat arrays; rows that occur twice; rows held out for validation."""

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import torch

from qlora_lightning.data.chat.labels import IGNORED
from qlora_lightning.support.errors import UserError


class Sample(NamedTuple):
    """One conversation, ready to be laid into a batch.

    Attributes:
        ids: token ids, ``(length,)`` int32.
        labels: aligned with ``ids``, -100 where nothing is trained; the first is always -100. ``(length,)`` int32.
        row_id: number of the row among the rows of its split, from 0; -1 in a filler.
        source: which of the split's sources the row came from.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    row_id: int
    source: int


def make_sample(ids: Sequence[int], labels: Sequence[int], row_id: int, source: int = 0) -> Sample:
    """Make a sample of plain lists; nothing precedes the first token, so its label is dropped."""
    targets = torch.tensor(labels, dtype=torch.int32)  # (length,)
    targets[:1] = IGNORED
    return Sample(torch.tensor(ids, dtype=torch.int32), targets, row_id, source)


def mute(sample: Sample) -> Sample:
    """Return the sample as a filler: same tokens, nothing labelled, no row of its own."""
    return Sample(sample.ids, torch.full_like(sample.labels, IGNORED), -1, sample.source)


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


def gather_samples(samples: SampleSet | Iterable[Sample]) -> SampleSet:
    """Make a set of samples that stand in no file; a set is returned as it is."""
    if isinstance(samples, SampleSet):
        return samples
    builder = SampleSetBuilder()
    for sample in samples:
        builder.add(sample.ids.tolist(), sample.labels.tolist(), sample.row_id, sample.source)
    return builder.build()


class SampleSetBuilder:
    """Gathers rendered rows or whole sets, and makes one ``SampleSet`` of them."""

    def __init__(self) -> None:
        self._ids, self._labelled = array("i"), bytearray()
        self._ends, self._row_ids, self._source = array("q"), array("q"), array("i")
        self._file, self._line = array("i"), array("q")
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
    ) -> None:
        """Append one sample; nothing precedes its first token, so that one's label is dropped."""
        if not 0 < len(ids) == len(labels):
            raise ValueError(f"expected as many labels as ids, and at least one, found {len(labels)} and {len(ids)}")
        mask = np.array(labels, dtype=np.int64) != IGNORED
        mask[0] = False
        self._ids.extend(ids)
        self._labelled += mask.tobytes()
        self._ends.append(len(self._ids))
        self._row_ids.append(row_id)
        self._source.append(source)
        self._file.append(-1 if file is None else self._number(file))
        self._line.append(line)

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

    def build(self) -> SampleSet:
        """Return all that was added, without copying it; the builder is used up."""
        return SampleSet(
            np.frombuffer(self._ids, dtype=np.int32),
            np.frombuffer(self._labelled, dtype=np.bool_),
            np.array([0, *self._ends], dtype=np.int64),
            np.frombuffer(self._row_ids, dtype=np.int64),
            np.frombuffer(self._source, dtype=np.int32),
            np.frombuffer(self._file, dtype=np.int32),
            np.frombuffer(self._line, dtype=np.int64),
            tuple(self._files),
        )

    def _number(self, file: str) -> int:
        return self._files.setdefault(file, len(self._files))


_SHOWN = 20


class Repeats(NamedTuple):
    """How many rows stand elsewhere too, and of the first 20: where, and where the first like it stands."""

    rows: int
    pairs: list[tuple[str, str]]


def find_duplicates(samples: SampleSet) -> Repeats:
    """Find the rows that equal an earlier one of the same set: the same token ids and labels, in all their pieces."""
    rows, digests = _row_digests(samples)
    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    earliest = first[which]  # (rows,)
    repeated = np.flatnonzero(earliest != np.arange(len(rows)))
    pairs = [(samples.where(rows[n]), samples.where(rows[earliest[n]])) for n in repeated[:_SHOWN]]
    return Repeats(len(repeated), pairs)


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
