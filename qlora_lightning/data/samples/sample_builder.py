"""Samples gathered one by one, or set by set, into one set."""

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from qlora_lightning.data.chat.renderer import IGNORED
from qlora_lightning.data.samples.sample import Sample
from qlora_lightning.data.samples.sample_set import SampleSet


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
