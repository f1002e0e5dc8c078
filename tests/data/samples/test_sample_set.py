import pickle

import numpy as np
import pytest
import torch

from qlora_lightning.data.samples import SampleSet, SampleSetBuilder

ARRAYS = ("ids", "labelled", "starts", "row_ids", "source", "file", "line")


def build():
    builder = SampleSetBuilder()
    builder.add([5, 6, 7], [-100, 6, 7], row_id=0, source=0, file="a.jsonl", line=1)
    builder.add([8, 9], [-100, 9], row_id=1, source=1, file="b.jsonl", line=4)
    builder.add([3], [3], row_id=2, source=1, file="b.jsonl", line=5)
    return builder.build()


def contents(samples):
    return [
        (sample.ids.tolist(), sample.labels.tolist(), sample.row_id, sample.source, samples.where(n))
        for n, sample in enumerate(samples)
    ]


CONTENTS = [
    ([5, 6, 7], [-100, 6, 7], 0, 0, "a.jsonl:1"),
    ([8, 9], [-100, 9], 1, 1, "b.jsonl:4"),
    ([3], [-100], 2, 1, "b.jsonl:5"),
]


def test_flat_arrays_and_the_samples_in_them():
    samples = build()
    assert samples.ids.tolist() == [5, 6, 7, 8, 9, 3]
    assert samples.labelled.tolist() == [False, True, True, False, True, False]
    assert samples.starts.tolist() == [0, 3, 5, 6]
    assert samples.lengths.tolist() == [3, 2, 1]
    assert samples.labelled_counts.tolist() == [2, 1, 0]
    assert samples.files == ("a.jsonl", "b.jsonl")
    assert contents(samples) == CONTENTS
    assert repr(samples) == "SampleSet(3 samples, 6 tokens)"
    assert {samples[0].ids.dtype, samples[0].labels.dtype} == {torch.int32}


def test_numbers_count_from_the_end_too_and_end_there():
    samples = build()
    assert samples[-1].row_id == 2
    assert contents(samples[1:]) == CONTENTS[1:]
    with pytest.raises(IndexError):
        samples[3]


def test_taking_copies_in_the_order_asked_for():
    samples = build()
    assert contents(samples.take([2, 0, 2])) == [CONTENTS[2], CONTENTS[0], CONTENTS[2]]
    assert contents(samples.take(np.flatnonzero([False, True, False]))) == [CONTENTS[1]]
    assert len(samples.take([])) == 0


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("chosen", [[0, 1, 2], []])
def test_what_is_saved_is_loaded(tmp_path, mmap, chosen):
    saved = build().take(chosen)
    saved.save(tmp_path)
    loaded = SampleSet.load(tmp_path, mmap=mmap)
    assert contents(loaded) == [CONTENTS[n] for n in chosen]
    assert loaded.files == saved.files
    for name in ARRAYS:
        assert getattr(loaded, name).dtype == getattr(saved, name).dtype


def test_a_loaded_set_is_mapped_not_read(tmp_path):
    build().save(tmp_path)
    array, mapped = SampleSet.load(tmp_path).ids, False
    while array is not None and not mapped:
        array, mapped = getattr(array, "base", None), isinstance(array, np.memmap)
    assert mapped


def test_nothing_in_it_can_be_changed_and_a_sample_is_a_copy(tmp_path):
    build().save(tmp_path)
    for samples in (build(), SampleSet.load(tmp_path)):
        with pytest.raises(ValueError, match="read-only"):
            samples.ids[0] = 1
        with pytest.raises(AttributeError):
            samples.ids = samples.ids
        samples[0].ids[0] = 77
        assert contents(samples) == CONTENTS


def test_another_process_gets_the_same(tmp_path):
    build().save(tmp_path)
    for samples in (build(), SampleSet.load(tmp_path)):
        assert contents(pickle.loads(pickle.dumps(samples))) == CONTENTS


@pytest.mark.parametrize("name", ["ids", "labelled", "row_ids", "source", "file", "line"])
def test_arrays_that_do_not_fit_together_are_refused(name):
    arrays = {array: getattr(build(), array) for array in ARRAYS}
    with pytest.raises(ValueError, match="expected"):
        SampleSet(**arrays | {name: arrays[name][:-1]}, files=("a.jsonl", "b.jsonl"))


def test_an_empty_sample_is_refused():
    arrays = {array: getattr(build(), array) for array in ARRAYS}
    with pytest.raises(ValueError, match="sample 1 has no tokens"):
        SampleSet(**arrays | {"starts": [0, 3, 3, 6]}, files=("a.jsonl", "b.jsonl"))
