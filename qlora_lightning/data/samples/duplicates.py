"""Rows that occur twice, within a split or in training and validation."""

from hashlib import blake2b
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qlora_lightning.data.samples.sample_set import SampleSet

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
