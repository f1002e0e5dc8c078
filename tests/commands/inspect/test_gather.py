import pytest

from qlora_lightning.support.errors import UserError


def test_all_splits_are_reported_and_rows_come_from_the_first(inspection, data_module):
    found = inspection(data_module(val=["{v}<1}>"], train=["{one}<1}>", "{two}<2}>", "{3}<3}>"]))
    assert [split.name for split in found.splits] == ["train", "val"]
    assert found.rows_split == "train"
    assert [row.where for row in found.rows] == ["train.jsonl:1", "train.jsonl:2"]
    assert found.splits[0].lengths["max"] == 7
    assert found.splits[0].labels["max"] == 2
    assert found.splits[0].bars[0].samples == 1
    assert (found.epoch.batches, found.epoch.steps, found.batch_size) == (2, 2, 2)
    assert found.settings == "tokenizer letters · max_length 512"


def test_one_split_alone(inspection, data_module):
    found = inspection(data_module(val=["{v}<1}>"], train=["{one}<1}>"]), split="val")
    assert [split.name for split in found.splits] == ["val"]
    assert found.rows[0].where == "val.jsonl:1"
    assert found.epoch is None


@pytest.mark.parametrize(("split", "key"), [("test", r"data\.test"), (None, r"data\.train")])
def test_a_split_that_is_not_there_is_refused(inspection, data_module, split, key):
    data = data_module(train=["{one}<1}>"]) if split else data_module()
    with pytest.raises(UserError, match=f"no rows to inspect: {key} names no file"):
        inspection(data, split=split)


def test_ends_are_judged_over_all_splits(inspection, data_module):
    found = inspection(data_module(train=["{one}<1}>"], val=["{v}<1>"]))
    assert [well for well, _ in found.ends] == [False, True]
    assert "1 of 2 samples do not train one" in found.ends[0][1]
