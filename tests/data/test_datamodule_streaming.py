"""A data module with ``streaming: true``; that a run goes on exactly is tested in test_datamodule.py."""

from types import SimpleNamespace

import pytest

from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.support.errors import UserError


@pytest.fixture
def make(write, characters):
    pairs = [{"prompt": f"q{number}", "completion": "k" * (1 + number % 3)} for number in range(26)]
    files = {"train": write("train.jsonl", pairs), "val": write("val.jsonl", pairs[:5])}
    return lambda **kwargs: InstructionDataModule(
        **files | {"tokenizer": characters, "batch_size": 2, "streaming": True} | kwargs
    )


def with_trainer(make, **kwargs):
    data = make(**kwargs)
    data.trainer = SimpleNamespace(
        global_rank=0, world_size=1, max_steps=5, accumulate_grad_batches=4, overfit_batches=0
    )
    return data


def test_a_stream_is_as_long_as_the_run(make):
    data = with_trainer(make)
    data.setup("fit")
    assert data.count_train_batches() == len(list(data.train_dataloader())) == 20
    assert (data.reports["train"].rows, len(data.samples["train"])) == (26, 26)  # each looked at once
    assert len(data.val_dataloader()) == 3


def test_a_stream_without_an_end_is_refused_before_anything_is_read(make):
    data = with_trainer(make)
    data.trainer.max_steps = -1
    with pytest.raises(UserError, match=r"data.streaming: a stream has no end, so trainer.max_steps must say"):
        data.setup("fit")
    assert data.reports == {}


def test_a_stream_cannot_repeat_its_batches(make):
    data = with_trainer(make)
    data.trainer.overfit_batches = 2
    with pytest.raises(UserError, match=r"data.streaming: trainer.overfit_batches"):
        data.setup("fit")


def test_without_a_trainer_a_stream_is_checked_but_not_run(make):
    data = make()
    data.setup("fit")
    assert data.reports["train"].rows == 26
    with pytest.raises(UserError, match=r"trainer.max_steps"):
        data.train_dataloader()


def test_a_stream_needs_rows_too(make):
    with pytest.raises(UserError, match=r"train rows are needed.*data.train"):
        with_trainer(make, train=None).setup("fit")


def test_the_beginning_of_a_stream_is_checked_at_once(make, write):
    write("bad.jsonl", [{"prompt": "q", "completion": "k"}, {"prompt": "q", "completion": ""}])
    with pytest.raises(UserError, match=r"^1 row cannot be used:\n  bad.jsonl:2: the answer"):
        with_trainer(make, train="bad.jsonl").setup("fit")
