from types import SimpleNamespace

import pytest
import torch

from qlora_lightning.data.batches.collate import collate
from qlora_lightning.data.samples.sample import make_sample
from qlora_lightning.data.samples.sample_builder import SampleSetBuilder
from qlora_lightning.model.batch import cut_into_rows, describe_row, join_places, row_places


@pytest.fixture
def data():
    builder = SampleSetBuilder()
    builder.add([7, 8], [-100, 8], 5, 0, "train.jsonl", 17)
    builder.add([9], [-100], 6, 0, "train.jsonl", 18)
    return SimpleNamespace(samples={"train": builder.build()}, tokenizer=SimpleNamespace(decode=str))


def test_places_are_file_and_line_where_the_data_know_them(data):
    assert row_places(data, [6, 5, -1, 40]) == ["train.jsonl:18", "train.jsonl:17", "row 40"]
    assert row_places(None, [3]) == ["row 3"]


def test_many_places_are_counted():
    assert join_places(["a", "b"]) == "a, b"
    assert join_places(["a", "b", "c"], most=2) == "a, b and 1 more"
    assert join_places([]) == "unknown"


def test_a_batch_is_cut_into_what_its_rows_would_be_alone():
    samples = [make_sample([7, 8, 9], [-100, 8, 9], 5), make_sample([4, 3], [-100, 3], 6)]
    for found, sample in zip(cut_into_rows(collate(samples)), samples, strict=True):
        expected = collate([sample])
        assert found.keys() == expected.keys()
        assert found.pop("longest") == expected.pop("longest")
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("batch", [{"input_ids": torch.ones(1, 2)}, torch.ones(2)])
def test_a_batch_of_another_make_is_not_cut(batch):
    assert cut_into_rows(batch) == []


def test_a_row_is_described_in_plain_values(data):
    row = collate([make_sample([7, 8, 9], [-100, 8, 9], 5)])
    expected = {"row_id": 5, "place": "train.jsonl:17", "tokens": 3, "labelled_tokens": 2, "text": "[7, 8, 9]"}
    assert describe_row(data, row) == expected
    assert describe_row(None, row) == {**expected, "place": "row 5", "text": None}
