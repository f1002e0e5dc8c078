import pytest

from qlora_lightning.data.samples import SampleSetBuilder, gather_samples, make_sample


def build(*rows):
    builder = SampleSetBuilder()
    for ids, row_id, source, file, line in rows:
        builder.add(ids, ids, row_id, source, file, line)
    assert len(builder) == len(rows)
    return builder.build()


def test_the_first_label_is_dropped():
    assert build(([5, 6], 0, 0, "a", 1)).labelled.tolist() == [False, True]


def test_sets_are_laid_end_to_end_and_keep_their_files():
    first = build(([1, 2], 0, 0, "a", 1), ([3], 1, 1, "b", 1))
    second = build(([4], 2, 1, "b", 2), ([5, 6], 3, 2, "c", 1), ([7], 4, 0, "a", 2))
    builder = SampleSetBuilder()
    builder.extend(first)
    builder.extend(second)
    both = builder.build()
    assert both.ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert both.labelled.tolist() == [False, True, False, False, False, True, False]
    assert both.starts.tolist() == [0, 2, 3, 4, 6, 7]
    assert both.row_ids.tolist() == [0, 1, 2, 3, 4]
    assert both.source.tolist() == [0, 1, 1, 2, 0]
    assert both.files == ("a", "b", "c")
    assert [both.where(n) for n in range(5)] == ["a:1", "b:1", "b:2", "c:1", "a:2"]


def test_samples_that_stand_in_no_file_are_named_by_their_row():
    made = make_sample([5, 6], [-100, 6], 7, 1)
    samples = gather_samples([made])
    builder = SampleSetBuilder()
    builder.extend(build(([1], 0, 0, "a", 3)))
    builder.extend(samples)
    assert [builder.build().where(n) for n in range(2)] == ["a:3", "row 7"]
    assert (samples[0].ids.tolist(), samples[0].labels.tolist(), *samples[0][2:]) == ([5, 6], [-100, 6], 7, 1)
    assert gather_samples(samples) is samples


def test_nothing_added_is_an_empty_set():
    assert len(SampleSetBuilder().build()) == len(gather_samples([])) == 0


@pytest.mark.parametrize(("ids", "labels"), [([], []), ([1, 2], [1])])
def test_a_sample_needs_tokens_and_a_label_for_each(ids, labels):
    with pytest.raises(ValueError, match="expected as many labels as ids, and at least one"):
        SampleSetBuilder().add(ids, labels, 0)
