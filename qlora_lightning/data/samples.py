"""Token ids and labels of many rows as flat arrays; repeated rows; rows held out for validation."""

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qlora_lightning.sources.tensors import IGNORED
from qlora_lightning.support.errors import UserError

_SHOWN = 20


@dataclass(frozen=True, eq=False)
class SampleSet:
    """N samples with T tokens in all; none is empty, and pieces of one row follow each other."""

    ids: npt.NDArray[np.int32]  # (T,), sample after sample
    labelled: npt.NDArray[np.bool_]  # (T,): whether a token is trained; never at a sample's start
    starts: npt.NDArray[np.int64]  # (N + 1,): start of each sample, and last T
    row_ids: npt.NDArray[np.int64]  # (N,): number of its row in the split, the same for all pieces of a row
    source: npt.NDArray[np.int32]  # (N,): index of its source in the split
    file: npt.NDArray[np.int32]  # (N,): index of its file in ``files``; -1 for none
    line: npt.NDArray[np.int64]  # (N,)
    prompt: npt.NDArray[np.int64]  # (N,): hash of its row's prompt, 0 if it has none
    files: tuple[str, ...]
    # (N,): tokens of the first of two answers to compare, which a preference sample has one after the other
    chosen_length: npt.NDArray[np.int64] | None = None
    desirable: npt.NDArray[np.bool_] | None = None  # (N,): the verdict on each answer, if rows have one

    @classmethod
    def load(cls, folder: Path) -> "SampleSet":
        """Map what ``save`` wrote into memory: tokens are read from the files when they are used."""
        # as plain arrays, views of the mapped files, which are quicker to slice
        arrays = {
            file.stem: np.asarray(np.load(file, mmap_mode="r", allow_pickle=False)) for file in folder.glob("*.npy")
        }
        return cls(**arrays, files=tuple(json.loads((folder / "files.json").read_text(encoding="utf-8"))))

    def save(self, folder: Path) -> None:
        """Write one ``.npy`` file for each array, and the names of the data files, into an existing folder."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                np.save(folder / f"{name}.npy", value, allow_pickle=False)
        (folder / "files.json").write_text(json.dumps(self.files), encoding="utf-8")

    @cached_property
    def content_hash(self) -> str:
        """Hash of tokens, labels and order of the samples, and of which source each comes from."""
        digest = hashlib.sha256()
        for values in (self.starts, self.ids, self.labelled, self.source, self.chosen_length, self.desirable):
            if values is not None:
                digest.update(values.data)
        return digest.hexdigest()

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sample, ``(N,)`` int64."""
        return np.diff(self.starts)

    @property
    def longest_text(self) -> int:
        """Tokens of the longest sample, or of the longest answer with its prompt."""
        if self.chosen_length is None:
            return int(self.lengths.max(initial=0))
        return int(np.maximum(self.chosen_length, self.lengths - self.chosen_length).max(initial=0))

    @property
    def labelled_counts(self) -> npt.NDArray[np.int64]:
        """Labeled tokens of each sample, ``(N,)`` int64."""
        return np.add.reduceat(self.labelled, self.starts[:-1], dtype=np.int64)

    def where(self, n: int) -> str:
        """Return the file and line of sample ``n``, ``train.jsonl:17``, or its row number if it has no file."""
        if self.file[n] < 0:
            return f"row {int(self.row_ids[n])}"
        return f"{self.files[self.file[n]]}:{int(self.line[n])}"

    def take(self, indices: Sequence[int] | npt.NDArray[Any]) -> "SampleSet":
        """Return copies of the samples at these indices, in this order; an index may occur twice."""
        indices = np.asarray(indices, dtype=np.int64)
        spans = [slice(0, 0), *map(slice, self.starts[indices].tolist(), self.starts[indices + 1].tolist())]
        arrays: dict[str, Any] = {"starts": np.concatenate([[0], np.cumsum(self.lengths[indices])])}
        for name in ("ids", "labelled"):
            arrays[name] = np.concatenate([getattr(self, name)[span] for span in spans])
        for name in ("row_ids", "source", "file", "line", "prompt", "chosen_length", "desirable"):
            values = getattr(self, name)
            arrays[name] = None if values is None else values[indices]
        return replace(self, **arrays)

    def spans(self, rows: Sequence[int]) -> list[slice]:
        """Return the token spans of samples; of preferences, the span of each answer."""
        begins, ends = self.starts[list(rows)], self.starts[1:][list(rows)]
        if self.chosen_length is None:
            return list(map(slice, begins.tolist(), ends.tolist()))
        middles = (begins + self.chosen_length[list(rows)]).tolist()
        pairs = zip(begins.tolist(), middles, ends.tolist(), strict=True)
        return [span for begin, middle, end in pairs for span in (slice(begin, middle), slice(middle, end))]

    def __len__(self) -> int:
        return len(self.starts) - 1


class SampleSetBuilder:
    """Collects samples into one ``SampleSet``."""

    def __init__(self) -> None:
        self._ids, self._labelled, self._desirable = array("i"), bytearray(), bytearray()
        self._starts, self._rows = array("q", [0]), array("q")  # of each row six numbers
        self._files: dict[str, int] = {}

    def add(
        self,
        ids: Sequence[int],
        labels: Sequence[int],
        row_id: int,
        source: int = 0,
        file: str | None = None,
        line: int = 0,
        chosen_length: int = 0,
        desirable: bool | None = None,
        prompt: int = 0,
    ) -> None:
        """Append one sample of at least one token; its first label counts as -100, since nothing predicts it.

        ``chosen_length``: in a preference sample, the tokens of the chosen answer, after which the rejected one begins.
        ``desirable``: the verdict on an answer, for all samples or for none. ``prompt``: hash of the row's prompt.
        """
        assert 0 < len(ids) == len(labels)
        labelled = np.array(labels, dtype=np.int64) != IGNORED
        labelled[[0, chosen_length]] = False
        self._ids.extend(ids)
        self._labelled += labelled.tobytes()
        self._starts.append(len(self._ids))
        file_index = -1 if file is None else self._files.setdefault(file, len(self._files))
        self._rows.extend((row_id, source, file_index, line, prompt, chosen_length))
        if desirable is not None:
            self._desirable.append(desirable)

    def build(self) -> SampleSet:
        """Return all samples; do not use the builder afterwards."""
        ids, starts = np.frombuffer(self._ids, np.int32), np.frombuffer(self._starts, np.int64)
        row_ids, sources, files, line, prompt, lengths = np.frombuffer(self._rows, np.int64).reshape(-1, 6).T.copy()
        source, file = sources.astype(np.int32), files.astype(np.int32)
        chosen_length = lengths if lengths.any() else None
        labelled = np.frombuffer(self._labelled, np.bool_)
        desirable = np.frombuffer(self._desirable, np.bool_) if self._desirable else None
        names = tuple(self._files)
        return SampleSet(ids, labelled, starts, row_ids, source, file, line, prompt, names, chosen_length, desirable)


class Repeats(NamedTuple):
    """The ids of repeated rows, and the first 20 as ``train.jsonl:17 = train.jsonl:3``, the row that each equals."""

    row_ids: npt.NDArray[np.int64]
    pairs: list[str]


def find_repeats(samples: SampleSet, among: SampleSet | None = None, by_prompt: bool = False) -> Repeats:
    """Find rows that equal a row of ``among``, by default an earlier row of the same set.

    Rows are equal if the token ids and labels of all their pieces are, or ``by_prompt`` if their prompts are.
    """
    rows, hashes = hash_rows(samples, by_prompt=by_prompt)
    earlier_rows, earlier_hashes = (rows, hashes) if among is None else hash_rows(among, by_prompt=by_prompt)
    unique_hashes, first_indices = np.unique(earlier_hashes, return_index=True)
    repeated = np.flatnonzero(np.isin(hashes, unique_hashes))
    earliest = first_indices[np.searchsorted(unique_hashes, hashes[repeated])]
    if among is None:
        is_first = earliest == repeated
        repeated, earliest = repeated[~is_first], earliest[~is_first]
    pairs = [
        f"{samples.where(row)} = {(among or samples).where(earlier)}"
        for row, earlier in zip(rows[repeated[:_SHOWN]], earlier_rows[earliest[:_SHOWN]], strict=True)
    ]
    return Repeats(samples.row_ids[rows[repeated]], pairs)


def hold_out(samples: SampleSet, fraction: float, seed: int) -> tuple[SampleSet, SampleSet]:
    """Split samples into (training, validation), both in file order, by content and seed, not by line.

    Rows with the same prompt or the same tokens are a group on the same side, so that no prompt is both trained and
    validated on, and so are all pieces of a row. The fraction counts different rows; a group that has more than are
    still wanted is trained on.

    Raises:
        UserError: there are fewer than two different prompts.
    """
    rows, row_hashes = hash_rows(samples, key=str(seed).encode(), labels=False)
    _, prompts = hash_rows(samples, key=str(seed).encode(), labels=False, by_prompt=True)
    # each row takes the lowest hash of its group, which grows from equal rows over equal prompts to others
    keys = [np.unique(each, return_inverse=True)[1] for each in (row_hashes, prompts)]
    hashes, previous = row_hashes, np.zeros_like(row_hashes)
    while not np.array_equal(hashes, previous):
        previous = hashes
        for key in keys:
            lowest = np.full(len(hashes), np.iinfo(np.uint64).max, np.uint64)
            np.minimum.at(lowest, key, hashes)
            hashes = lowest[key]
    names, group = np.unique(hashes, return_inverse=True)
    if len(names) < 2:
        raise UserError(
            f"val_fraction: expected at least 2 different prompts to split, found {len(names)} (a prompt "
            "is what comes before the first trained answer): name rows to validate on in `data.val`.",
            "data.val_fraction",
        )
    contents, first_rows = np.unique(row_hashes, return_index=True)
    sizes, ranks = np.bincount(group[first_rows], minlength=len(names)), np.zeros_like(names)
    np.add.at(ranks, group[first_rows], contents)  # as random for a large group as for a single row
    wanted, is_held = max(round(fraction * len(contents)), 1), np.zeros(len(names), dtype=bool)
    for index in np.argsort(ranks, kind="stable"):
        if sizes[index] <= wanted and is_held.sum() < len(names) - 1:
            is_held[index] = True
            wanted -= sizes[index]
        if not wanted:
            break
    if not is_held.any():
        is_held[sizes.argmin()] = True
    is_val = np.isin(samples.row_ids, samples.row_ids[rows[is_held[group]]])
    return samples.take(np.flatnonzero(~is_val)), samples.take(np.flatnonzero(is_val))


def hash_rows(
    samples: SampleSet, key: bytes = b"", labels: bool = True, by_prompt: bool = False
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
    """Return the first sample of each row, ``(R,)``, and a keyed hash of its ids and, optionally, labels, ``(R,)``.

    ``by_prompt`` returns the hash of its prompt instead, if it has one.
    """
    # Bytes of whole arrays, sliced without copying: the only cost is one call of the hash for each sample.
    ids, labelled = samples.ids.view(np.uint8).data, samples.labelled.view(np.uint8).data
    digests, verdicts = bytearray(), b"" if samples.desirable is None else samples.desirable.tobytes()
    for index, (start, end) in enumerate(pairwise(samples.starts.tolist())):
        digest = hashlib.blake2b(ids[4 * start : 4 * end], key=key, digest_size=8)
        if labels:
            digest.update(labelled[start:end])
            digest.update(verdicts[index : index + 1])
        digests += digest.digest()
    first_samples = np.flatnonzero(np.diff(samples.row_ids, prepend=-1))
    hashes = np.add.reduceat(np.frombuffer(bytes(digests), dtype=np.uint64), first_samples)
    prompts = samples.prompt[first_samples].view(np.uint64)
    return first_samples, np.where(prompts == 0, hashes, prompts) if by_prompt else hashes
